package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// simulation is a cluster in memory whose network can be cut and delayed.
type simulation struct {
	*lab
	wires map[string]*wire
	disks map[string]*disk
}

// disk is a log in memory that can hang.
type disk struct {
	*raft.InmemStore
	mu      sync.Mutex
	hanging chan struct{}
}

// hang makes writes wait until the function that it returns is called.
func (d *disk) hang() (free func()) {
	hanging := make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hanging = hanging
	return sync.OnceFunc(func() { close(hanging) })
}

func (d *disk) StoreLogs(entries []*raft.Log) error {
	d.mu.Lock()
	hanging := d.hanging
	d.mu.Unlock()
	if hanging != nil {
		<-hanging
	}
	return d.InmemStore.StoreLogs(entries)
}

// wire is the network of one peer.
type wire struct {
	*raft.InmemTransport
	address raft.ServerAddress
	// late holds answers back until it is closed; requests still arrive.
	late atomic.Pointer[chan struct{}]
	// waiting counts the answers that are held back.
	waiting atomic.Int32
	// mute refuses to send anything more.
	mute atomic.Bool
}

var errMuted = errors.New("the network is cut")

func (w *wire) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if w.mute.Load() {
		return errMuted
	}
	err := w.InmemTransport.AppendEntries(id, target, args, resp)
	if late := w.late.Load(); late != nil {
		w.waiting.Add(1)
		<-*late
	}
	return err
}

func newSimulation(t testing.TB) *simulation {
	return &simulation{lab: newLab(t), wires: map[string]*wire{}, disks: map[string]*disk{}}
}

func (s *simulation) start(id string, change ...func(*Config)) *running {
	s.Helper()
	address, transport := raft.NewInmemTransport(raft.ServerAddress(fmt.Sprintf("127.0.0.1:%d", 1000+len(s.wires))))
	w := &wire{InmemTransport: transport, address: address}
	for _, other := range s.wires {
		other.Connect(address, transport)
		w.Connect(other.address, other.InmemTransport)
	}
	s.wires[id] = w
	memory := &disk{InmemStore: raft.NewInmemStore()}
	s.disks[id] = memory
	return s.lab.start(id, append(change, func(c *Config) {
		c.Seams.Transport, c.Seams.Logs, c.Seams.Stable, c.Seams.SnapshotStore = w, memory, memory, raft.NewInmemSnapshotStore()
	})...)
}

// cut separates a peer from these others, both ways.
func (s *simulation) cut(id string, others ...string) {
	for _, other := range others {
		s.wires[id].Disconnect(s.wires[other].address)
		s.wires[other].Disconnect(s.wires[id].address)
	}
}

func (s *simulation) heal() {
	for _, a := range s.wires {
		for _, b := range s.wires {
			if a != b {
				a.Connect(b.address, b.InmemTransport)
			}
		}
	}
}

func (s *simulation) others(id string) (out []string) {
	for other := range s.wires {
		if other != id {
			out = append(out, other)
		}
	}
	return out
}

// beliefs is for how long n1 of believer goes on leading, as far as it knows, when
// it hears of nobody: longer than any test.
const beliefs = time.Minute

// believer starts n1, n2 and n3. Whatever happens to n1, as long as it hears of no
// other leader it believes that it leads; the others replace it soon.
func (s *simulation) believer() *running {
	s.Helper()
	n1 := s.start("n1", expect(3), func(c *Config) {
		c.Timers.Heartbeat, c.Timers.Shutdown = beliefs, 2*time.Second
	})
	for _, id := range []string{"n2", "n3"} {
		s.start(id, expect(3), func(c *Config) { c.Timers.Heartbeat = testHeartbeat })
	}
	s.lead(n1)
	return n1
}

