//go:build linux

package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

const (
	peers    = 3 // of the bootstrap
	maxHosts = 8 // with those that join later
	clients  = 8
	// diskBytes is the size of each peer's disk; a fault can fill it.
	diskBytes = 128 << 20
	portBase  = 7400
	// statusTimeout bounds one look at one peer, which may be paused or cut off.
	statusTimeout = time.Second
)

// arena is one cluster of peers, each in a network namespace and on a disk of
// its own, with clients beside them.
type arena struct {
	t       *testing.T
	net     *harness.Network
	cluster *dev.Cluster
	context client.Context
	members []*dev.Node
	clients []*client.Client
	readers []reader

	// hurt are the peers whose disk had a fault: they may end by it, also later.
	hurt map[string]bool
	// ended are the peers that ended by themselves and were started again.
	ended []string

	mu     sync.Mutex
	direct map[string]*client.Client // to one peer each
}

func newArena(t *testing.T, random *rand.Rand) *arena {
	t.Helper()
	harness.NeedRoot(t, "strace")
	binary, _ := harness.Binary(t)
	a := &arena{t: t, direct: map[string]*client.Client{}, hurt: map[string]bool{}}
	disks := harness.Tmpfs(t, maxHosts*4096+1<<20) // what holds the mount points
	for i := 1; i <= maxHosts; i++ {
		if err := os.Mkdir(filepath.Join(disks, fmt.Sprint(i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	a.net = harness.NewNetwork(t, maxHosts)
	disk := map[int]string{}
	cluster, err := dev.Create(dev.Options{
		Nodes: peers, Dir: t.TempDir(), Binary: binary, PortBase: portBase,
		Providers: []node.ProviderConfig{}, Address: a.net.Address,
		Adjust: func(i int, cfg *node.Config) {
			if disk[i] == "" {
				disk[i] = harness.Tmpfs(t, diskBytes)
			}
			// Peers alone: what is tested is the registry.
			cfg.Node.Role, cfg.DataDir = node.RoleServer, filepath.Join(disk[i], "data")
			// Snapshots come often, and who was away for a while gets one.
			cfg.Raft.SnapshotThreshold, cfg.Raft.SnapshotInterval, cfg.Raft.TrailingLogs = 256, 300*time.Millisecond, 64
		},
		Command: func(name string, argv []string) []string {
			var i int
			_, _ = fmt.Sscanf(name, "n%d", &i)
			return a.net.Command(i, argv)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	a.cluster, a.members = cluster, slices.Clone(cluster.Nodes())
	t.Cleanup(a.close)
	if a.context, err = client.LoadContext(cluster.ContextPath); err != nil {
		t.Fatal(err)
	}
	for range clients {
		addresses := cluster.Addresses()
		random.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
		c, err := a.connect(addresses)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		a.clients = append(a.clients, c)
	}
	for _, address := range cluster.Addresses() {
		conn, err := a.dial(address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		a.readers = append(a.readers, pb.NewControlPlaneServiceClient(conn))
	}
	if err := cluster.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := cluster.WaitReady(ctx, a.clients[0]); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *arena) close() {
	if a.t.Failed() {
		for _, n := range a.cluster.Nodes() {
			a.t.Logf("the end of %s's log:\n%s", n.Name(), dev.Tail(n.LogPath, 25))
		}
	}
	for _, c := range a.direct {
		_ = c.Close()
	}
	if err := a.cluster.Close(); err != nil {
		a.t.Errorf("shut the cluster down: %v", err)
	}
}

// connect makes a client that reaches into the network.
func (a *arena) connect(addresses []string) (*client.Client, error) {
	id, err := a.context.Identity()
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{Addresses: addresses, Identity: id, DialOptions: []grpc.DialOption{a.dialer()}})
}

// dial connects to one peer alone.
func (a *arena) dial(address string) (*grpc.ClientConn, error) {
	id, err := a.context.Identity()
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(address, append(rpc.DialOptions(), id.DialOption(identity.Subject.IsPeer), a.dialer())...)
}

func (a *arena) dialer() grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return a.net.Dial(ctx, address)
	})
}

// host returns the number of a peer's host in the network.
func (a *arena) host(n *dev.Node) int { return slices.Index(a.cluster.Nodes(), n) + 1 }

// others returns the members but n.
func (a *arena) others(n *dev.Node) []*dev.Node {
	return slices.DeleteFunc(slices.Clone(a.members), func(m *dev.Node) bool { return m == n })
}

func (a *arena) hosts(nodes []*dev.Node) []int {
	var out []int
	for _, n := range nodes {
		out = append(out, a.host(n))
	}
	return out
}

// status asks one peer what it knows.
func (a *arena) status(ctx context.Context, n *dev.Node) (*pb.StatusResponse, error) {
	a.mu.Lock()
	c := a.direct[n.Name()]
	if c == nil {
		var err error
		if c, err = a.connect([]string{n.Config.APIAddress()}); err != nil {
			a.mu.Unlock()
			return nil, err
		}
		a.direct[n.Name()] = c
	}
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return c.Status(ctx, &pb.StatusRequest{})
}

// leader waits for the member that leads in the highest term.
func (a *arena) leader(ctx context.Context) (leader *dev.Node, term uint64, err error) {
	err = harness.Until(ctx, "a leader", func(ctx context.Context) error {
		for _, n := range a.members {
			status, err := a.status(ctx, n)
			if err == nil && status.RaftState == "leader" && status.Term > term {
				leader, term = n, status.Term
			}
		}
		if leader == nil {
			return errors.New("no member leads")
		}
		return nil
	})
	return leader, term, err
}

// pick returns the leader or one of the others.
func (a *arena) pick(ctx context.Context, r *rand.Rand, leads bool) (*dev.Node, error) {
	leader, _, err := a.leader(ctx)
	if err != nil || leads {
		return leader, err
	}
	others := a.others(leader)
	return others[r.IntN(len(others))], nil
}

// start returns what starts peers that do not run.
func (a *arena) start(nodes ...*dev.Node) func(context.Context) error {
	return func(context.Context) error {
		var errs []error
		for _, n := range nodes {
			if _, err := n.PID(); err != nil {
				errs = append(errs, n.Start())
			}
		}
		return errors.Join(errs...)
	}
}

// revive starts members that have ended by themselves. Only one whose disk had a
// fault may.
func (a *arena) revive(ctx context.Context) error {
	for _, n := range a.members {
		if _, err := n.PID(); err == nil {
			continue
		}
		a.ended = append(a.ended, n.Name())
		if err := n.Start(); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// unhurt returns an error when a peer ended by itself whose disk had no fault.
func (a *arena) unhurt() error {
	for _, name := range a.ended {
		if !a.hurt[name] {
			return fmt.Errorf("%s ended by itself", name)
		}
	}
	return nil
}

// join lays out one more peer, starts it, and waits until it has a vote.
func (a *arena) join(ctx context.Context) (*dev.Node, error) {
	n, err := a.cluster.AddNode()
	if err != nil {
		return nil, err
	}
	if err := n.Start(); err != nil {
		return nil, err
	}
	a.members = append(a.members, n)
	return n, harness.Until(ctx, n.Name()+" to vote", func(ctx context.Context) error {
		if err := a.revive(ctx); err != nil {
			return err
		}
		leader, _, err := a.leader(ctx)
		if err != nil {
			return err
		}
		status, err := a.status(ctx, leader)
		if err != nil {
			return err
		}
		for _, p := range status.Peers {
			if p.Id == n.Name() && p.Voter {
				return nil
			}
		}
		return errors.New("it does not")
	})
}

// remove takes a peer out of the cluster for good.
func (a *arena) remove(ctx context.Context, n *dev.Node) error {
	a.members = a.others(n)
	err := harness.Until(ctx, n.Name()+" to be removed", func(ctx context.Context) error {
		// A peer that a fault of its disk ends late must not keep the others from a quorum.
		if err := a.revive(ctx); err != nil {
			return err
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		_, err := a.clients[0].Remove(call, &pb.RemoveRequest{PeerId: n.Name(), Force: true})
		status, errStatus := a.clients[0].Status(call, &pb.StatusRequest{})
		gone := errStatus == nil && status.LeaderId != "" &&
			!slices.ContainsFunc(status.Peers, func(p *pb.PeerStatus) bool { return p.Id == n.Name() })
		if gone {
			return nil
		}
		return errors.Join(err, errStatus, errors.New("it is still a peer"))
	})
	if err != nil {
		return err
	}
	return n.Kill()
}

// settle waits until all members have applied the same index and have the same
// state there. A state may come after the index that is reported with it: Raft
// counts an entry as applied when it hands it over. States that stay different are
// an error.
func (a *arena) settle(ctx context.Context) (term uint64, err error) {
	err = harness.Until(ctx, "all members to be where the leader is", func(ctx context.Context) error {
		if err := a.revive(ctx); err != nil {
			return err
		}
		leader, _, err := a.leader(ctx)
		if err != nil {
			return err
		}
		lead, err := a.status(ctx, leader)
		if err != nil {
			return err
		}
		term = lead.Term
		hashes := map[string]string{}
		for _, n := range a.members {
			status, err := a.status(ctx, n)
			if err != nil {
				return err
			}
			if status.AppliedIndex != lead.LastLogIndex || status.LeaderId != lead.PeerId {
				return fmt.Errorf("%s has applied %d of %d and follows %q", n.Name(), status.AppliedIndex, lead.LastLogIndex, status.LeaderId)
			}
			hashes[n.Name()] = status.StateHash
		}
		if distinct := slices.Compact(slices.Sorted(maps.Values(hashes))); len(distinct) != 1 || distinct[0] == "" {
			return fmt.Errorf("at index %d the members differ: %v", lead.LastLogIndex, hashes)
		}
		return nil
	})
	return term, err
}

// panics returns an error for each peer whose log tells of a defect.
func (a *arena) panics() error {
	var errs []error
	for _, n := range a.cluster.Nodes() {
		raw, err := os.ReadFile(n.LogPath)
		if err != nil {
			errs = append(errs, err)
		}
		for _, bad := range []string{"panic: ", "fatal error: ", "goroutine 1 [", "SIGSEGV"} {
			if i := bytes.Index(raw, []byte(bad)); i >= 0 {
				errs = append(errs, fmt.Errorf("%s's log says: %.2000s", n.Name(), raw[i:]))
				break
			}
		}
	}
	return errors.Join(errs...)
}
