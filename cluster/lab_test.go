package cluster

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The tests mostly wait for timers, so more of them fit than there are processors.
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		if err := parallel.Value.Set("6"); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

// testHeartbeat is longer than the default: several clusters share a process, and
// the race detector slows them down.
const testHeartbeat = 400 * time.Millisecond

// lab is a cluster of peers over loopback TLS, with files in temporary
// directories and a gossip that never lies unless it is told to.
type lab struct {
	testing.TB
	ca    *identity.CA
	hub   *hub
	dirs  map[string]string
	peers map[string]*running
	logs  *slog.Logger
	// prepare is called with the next peers before they run.
	prepare func(*Peer)
}

// running is one peer of a lab.
type running struct {
	*Peer
	lab    *lab
	cancel context.CancelFunc
	done   chan struct{}
	err    error
	server *grpc.Server
	seen   atomic.Pointer[seenCall]
}

// seenCall is the last call of the client API whose handler ran at a peer.
type seenCall struct {
	caller, correlation string
	metadata            metadata.MD
}

func newLab(t testing.TB) *lab {
	t.Helper()
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{TB: t, ca: ca, hub: &hub{members: map[string]gossip.Member{}}, dirs: map[string]string{}, peers: map[string]*running{}}
	buffer := &logBuffer{}
	level := slog.LevelDebug
	if _, bench := t.(*testing.B); bench {
		level = slog.LevelWarn
	}
	l.logs = slog.New(slog.NewTextHandler(buffer, &slog.HandlerOptions{Level: level}))
	t.TempDir() // what is first is removed last: not before the peers have ended
	t.Cleanup(func() {
		for _, p := range l.peers {
			p.stop()
		}
		if t.Failed() && os.Getenv("CLUSTER_TEST_LOGS") != "" {
			t.Log(buffer.String())
		}
	})
	return l
}

type logBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (l *lab) identity(s identity.Subject) *identity.Identity {
	l.Helper()
	s.Cluster = "test"
	bundle, err := l.ca.Issue(s, time.Hour)
	if err != nil {
		l.Fatal(err)
	}
	id, err := identity.FromBundle(bundle)
	if err != nil {
		l.Fatal(err)
	}
	return id
}

// start runs a peer on new ports; the second time it finds the files of the first.
func (l *lab) start(id string, change ...func(*Config)) *running {
	l.Helper()
	if l.dirs[id] == "" {
		l.dirs[id] = l.TempDir()
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		l.Fatal(err)
	}
	cfg := Config{
		ID: id, Cluster: "test", Version: "test", DataDir: l.dirs[id],
		RaftBind: "127.0.0.1:0", APIAdvertise: listener.Addr().String(),
		Timers:   Timers{Heartbeat: testHeartbeat, JoinRetry: 500 * time.Millisecond, Stabilization: 50 * time.Millisecond},
		Identity: l.identity(identity.Subject{Kind: identity.Node, Name: id, Role: identity.RoleServer}),
		Logger:   l.logs,
		Seams:    Seams{Members: l.hub.source(id)},
	}
	for _, f := range change {
		f(&cfg)
	}
	peer, err := New(cfg)
	if err != nil {
		l.Fatal(err)
	}
	if l.prepare != nil {
		l.prepare(peer)
	}
	r := &running{Peer: peer, lab: l, done: make(chan struct{})}
	options := append(rpc.ServerOptions(rpc.ServerConfig{Identity: cfg.Identity, Logger: cfg.Logger}), grpc.ChainUnaryInterceptor(peer.ForwardUnary()))
	r.server = grpc.NewServer(options...)
	peer.Register(r.server)
	pb.RegisterControlPlaneServiceServer(r.server, &testAPI{peer: r})
	go func() {
		if err := r.server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			l.Errorf("serve %s: %v", id, err)
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() {
		defer close(r.done)
		r.err = peer.Run(ctx)
	}()
	l.peers[id] = r
	return r
}

// stop ends a peer as planned.
func (r *running) stop() {
	r.lab.Helper()
	r.cancel()
	<-r.done
	r.server.Stop()
	if r.err != nil {
		r.lab.Errorf("run %s: %v", r.cfg.ID, r.err)
	}
	r.err = nil
	delete(r.lab.peers, r.cfg.ID)
}

// crash ends a peer without any farewell. Calls that Raft has taken are let
// finish, because it would never answer them after its end.
func (r *running) crash() {
	r.lab.Helper()
	r.role.closing.Store(true)
	r.flights.drain(10 * time.Second)
	if err := r.raft.Load().Shutdown().Error(); err != nil {
		r.lab.Error(err)
	}
	r.stop()
}

// hubSource is the peer's own place in the gossip, for lies in its name.
func (r *running) hubSource() *hubSource { return &hubSource{hub: r.lab.hub, id: r.cfg.ID} }

func expect(n int) func(*Config) { return func(c *Config) { c.BootstrapExpect = n } }

func (l *lab) eventually(what string, ok func() bool) {
	l.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			l.Fatalf("waited too long until %s", what)
		case <-tick.C:
		}
	}
}