// lead makes a peer the leader, for all.
func (s *simulation) lead(p *running) {
	s.Helper()
	s.eventually("all follow "+p.cfg.ID, func() bool {
		all, latest := p.IsLeader(), (*running)(nil)
		for _, other := range s.peers {
			id, _ := other.Leader()
			all = all && id == p.cfg.ID
			if other.IsLeader() && (latest == nil || other.raft.Load().CurrentTerm() > latest.raft.Load().CurrentTerm()) {
				latest = other
			}
		}
		if latest != nil && latest != p {
			// It is refused while another transfer is under way, or p lags.
			_ = latest.raft.Load().LeadershipTransferToServer(raft.ServerID(p.cfg.ID), s.wires[p.cfg.ID].address).Error()
		}
		return all
	})
}

// successor waits until another peer than old leads, while old still believes
// that it does itself, and writes there.
func (s *simulation) successor(old *running, id string) {
	s.Helper()
	s.eventually(id+" is acknowledged by another leader", func() bool {
		for _, p := range s.peers {
			if p != old && p.IsLeader() {
				_, err := p.Propose(s.Context(), write(id))
				return err == nil
			}
		}
		return false
	})
	if !old.IsLeader() {
		s.Fatal("the old leader has heard of the new one")
	}
}

// A leader that cannot reach the voters must not answer a linearizable read,
// however many non-voters still listen to it.
func TestCutOffLeaderWithNonVotersAnswersNoRead(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	old := s.believer()
	for _, id := range []string{"w1", "w2"} {
		s.start(id, func(c *Config) { c.NonVoter = true })
		s.eventually(id+" replicates", func() bool { _, ok := s.peers[id].suffrage(id); return ok })
	}
	s.put("before")
	s.everywhere("before")
	for _, id := range []string{"n1", "w1", "w2"} {
		s.cut(id, "n2", "n3")
	}
	s.successor(old, "after")
	if err := old.raft.Load().VerifyLeader().Error(); err != nil {
		t.Errorf("the non-voters do not listen to the old leader any more: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if view, err := old.View(ctx, nil); err == nil {
		t.Errorf("a leader cut off from all voters answered a linearizable read; it has the latest write: %v", has(view, "after"))
	}
	if _, err := old.View(t.Context(), &pb.ReadOptions{Stale: true}); err != nil {
		t.Errorf("a stale read: %v", err)
	}
	if !old.IsLeader() {
		t.Error("the old leader gave up, so this showed nothing")
	}
}

// Answers to requests from before the cut must not count for a read from after it.
func TestLateAnswersDoNotConfirmARead(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	old := s.believer()
	s.put("before")
	w := s.wires["n1"]
	// From now on requests of n1 arrive and their answers wait.
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	t.Cleanup(release)
	w.late.Store(&hold)
	s.eventually("heartbeats and entries to both are under way", func() bool {
		old.raft.Load().VerifyLeader() // it sends heartbeats
		return w.waiting.Load() >= 4
	})
	w.mute.Store(true)
	s.cut("n1", "n2", "n3")
	s.successor(old, "after")
	// The late answers come while a read waits for its confirmation.
	type answer struct {
		seen bool
		err  error
	}
	answers := make(chan answer, 1)
	last := old.raft.Load().LastIndex()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	go func() {
		view, err := old.View(ctx, nil)
		answers <- answer{err == nil && has(view, "after"), err}
	}()
	asked, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	for old.raft.Load().LastIndex() == last && len(answers) == 0 && pause(asked, 2*time.Millisecond, nil) {
	}
	if !old.IsLeader() {
		t.Error("the old leader gave up, so this shows nothing")
	}
	release()
	if a := <-answers; a.err == nil && !a.seen {
		t.Error("the old leader answered a linearizable read without the acknowledged write")
	}
}

// Reads at whoever thinks it leads never miss an acknowledged write, while a leader
// that does not notice it is cut off again and again.
func TestReadsAreLinearizableThroughPartitions(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	old := s.believer()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var acknowledged atomic.Int64 // the highest number that was acknowledged
	var reads atomic.Int64
	var group sync.WaitGroup
	for _, p := range s.peers {
		group.Go(func() {
			for ctx.Err() == nil {
				floor := acknowledged.Load()
				short, done := context.WithTimeout(ctx, 200*time.Millisecond)
				view, err := p.View(short, nil)
				done()
				if err != nil {
					if !pause(ctx, 2*time.Millisecond, nil) {
						return
					}
					continue
				}
				reads.Add(1)
				if floor > 0 && !has(view, fmt.Sprintf("v%d", floor)) {
					t.Errorf("%s answered a read without v%d", p.cfg.ID, floor)
					return
				}
			}
		})
	}
	group.Go(func() {
		for n := int64(1); ctx.Err() == nil; {
			done := false
			for _, p := range s.peers {
				short, stop := context.WithTimeout(ctx, 200*time.Millisecond)
				_, err := p.Propose(short, write(fmt.Sprintf("v%d", n)))
				stop()
				if err == nil {
					acknowledged.Store(n)
					done = true
					break
				}
			}
			if done {
				n++
			} else if !pause(ctx, 2*time.Millisecond, nil) {
				return
			}
		}
	})
	for range 3 {
		s.lead(old)
		before := acknowledged.Load()
		s.eventually("writes go on", func() bool { return acknowledged.Load() > before+5 })
		s.cut("n1", "n2", "n3")
		s.eventually("another peer leads", func() bool {
			return s.peers["n2"].IsLeader() || s.peers["n3"].IsLeader()
		})
		before = acknowledged.Load()
		s.eventually("writes go on at the new leader", func() bool { return acknowledged.Load() > before+5 })
		if !old.IsLeader() {
			t.Error("the old leader has heard of the new one")
		}
		s.heal()
	}
	cancel()
	group.Wait()
	if reads.Load() == 0 || acknowledged.Load() < 10 {
		t.Errorf("only %d reads and %d writes", reads.Load(), acknowledged.Load())
	}
}

func TestReadWaitsForItsIndex(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	p := s.start("n1", expect(1))
	index := s.put("w").GetIndex()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	// Far ahead: the peer writes entries of its own, too.
	if _, err := p.View(ctx, &pb.ReadOptions{Stale: true, MinIndex: index + 1000}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_TIMEOUT {
		t.Errorf("a read of the future: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		view, err := p.View(t.Context(), &pb.ReadOptions{Stale: true, MinIndex: index + 1})
		if err == nil && view.Index() <= index {
			err = fmt.Errorf("view at %d", view.Index())
		}
		got <- err
	}()
	s.put("x")
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestReadAtAFollowerNeedsTheLeader(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	for _, id := range []string{"n1", "n2", "n3"} {
		s.start(id, expect(3))
	}
	follower := s.other(s.leader())
	if _, err := follower.View(t.Context(), nil); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NO_LEADER {
		t.Errorf("a linearizable read at a follower: %v", err)
	}
}

// A leader whose disk hangs answers heartbeats for ever; the others must still
// get another leader.
func TestLeaderWithAHangingDiskIsReplaced(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	for _, id := range []string{"n1", "n2", "n3"} {
		s.start(id, expect(3), func(c *Config) { c.Timers.DiskLimit = 100 * time.Millisecond })
	}
	leader := s.leader()
	free := s.disks[leader.cfg.ID].hang()
	t.Cleanup(free)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := leader.Propose(ctx, write("stuck")); err == nil {
		t.Error("a write was acknowledged by a disk that hangs")
	}
	s.eventually("another peer leads", func() bool {
		for _, p := range s.peers {
			if p != leader && p.IsLeader() {
				return true
			}
		}
		return false
	})
	free()
	s.eventually("the old leader follows", func() bool { return leader.raft.Load().State() == raft.Follower })
	s.put("after")
	s.everywhere("after")
}

func TestPeerWithAHangingDiskStillStops(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	p := s.start("n1", expect(1), func(c *Config) {
		c.Timers.DiskLimit, c.Timers.Shutdown = 50*time.Millisecond, 100*time.Millisecond
	})
	s.leader()
	free := s.disks["n1"].hang()
	t.Cleanup(free)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Propose(ctx, write("stuck")); err == nil {
		t.Error("a write was acknowledged by a disk that hangs")
	}
	p.cancel()
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		t.Fatal("the peer waits for its disk")
	}
	if !errors.Is(p.err, errHanging) {
		t.Errorf("run: %v", p.err)
	}
	p.err = nil
}
