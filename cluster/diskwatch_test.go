package cluster

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
)

func TestHangingWriteIsToldAndThenEndsThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var slow, recovered, ended atomic.Int64
		note := func(at *atomic.Int64) { at.Store(int64(time.Since(began))) }
		w := &diskWatch{
			limit: 2 * time.Second, dead: 10 * time.Second,
			slow: func() { note(&slow) }, recovered: func() { note(&recovered) },
			damaged: func(err error) {
				if !errors.Is(err, ErrDiskHangs) || !IsDiskFailure(err) {
					t.Error(err)
				}
				note(&ended)
			},
		}
		if err := w.write(func() error { time.Sleep(12 * time.Second); return nil }); err != nil {
			t.Error(err)
		}
		got := []time.Duration{time.Duration(slow.Load()), time.Duration(ended.Load()), time.Duration(recovered.Load())}
		if want := []time.Duration{2 * time.Second, 10 * time.Second, 12 * time.Second}; !slices.Equal(got, want) {
			t.Errorf("slow, ended, recovered %v, want %v", got, want)
		}
	})
}

func TestSlowWritesDoNotEndThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow, ended atomic.Int64
		w := &diskWatch{
			limit: 2 * time.Second, dead: 10 * time.Second,
			slow: func() { slow.Add(1) }, recovered: func() {}, damaged: func(error) { ended.Add(1) },
		}
		for range 5 {
			if err := w.write(func() error { time.Sleep(3 * time.Second); return nil }); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(time.Minute)
		if slow.Load() != 5 || ended.Load() != 0 {
			t.Errorf("slow %d, ended %d", slow.Load(), ended.Load())
		}
	})
}

func TestWhatAFailedWriteMeans(t *testing.T) {
	tests := map[string]struct {
		err        error
		full, ends bool
		is         error
	}{
		"full":             {fmt.Errorf("%w: x", raftfile.ErrFull), true, false, raftfile.ErrFull},
		"full, any store":  {syscall.ENOSPC, true, false, syscall.ENOSPC},
		"full at the sync": {fmt.Errorf("%w: %w", raftfile.ErrFailed, syscall.ENOSPC), false, true, ErrDiskFailed},
		"failed":           {syscall.EIO, false, true, ErrDiskFailed},
		"damaged":          {raftfile.ErrDamaged, false, true, ErrCorrupt},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := testWatch()
			var full, ends bool
			w.full, w.damaged = func() { full = true }, func(error) { ends = true }
			if err := w.write(func() error { return test.err }); !errors.Is(err, test.is) {
				t.Error(err)
			}
			if full != test.full || ends != test.ends {
				t.Errorf("full %v, ends %v", full, ends)
			}
		})
	}
}

func TestSlowDiskKeepsAPeerFromStandingForAWhile(t *testing.T) {
	var c candidacy
	now := time.Unix(1000, 0)
	if err := c.check(now, 0); err != nil {
		t.Error(err)
	}
	c.slowWrite(now)
	if err := c.check(now.Add(firstBan-1), 0); err == nil {
		t.Error("it stands at once")
	}
	if err := c.check(now.Add(1), banGrace); err != nil {
		t.Errorf("nobody else leads: %v", err)
	}
	if err := c.check(now.Add(firstBan), 0); err != nil {
		t.Error(err)
	}
	// Each one soon after doubles it.
	again := now.Add(time.Minute)
	c.slowWrite(again)
	if err := c.check(again.Add(2*firstBan-1), 0); err == nil {
		t.Error("the second ban is not longer")
	}
	for range 10 {
		c.slowWrite(again)
	}
	if err := c.check(again.Add(longestBan), 0); err != nil {
		t.Errorf("the ban has no end: %v", err)
	}
	late := again.Add(banMemory + time.Second)
	c.slowWrite(late)
	if err := c.check(late.Add(firstBan), 0); err != nil {
		t.Errorf("what was long ago still counts: %v", err)
	}
	c.setFull(true)
	if c.check(late.Add(time.Hour), 0) == nil {
		t.Error("it stands with a full disk")
	}
}

// fullStable is a stable store without room for n writes.
type fullStable struct {
	raft.StableStore
	left int
}

func (s *fullStable) SetUint64(key []byte, value uint64) error {
	if s.left > 0 {
		s.left--
		return syscall.ENOSPC
	}
	return s.StableStore.SetUint64(key, value)
}

func TestTermIsWrittenIntoTheSpaceThatIsKeptForIt(t *testing.T) {
	released := 0
	release := func() bool { released++; return released == 1 }
	inner := &fullStable{StableStore: raft.NewInmemStore(), left: 1}
	w := testWatch()
	ended := false
	w.damaged = func(error) { ended = true }
	s := &watchedStable{StableStore: inner, watch: w, release: release}
	if err := s.SetUint64([]byte("CurrentTerm"), 7); err != nil || released != 1 || ended {
		t.Fatalf("%v, released %d, ended %v", err, released, ended)
	}
	inner.left = 2
	if err := s.SetUint64([]byte("CurrentTerm"), 8); !errors.Is(err, ErrDiskFailed) || !ended {
		t.Errorf("%v, ended %v", err, ended)
	}
}

// brokenLogs has entries that cannot be read.
type brokenLogs struct{ raft.LogStore }

func (brokenLogs) GetLog(uint64, *raft.Log) error { return ErrCorrupt }

// brokenSnapshots has a snapshot that cannot be opened.
type brokenSnapshots struct{ raft.SnapshotStore }

func (brokenSnapshots) Open(string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	return nil, nil, ErrCorrupt
}

func TestRaftNeverSeesWhatWouldMakeItPanic(t *testing.T) {
	var stuck atomic.Bool
	l := &lastResort{
		LogStore: brokenLogs{}, StableStore: &fullStable{left: 9}, SnapshotStore: brokenSnapshots{}, stuck: &stuck,
	}
	calls := map[string]func() error{
		"an entry":   func() error { return l.GetLog(1, &raft.Log{}) },
		"the term":   func() error { return l.SetUint64([]byte("CurrentTerm"), 1) },
		"a snapshot": func() error { _, _, err := l.Open("x"); return err },
	}
	for name, call := range calls {
		if err := call(); err == nil {
			t.Errorf("%s: no error before raft runs", name)
		}
	}
	l.armed.Store(true)
	for name, call := range calls {
		ended, returned := make(chan struct{}), false
		go func() {
			defer close(ended)
			_ = call()
			returned = true
		}()
		<-ended
		if returned {
			t.Errorf("%s: raft goes on", name)
		}
	}
	if !stuck.Load() {
		t.Error("raft would be shut down while it waits for the state machine")
	}
}
