package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
)

// gatedLogs is a log store whose writes wait while the gate is shut.
type gatedLogs struct {
	*raft.InmemStore
	gate sync.RWMutex
	mu   sync.Mutex
	errs []error
}

func (g *gatedLogs) StoreLogs(entries []*raft.Log) error {
	g.gate.RLock()
	defer g.gate.RUnlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.errs) > 0 {
		err := g.errs[0]
		g.errs = g.errs[1:]
		return err
	}
	return g.InmemStore.StoreLogs(entries)
}

func newGatedLogs() *gatedLogs { return &gatedLogs{InmemStore: raft.NewInmemStore()} }

func entriesFrom(first, n uint64) []*raft.Log {
	var out []*raft.Log
	for i := first; i < first+n; i++ {
		out = append(out, &raft.Log{Index: i, Term: 1, Data: []byte{byte(i)}})
	}
	return out
}

// TestLeaderWritesBesideReplication looks at one store: what is not on disk yet
// can be read, and synced returns only once it is.
func TestLeaderWritesBesideReplication(t *testing.T) {
	disk := newGatedLogs()
	logs := newParallelLogs(disk, func() bool { return true }, func(err error) { t.Errorf("broken: %v", err) })
	disk.gate.Lock()
	for _, batch := range [][]*raft.Log{entriesFrom(1, 3), entriesFrom(4, 300)} {
		if err := logs.StoreLogs(batch); err != nil {
			t.Fatal(err)
		}
	}
	var entry raft.Log
	if err := logs.GetLog(2, &entry); err != nil || entry.Data[0] != 2 {
		t.Errorf("an entry that is not on disk yet: %v, %v", entry, err)
	}
	if last, err := logs.LastIndex(); last != 303 || err != nil {
		t.Errorf("last index is %d, %v", last, err)
	}
	synced := make(chan error, 1)
	go func() { synced <- logs.synced() }()
	select {
	case err := <-synced:
		t.Fatalf("synced returned %v before anything was on disk", err)
	default:
	}
	disk.gate.Unlock()
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	if last, _ := disk.LastIndex(); last != 303 {
		t.Errorf("on disk are %d entries", last)
	}
	if err := logs.DeleteRange(300, 303); err != nil {
		t.Fatal(err)
	}
	if last, _ := logs.LastIndex(); last != 299 {
		t.Errorf("last index after a deletion is %d", last)
	}
}

// TestWritesThatMayNotBeParallel: the configuration decides who counts, and
// without a leader's role nobody holds answers back.
func TestWritesThatMayNotBeParallel(t *testing.T) {
	for name, c := range map[string]struct {
		shared bool
		entry  *raft.Log
	}{
		"not leading others": {false, &raft.Log{Index: 1}},
		"a configuration":    {true, &raft.Log{Index: 1, Type: raft.LogConfiguration}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := newGatedLogs()
			logs := newParallelLogs(disk, func() bool { return c.shared }, nil)
			if err := logs.StoreLog(c.entry); err != nil {
				t.Fatal(err)
			}
			if last, _ := disk.LastIndex(); last != 1 {
				t.Error("the write returned before the entry was on disk")
			}
		})
	}
}

func TestFailedWriteOfTheLeaderIsNeverCounted(t *testing.T) {
	for name, failure := range map[string]error{
		"input/output error":            errors.New("input/output error"),
		"a disk that got full half-way": fmt.Errorf("%w: %w", raftfile.ErrFailed, syscall.ENOSPC),
	} {
		t.Run(name, func(t *testing.T) {
			disk := newGatedLogs()
			disk.errs = []error{failure}
			broken := make(chan error, 1)
			logs := newParallelLogs(disk, func() bool { return true }, func(err error) { broken <- err })
			if err := logs.StoreLogs(entriesFrom(1, 2)); err != nil {
				t.Fatal(err)
			}
			if err := logs.synced(); err == nil {
				t.Fatal("entries whose write failed count as synced")
			}
			if err := <-broken; err == nil {
				t.Error("the peer was not told")
			}
			if err := logs.StoreLogs(entriesFrom(3, 1)); err == nil {
				t.Error("a store that failed takes further entries")
			}
		})
	}
}

func TestFullDiskIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newGatedLogs()
		disk.errs = []error{syscall.ENOSPC, syscall.ENOSPC}
		logs := newParallelLogs(disk, func() bool { return true }, func(err error) { t.Errorf("broken: %v", err) })
		if err := logs.StoreLogs(entriesFrom(1, 2)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := logs.synced(); err != nil || time.Since(began) != 2*spaceRetry {
			t.Errorf("synced after %v: %v", time.Since(began), err)
		}
	})
}

