package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func save(t *testing.T, conn grpc.ClientConnInterface) (data []byte, index uint64) {
	t.Helper()
	stream, err := pb.NewClusterServiceClient(conn).SnapshotSave(t.Context(), &pb.SnapshotSaveRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return data, index
		}
		if err != nil {
			t.Fatal(err)
		}
		data, index = append(data, piece.GetChunk()...), piece.GetIndex()
	}
}

func restore(t *testing.T, conn grpc.ClientConnInterface, data []byte) (uint64, error) {
	t.Helper()
	stream, err := pb.NewClusterServiceClient(conn).SnapshotRestore(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for len(data) > 0 {
		n := min(len(data), 1000)
		if err := stream.Send(&pb.SnapshotRestoreRequest{Chunk: data[:n]}); err != nil {
			break
		}
		data = data[n:]
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetIndex(), err
}

func TestSnapshotIsSavedAndRestoredThroughAnyPeer(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	follower := l.other(l.three())
	l.put("kept")
	data, index := save(t, l.admin(follower))
	if index == 0 || len(data) == 0 {
		t.Fatalf("%d bytes at index %d", len(data), index)
	}
	l.put("later")
	after, err := restore(t, l.admin(follower), data)
	if err != nil {
		t.Fatal(err)
	}
	if after <= index {
		t.Errorf("index %d after the restore of index %d", after, index)
	}
	for id, p := range l.peers {
		l.eventually(id+" has the restored state", func() bool {
			view := p.state.View()
			return has(view, "kept") && !has(view, "later")
		})
	}
	l.put("anew")
	l.everywhere("anew")
	l.eventually("all peers have the same state", func() bool {
		hashes := map[string]bool{}
		for _, p := range l.peers {
			hashes[p.state.View().Hash()] = true
		}
		return len(hashes) == 1
	})
}

func TestSnapshotCanSeedAnotherCluster(t *testing.T) {
	t.Parallel()
	first, second := newLab(t), newLab(t)
	first.start("a1", expect(1))
	first.put("moved")
	data, _ := save(t, first.admin(first.leader()))
	second.start("b1", expect(1))
	p := second.leader()
	if _, err := restore(t, second.admin(p), data); err != nil {
		t.Fatal(err)
	}
	// The peers of the other cluster came with the snapshot and are tidied away.
	second.eventually("the registry has the record and its own peers only", func() bool {
		view := p.state.View()
		_, foreign := view.Peer("a1")
		_, own := view.Peer("b1")
		return has(view, "moved") && own && !foreign
	})
}

func TestBadSnapshotIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start("n1", expect(1))
	l.put("kept")
	p := l.leader()
	data, _ := save(t, l.admin(p))
	damaged := append([]byte(nil), data...)
	damaged[len(damaged)/2] ^= 1
	for name, bad := range map[string][]byte{"empty": nil, "cut short": data[:len(data)-1], "flipped bit": damaged, "something else": []byte("hello")} {
		if _, err := restore(t, l.admin(p), bad); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
			t.Errorf("%s: %v", name, err)
		}
	}
	worker := l.dialAs(identity.Subject{Kind: identity.Node, Name: "w", Role: identity.RoleWorker}, p)
	if _, err := restore(t, worker, data); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a worker restored a snapshot: %v", err)
	}
	if !has(p.state.View(), "kept") {
		t.Error("the state is gone")
	}
	l.put("after")
}

func TestLaggingPeerGetsASnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	small := func(c *Config) { c.Snapshots = Snapshots{Threshold: 20, Trailing: 5, Interval: 50 * time.Millisecond} }
	leader := l.three(small)
	behind := l.other(leader)
	id := behind.cfg.ID
	behind.stop()
	for i := range 60 {
		l.put(fmt.Sprintf("w%d", i))
	}
	for name, p := range l.peers {
		l.eventually(name+" has compacted its log", func() bool {
			return p.raft.Load().Stats()["last_snapshot_index"] != "0"
		})
	}
	again := l.start(id, small)
	l.everywhere("w59")
	if restored := again.state.View(); !has(restored, "w0") {
		t.Error("the snapshot lacks what the log does not have any more")
	}
	// And a restart reads its own snapshot.
	again.stop()
	again = l.start(id, small)
	l.eventually("the snapshot is read", func() bool { return has(again.state.View(), "w0") })
}