// leader waits for the one that leads and serves.
func (l *lab) leader() *running {
	l.Helper()
	var leader *running
	l.eventually("a peer leads", func() bool {
		for _, p := range l.peers {
			if p.IsLeader() {
				leader = p
				return true
			}
		}
		return false
	})
	return leader
}

// voters waits until every running peer of the cluster has exactly these voters in its configuration.
func (l *lab) voters(ids ...string) {
	l.Helper()
	for _, id := range ids {
		p := l.peers[id]
		if p == nil {
			continue
		}
		l.eventually(fmt.Sprintf("%s sees the voters %v and a leader, it has %v", id, ids, p.servers()), func() bool {
			var have []string
			for _, s := range p.servers() {
				if s.Suffrage == raft.Voter {
					have = append(have, string(s.ID))
				}
			}
			slices.Sort(have)
			leader, _ := p.Leader()
			return slices.Equal(have, ids) && leader != ""
		})
	}
}

// other returns a peer that is not one of these.
func (l *lab) other(not ...*running) *running {
	l.Helper()
	for _, p := range l.peers {
		if !slices.Contains(not, p) {
			return p
		}
	}
	l.Fatal("there is no other peer")
	return nil
}

// three starts a cluster of three.
func (l *lab) three(change ...func(*Config)) *running {
	l.Helper()
	for _, id := range []string{"n1", "n2", "n3"} {
		l.start(id, append(change, expect(3))...)
	}
	leader := l.leader()
	l.voters("n1", "n2", "n3")
	return leader
}

func write(id string) *pb.Command {
	return &pb.Command{RequestId: id, Payload: &pb.Command_RegisterProvider{
		RegisterProvider: &pb.RegisterProviderCommand{Spec: &pb.ProviderSpec{Id: id, Type: "kv", Driver: "memory"}},
	}}
}

func has(view fsm.View, id string) bool {
	_, ok := view.Provider(id)
	return ok
}

// put writes at whoever leads. An election on a busy machine is no failure of a
// test, so it does what a client does: repeat with the same request id.
func (l *lab) put(id string) *pb.CommandResult {
	l.Helper()
	var result *pb.CommandResult
	l.eventually("write "+id+" is acknowledged", func() bool {
		ctx, cancel := context.WithTimeout(l.Context(), 5*time.Second)
		defer cancel()
		var err error
		result, err = l.leader().Propose(ctx, write(id))
		code := apierror.CodeOf(err)
		if err != nil && code != pb.ErrorCode_ERROR_CODE_NO_LEADER && code != pb.ErrorCode_ERROR_CODE_TIMEOUT {
			l.Fatalf("write %s: %v", id, err)
		}
		return err == nil
	})
	return result
}

// everywhere waits until all running peers have a record.
func (l *lab) everywhere(id string) {
	l.Helper()
	for name, p := range l.peers {
		l.eventually(name+" has "+id, func() bool { return has(p.state.View(), id) })
	}
}

// quiet waits until the leader's duties have written what a new cluster needs, on
// all peers.
func (l *lab) quiet() {
	l.Helper()
	for name, p := range l.peers {
		l.eventually(name+" has the identity of the cluster and all peers", func() bool {
			view := p.state.View()
			return view.ClusterID() != "" && len(view.Peers(nil)) == len(p.servers())
		})
	}
}