// hashicorp/raft does not take back what it believes to be its last entry when it
// has cleared the end of its log and then cannot store what belongs there.
func TestAClearedEndOfTheLogIsFilledOrRaftEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newGatedLogs()
		var broken error
		logs := newParallelLogs(disk, func() bool { return false }, func(err error) { broken = err })
		if err := logs.StoreLogs(entriesFrom(1, 5)); err != nil {
			t.Fatal(err)
		}
		disk.errs = []error{raftfile.ErrFull}
		if err := logs.StoreLogs(entriesFrom(6, 1)); !errors.Is(err, raftfile.ErrFull) {
			t.Errorf("a write that only adds: %v", err)
		}
		if err := logs.DeleteRange(1, 2); err != nil { // as after a snapshot
			t.Fatal(err)
		}
		disk.errs = []error{raftfile.ErrFull}
		if err := logs.StoreLogs(entriesFrom(6, 1)); !errors.Is(err, raftfile.ErrFull) {
			t.Errorf("a write after the beginning was deleted: %v", err)
		}
		clear := func() {
			if err := logs.DeleteRange(4, 5); err != nil {
				t.Fatal(err)
			}
		}
		clear()
		disk.errs = []error{raftfile.ErrFull, syscall.ENOSPC, raftfile.ErrFull}
		began := time.Now()
		if err := logs.StoreLogs(entriesFrom(4, 2)); err != nil || time.Since(began) != 3*spaceRetry {
			t.Errorf("on a full disk: %v after %s", err, time.Since(began))
		}
		if last, err := disk.LastIndex(); last != 5 || err != nil || broken != nil {
			t.Errorf("the log ends at %d, %v, %v", last, err, broken)
		}
		clear()
		disk.errs = []error{errors.New("the disk failed")}
		ended, returned := make(chan struct{}), false
		go func() {
			defer close(ended)
			_ = logs.StoreLogs(entriesFrom(4, 2))
			returned = true
		}()
		<-ended
		if returned || broken == nil {
			t.Errorf("raft goes on: %t, the peer was told of %v", returned, broken)
		}
	})
}

// inMemory gives a peer stores in memory, with a gate before its log.
func inMemory(disk *gatedLogs) func(*Config) {
	return func(c *Config) {
		c.Seams.Logs, c.Seams.Stable, c.Seams.SnapshotStore = disk, raft.NewInmemStore(), raft.NewInmemSnapshotStore()
		c.Timers.DiskLimit = time.Minute // a shut gate shall not look like a hanging disk
	}
}

// TestNothingIsCommittedBeforeTheLeaderHasIt shuts the leader's disk: the
// followers get the entry, and still nobody may be told that it is committed.
func TestNothingIsCommittedBeforeTheLeaderHasIt(t *testing.T) {
	l := newLab(t)
	disks := map[string]*gatedLogs{}
	for _, id := range []string{"n1", "n2", "n3"} {
		disks[id] = newGatedLogs()
		l.start(id, expect(3), inMemory(disks[id]))
	}
	leader := l.leader()
	l.quiet()
	l.put("before")
	l.everywhere("before")
	disk := disks[leader.cfg.ID]
	disk.gate.Lock()
	committed := make(chan error, 1)
	go func() {
		_, err := leader.Propose(context.Background(), write("after"))
		committed <- err
	}()
	l.eventually("the followers have the entry on disk", func() bool {
		at, _ := disk.LastIndex()
		for id, d := range disks {
			if last, _ := d.LastIndex(); id != leader.cfg.ID && last <= at {
				return false
			}
		}
		return true
	})
	select {
	case err := <-committed:
		t.Errorf("a write came back before the leader's disk had it: %v", err)
	default:
	}
	for id, p := range l.peers {
		if has(p.State().View(), "after") {
			t.Errorf("%s applied what is on no quorum with the leader", id)
		}
	}
	disk.gate.Unlock()
	if err := <-committed; err != nil {
		t.Fatal(err)
	}
	l.everywhere("after")
}

// TestFollowersHearOfCommitsAtOnce turns off Raft's own way to tell an idle
// follower what has been committed.
func TestFollowersHearOfCommitsAtOnce(t *testing.T) {
	l := newLab(t)
	l.three(func(c *Config) { c.commitTimeout = time.Hour })
	for _, id := range []string{"a", "b", "c"} {
		l.put(id)
		l.everywhere(id)
	}
}

