package cluster

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
)

var (
	// ErrDiskHangs is wrapped by the error of Run when a write did not return.
	// What holds the files cannot be undone: the process must end.
	ErrDiskHangs = errors.New("the disk hangs")
	// ErrDiskFailed is wrapped by the error of Run when a write failed, and with
	// it what may be on the disk is unknown. Started again, the peer reads and checks all of it.
	ErrDiskFailed = errors.New("the disk failed")
)

// IsDiskFailure reports whether Run ended because of its disk: it hangs, it
// failed, or what is on it is damaged.
func IsDiskFailure(err error) bool {
	return errors.Is(err, ErrDiskHangs) || errors.Is(err, ErrDiskFailed) || errors.Is(err, ErrCorrupt)
}

// isFull reports whether a write found no room and changed nothing.
func isFull(err error) bool {
	return errors.Is(err, raftfile.ErrFull) || errors.Is(err, syscall.ENOSPC) && !errors.Is(err, raftfile.ErrFailed)
}

// diskWatch notices writes that take too long, that fail, and damage.
type diskWatch struct {
	// limit is how long a write may take before slow is called, dead how long
	// before the peer must end; 0 means for ever.
	limit, dead time.Duration
	// slow is called when a write exceeds the limit, recovered when that write returned.
	slow, recovered func()
	// damaged is called once, with the first error after which this peer must stop.
	damaged func(error)
	// full is called when a write found no room; nil for nothing.
	full func()
	once sync.Once
	// wrote is when the last write returned, in Unix nanoseconds.
	wrote atomic.Int64
}

// write runs one write under watch. A failure other than a full disk is the end
// of this peer: nobody knows what is on the disk then.
func (w *diskWatch) write(f func() error) error {
	err := w.timed(w.limit, f)
	switch {
	case err == nil:
		return nil
	case isFull(err):
		if w.full != nil {
			w.full()
		}
		return err
	case errors.Is(err, raftfile.ErrDamaged):
		return w.ruin(fmt.Errorf("%w: %w", ErrCorrupt, err))
	default:
		return w.ruin(fmt.Errorf("%w: %w", ErrDiskFailed, err))
	}
}

// timed runs f and tells when it takes longer than limit, and again when it never seems to end.
func (w *diskWatch) timed(limit time.Duration, f func() error) error {
	defer w.begin(limit)()
	return f()
}

// begin watches one write; call what it returns when the write returned.
func (w *diskWatch) begin(limit time.Duration) func() {
	var mu sync.Mutex
	var last *time.Timer // guarded by mu
	done := false        // guarded by mu
	fired := make(chan struct{})
	first := time.AfterFunc(limit, func() {
		w.slow()
		if w.dead > 0 {
			mu.Lock()
			if !done {
				last = time.AfterFunc(max(w.dead-limit, 0), func() {
					_ = w.ruin(fmt.Errorf("%w: a write has not returned for %s", ErrDiskHangs, max(w.dead, limit)))
				})
			}
			mu.Unlock()
		}
		close(fired)
	})
	return func() {
		w.wrote.Store(time.Now().UnixNano())
		if first.Stop() {
			return
		}
		mu.Lock()
		done = true
		if last != nil {
			last.Stop()
		}
		mu.Unlock()
		<-fired
		w.recovered()
	}
}

// idle reports whether no write has returned for d.
func (w *diskWatch) idle(d time.Duration) bool {
	return time.Since(time.Unix(0, w.wrote.Load())) >= d
}

// ruin makes this peer stop.
func (w *diskWatch) ruin(err error) error {
	w.once.Do(func() { w.damaged(err) })
	return err
}

// lastResort is the storage as hashicorp/raft sees it. Raft panics when it cannot
// read an entry that it must apply, or cannot write its term. By then this peer
// has been told to stop; so the goroutine of Raft that asked ends instead, with
// what it has deferred, and nothing is acted upon any more. A leader that ends so
// sends nothing more and answers the calls it has taken.
type lastResort struct {
	raft.LogStore
	raft.StableStore
	raft.SnapshotStore
	// armed is set once Raft runs on goroutines of its own: before, its
	// goroutine is the caller's, and errors are returned.
	armed atomic.Bool
	// stuck is set when Raft would wait for that goroutine and panic once it is shut down.
	stuck *atomic.Bool
	// isHole reports whether an entry that was not found must be there, and makes
	// this peer stop then.
	isHole func(index uint64) bool
}

func (l *lastResort) end() {
	if l.armed.Load() {
		runtime.Goexit()
	}
}

// GetLog reads an entry.
func (l *lastResort) GetLog(index uint64, entry *raft.Log) error {
	err := l.LogStore.GetLog(index, entry)
	if err != nil && (!errors.Is(err, raft.ErrLogNotFound) || l.armed.Load() && l.isHole(index)) {
		l.end()
	}
	return err
}

// SetUint64 writes the term, or that of a vote.
func (l *lastResort) SetUint64(key []byte, value uint64) error {
	err := l.StableStore.SetUint64(key, value)
	if err != nil {
		l.end()
	}
	return err
}

// Open opens a snapshot. Raft calls it on the goroutine of the state machine,
// and waits for that for good, or to send it to a follower.
func (l *lastResort) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, source, err := l.SnapshotStore.Open(id)
	if err != nil && errors.Is(err, ErrCorrupt) {
		l.stuck.Store(true)
		l.end()
	}
	return meta, source, err
}

const (
	// firstBan is how long a peer does not stand for election after a write that
	// exceeded the limit; each one after it within banMemory doubles it, up to longestBan.
	firstBan   = 15 * time.Second
	longestBan = 4 * time.Minute
	banMemory  = 10 * time.Minute
	// banGrace is how long there must have been no leader until even a peer with
	// a slow disk stands: a slow leader is better than none.
	banGrace = 3 * time.Second
)

var errNoCandidate = errors.New("the disk of this peer was too slow a moment ago: it does not stand for election")

// candidacy keeps a peer with a slow or full disk from being elected again at
// once, just to lose leadership again.
type candidacy struct {
	mu    sync.Mutex
	until time.Time
	ban   time.Duration
	last  time.Time
	full  bool
}

func (c *candidacy) slowWrite(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ban *= 2; c.ban == 0 || now.Sub(c.last) > banMemory {
		c.ban = firstBan
	}
	c.ban = min(c.ban, longestBan)
	c.last, c.until = now, now.Add(c.ban)
}

// setFull takes in whether the disk is full, and reports whether that is news.
func (c *candidacy) setFull(full bool) (news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	news, c.full = c.full != full, full
	return news
}

// check returns why this peer should not stand, given since when there is no leader.
func (c *candidacy) check(now time.Time, leaderless time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if (now.Before(c.until) || c.full) && leaderless < banGrace {
		return errNoCandidate
	}
	return nil
}