// admin returns a connection of an operator to a peer.
func (l *lab) admin(p *running) *grpc.ClientConn {
	l.Helper()
	return l.dialAs(identity.Subject{Kind: identity.User, Name: "root", Role: identity.RoleAdmin}, p)
}

func (l *lab) dialAs(s identity.Subject, p *running) *grpc.ClientConn {
	l.Helper()
	conn, err := grpc.NewClient(p.cfg.APIAdvertise, append(rpc.DialOptions(), l.identity(s).DialOption(identity.Subject.IsPeer))...)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = conn.Close() })
	return conn
}

// testAPI is as much of the client API as the tests need.
type testAPI struct {
	pb.UnimplementedControlPlaneServiceServer
	peer *running
}

func (a *testAPI) RegisterProvider(ctx context.Context, req *pb.RegisterProviderRequest) (*pb.RegisterProviderResponse, error) {
	a.note(ctx)
	cmd := write(req.GetSpec().GetId())
	cmd.RequestId = req.GetRequestId()
	result, err := a.peer.Propose(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return &pb.RegisterProviderResponse{Index: result.GetIndex()}, nil
}

func (a *testAPI) note(ctx context.Context) {
	caller, _ := identity.Caller(ctx)
	md, _ := metadata.FromIncomingContext(ctx)
	a.peer.seen.Store(&seenCall{caller: caller.String(), correlation: correlation.ID(ctx), metadata: md})
}

func (a *testAPI) ListProviders(ctx context.Context, req *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	a.note(ctx)
	view, err := a.peer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	return &pb.ListProvidersResponse{Providers: view.Providers(nil), Index: view.Index()}, nil
}

// hub is a gossip in memory.
type hub struct {
	mu      sync.Mutex
	members map[string]gossip.Member
	sources []*hubSource
}

type hubSource struct {
	hub    *hub
	id     string
	events chan gossip.Event
}

func (h *hub) source(id string) *hubSource {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &hubSource{hub: h, id: id, events: make(chan gossip.Event, 64)}
	h.sources = append(h.sources, s)
	return s
}

func (h *hub) set(kind gossip.EventKind, m gossip.Member) {
	h.mu.Lock()
	defer h.mu.Unlock()
	id := m.Metadata.GetPeerId()
	if old := h.members[id]; old.Alive == m.Alive {
		m.Since = old.Since
	} else {
		m.Since = time.Now()
	}
	h.members[id] = m
	for _, s := range h.sources {
		select {
		case s.events <- gossip.Event{Kind: kind, Member: m}:
		default: // Members tells it too.
		}
	}
}

func (h *hub) alive(id string, alive bool) {
	h.mu.Lock()
	m := h.members[id]
	h.mu.Unlock()
	m.Alive = alive
	h.set(gossip.Failed, m)
}

func (s *hubSource) Run(ctx context.Context) error {
	s.hub.mu.Lock()
	m := s.hub.members[s.id]
	s.hub.mu.Unlock()
	m.Alive = true
	s.hub.set(gossip.Joined, m)
	<-ctx.Done()
	s.hub.mu.Lock()
	m = s.hub.members[s.id]
	s.hub.sources = slices.DeleteFunc(s.hub.sources, func(o *hubSource) bool { return o == s })
	s.hub.mu.Unlock()
	m.Alive, m.Left = false, true
	s.hub.set(gossip.Left, m)
	return nil
}

func (s *hubSource) Members() []gossip.Member {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	var out []gossip.Member
	for _, m := range s.hub.members {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b gossip.Member) int {
		return bytes.Compare([]byte(a.Metadata.GetPeerId()), []byte(b.Metadata.GetPeerId()))
	})
	return out
}

func (s *hubSource) Events() <-chan gossip.Event { return s.events }

func (s *hubSource) Update(meta *pb.PeerMetadata) error {
	s.hub.mu.Lock()
	m := s.hub.members[s.id]
	s.hub.mu.Unlock()
	m.Metadata = proto.CloneOf(meta)
	m.Left = false
	s.hub.set(gossip.Updated, m)
	return nil
}