// TestADeposedLeaderLetsItsFollowersGo: its disk is full, so that the last entries
// it sent are not on it, and the goroutines of hashicorp/raft that wait for them go
// on with their heartbeats.
func TestADeposedLeaderLetsItsFollowersGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, inner := raft.NewInmemTransport("n1")
		wire := &sentMessages{LoopbackTransport: inner}
		g, err := newGuard(wire, &atomic.Bool{})
		if err != nil {
			t.Fatal(err)
		}
		disk := newGatedLogs()
		logs := newParallelLogs(disk, func() bool { return true }, nil)
		var term atomic.Uint64
		term.Store(3)
		g.syncedWhile, g.leadsIn = logs.syncedWhile, func(t uint64) bool { return t == term.Load() }
		disk.errs = slices.Repeat([]error{syscall.ENOSPC}, 10)
		if err := logs.StoreLogs(entriesFrom(1, 1)); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error, 1)
		go func() {
			var resp raft.AppendEntriesResponse
			answered <- g.AppendEntries("n2", "n2", &raft.AppendEntriesRequest{Term: 3, Entries: entriesFrom(1, 1)}, &resp)
		}()
		beat := func() error {
			return g.AppendEntries("n2", "n2", &raft.AppendEntriesRequest{Term: 3}, &raft.AppendEntriesResponse{})
		}
		synctest.Wait()
		if err := beat(); err != nil || len(answered) > 0 || len(wire.sent) != 2 {
			t.Fatalf("while it leads: %d messages, %d answers, %v", len(wire.sent), len(answered), err)
		}
		term.Store(4) // it was elected again
		logs.wake()
		if err := <-answered; !errors.Is(err, errDeposed) {
			t.Errorf("the entries: %v", err)
		}
		if err := beat(); !errors.Is(err, errDeposed) || len(wire.sent) != 2 {
			t.Errorf("a heartbeat of the term before: %v, %d messages", err, len(wire.sent))
		}
		if err := logs.synced(); err != nil {
			t.Error(err)
		}
	})
}

// sentMessages is a transport that keeps what is sent and acknowledges it.
type sentMessages struct {
	raft.LoopbackTransport
	mu   sync.Mutex
	sent []raft.AppendEntriesRequest
}

func (s *sentMessages) AppendEntries(_ raft.ServerID, _ raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, *args)
	resp.Success = true
	return nil
}

func TestHeraldTellsWhatIsCommittedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, inner := raft.NewInmemTransport("n1")
		wire := &sentMessages{LoopbackTransport: inner}
		g, err := newGuard(wire, &atomic.Bool{})
		if err != nil {
			t.Fatal(err)
		}
		var committed, last atomic.Uint64
		committed.Store(6)
		last.Store(7)
		applied := make(chan struct{}, 1)
		var term atomic.Uint64
		term.Store(3)
		h := newHerald(g, committed.Load, last.Load, func(t uint64) bool { return t == term.Load() })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); h.run(ctx, func() <-chan struct{} { return applied }) }()
		var resp raft.AppendEntriesResponse
		err = h.AppendEntries("n2", "n2", &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: 5, PrevLogTerm: 2, LeaderCommitIndex: 5, Entries: []*raft.Log{{Index: 6, Term: 2}, {Index: 7, Term: 3}}}, &resp)
		if err != nil {
			t.Fatal(err)
		}
		expect := func(what string, n int) {
			t.Helper()
			synctest.Wait()
			if len(wire.sent) != n {
				t.Fatalf("%s: %d messages were sent, want %d: %+v", what, len(wire.sent), n, wire.sent[1:])
			}
		}
		expect("before the commit", 1)
		committed.Store(7)
		last.Store(8)
		h.look()
		expect("with an entry on its way", 1)
		last.Store(7)
		term.Store(0)
		h.look()
		// The entries that are committed now are another leader's.
		expect("to a follower of a leader that was deposed", 1)
		term.Store(3)
		applied <- struct{}{}
		expect("after the commit", 2)
		if m := wire.sent[1]; m.Term != 3 || m.PrevLogEntry != 7 || m.PrevLogTerm != 3 || m.LeaderCommitIndex != 7 || len(m.Entries) != 0 {
			t.Errorf("the news are %+v", m)
		}
		h.look()
		expect("once more", 2)
		cancel()
		<-done
	})
}