// The real gossip, as in production.
func TestPeersFindEachOtherByGossip(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	gossips := map[string]*gossip.Gossip{}
	seed := ""
	for _, id := range []string{"n1", "n2", "n3"} {
		p := l.start(id, expect(3), func(c *Config) {
			c.Seams.Members = nil
			c.Gossip = gossip.Config{Bind: "127.0.0.1:0", Key: []byte("0123456789abcdef")}
			if seed != "" {
				c.Gossip.Join = []string{seed}
			}
		})
		l.eventually(id+" listens for gossip", func() bool {
			source := p.members.Load()
			if source == nil {
				return false
			}
			g, ok := source.MemberSource.(*gossip.Gossip)
			if !ok {
				return false
			}
			gossips[id] = g
			return g.Address() != ""
		})
		seed = gossips[id].Address()
	}
	l.leader()
	l.voters("n1", "n2", "n3")
	l.put("w")
	l.everywhere("w")
}

func TestViewIsImmutableWhileCommandsAreApplied(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	p := l.start("n1", expect(1))
	l.put("w")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var view fsm.View
	l.eventually("a linearizable read works", func() (ok bool) {
		var err error
		view, err = p.View(ctx, nil)
		return err == nil
	})
	l.put("x")
	if has(view, "x") {
		t.Error("a view changed")
	}
}

// restores is a state machine that counts how often it went back to a snapshot.
type restores struct{ n atomic.Int32 }

func (*restores) Apply(*raft.Log) any                 { return nil }
func (*restores) Snapshot() (raft.FSMSnapshot, error) { return nil, errors.New("not wanted") }
func (r *restores) Restore(data io.ReadCloser) error  { r.n.Add(1); return data.Close() }

// TestASnapshotThatWasOvertakenIsRefused sends a follower a snapshot again after
// entries that came later: hashicorp/raft would go back to it.
func TestASnapshotThatWasOvertakenIsRefused(t *testing.T) {
	_, inner := raft.NewInmemTransport("n1")
	_, leader := raft.NewInmemTransport("n2")
	leader.Connect("n1", inner)
	g, err := newGuard(inner, &atomic.Bool{})
	if err != nil {
		t.Fatal(err)
	}
	p := &Peer{}
	g.covers = p.covers
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); g.run(ctx) }()
	defer func() { cancel(); <-done }()

	cfg := raft.DefaultConfig()
	cfg.LocalID, cfg.Logger = "n1", hclog.NewNullLogger()
	cfg.HeartbeatTimeout, cfg.ElectionTimeout = time.Hour, time.Hour
	state, logs := &restores{}, raft.NewInmemStore()
	r, err := raft.NewRaft(cfg, state, logs, logs, raft.NewInmemSnapshotStore(), g)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Shutdown().Error(); err != nil {
			t.Error(err)
		}
	}()
	p.raft.Store(r)

	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("n2"), Addr: []byte("n2")}
	voters := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "n1", Address: "n1"}, {ID: "n2", Address: "n2"}}})
	install := func() (raft.InstallSnapshotResponse, error) {
		const content = "the state at 5"
		var resp raft.InstallSnapshotResponse
		err := leader.InstallSnapshot("n1", "n1", &raft.InstallSnapshotRequest{
			RPCHeader: header, SnapshotVersion: raft.SnapshotVersionMax, Term: 2, LastLogIndex: 5, LastLogTerm: 2,
			Configuration: voters, ConfigurationIndex: 1, Size: int64(len(content)),
		}, &resp, strings.NewReader(content))
		return resp, err
	}
	// A leader that has not heard that the first arrived sends it again.
	for range 2 {
		if resp, err := install(); err != nil || !resp.Success {
			t.Fatalf("before the entries: %+v, %v", resp, err)
		}
	}
	before := state.n.Load()
	var entries []*raft.Log
	for i := uint64(6); i <= 10; i++ {
		entries = append(entries, &raft.Log{Index: i, Term: 2, Type: raft.LogNoop})
	}
	var resp raft.AppendEntriesResponse
	err = leader.AppendEntries("n1", "n1", &raft.AppendEntriesRequest{
		RPCHeader: header, Term: 2, PrevLogEntry: 5, PrevLogTerm: 2, Entries: entries, LeaderCommitIndex: 10,
	}, &resp)
	if err != nil || !resp.Success {
		t.Fatalf("entries: %+v, %v", resp, err)
	}
	if resp, err := install(); err == nil || resp.Success {
		t.Errorf("after the entries: %+v, %v", resp, err)
	}
	if n, applied := state.n.Load()-before, r.AppliedIndex(); n != 0 || applied != 10 {
		t.Errorf("restored %d times more, applied up to %d", n, applied)
	}
}
