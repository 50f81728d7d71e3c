package cluster

import (
	"errors"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/internal/plant"
)

const (
	// maxUnsynced is how many entries wait for the leader's own disk at most.
	maxUnsynced = 1024
	// spaceRetry is how long a write waits for room on a full disk before it tries again.
	spaceRetry = 100 * time.Millisecond
)

// parallelLogs lets a leader write entries to its own disk while it sends them
// to the followers, and not before (Ongaro, Consensus: Bridging Theory and
// Practice, section 10.2.1). Raft counts the leader's own copy at once, so what
// it counts on besides must wait for it: the caller holds the answer of every
// follower back until synced says that the leader has the entries too, and no
// quorum is without one follower, because a single voter writes as usual. What
// has been committed is therefore on the leader's disk and on a quorum.
//
// Everyone but a leader writes as usual. A deposed leader may have entries in
// memory only; it holds back its own answers until synced returns.
type parallelLogs struct {
	raft.LogStore
	// shared reports whether this peer leads and no quorum consists of it alone.
	shared func() bool
	// broken is called once when a write failed for good.
	broken func(error)

	mu      sync.Mutex
	changed sync.Cond
	// unsynced are entries that are not on disk yet, without a gap.
	unsynced []*raft.Log
	writing  bool
	failure  error

	// cleared is set while the end of the log was deleted and nothing was stored
	// in its place yet.
	cleared atomic.Bool
}

func newParallelLogs(inner raft.LogStore, shared func() bool, broken func(error)) *parallelLogs {
	p := &parallelLogs{LogStore: inner, shared: shared, broken: broken}
	p.changed.L = &p.mu
	return p
}

// StoreLog stores one entry.
func (p *parallelLogs) StoreLog(entry *raft.Log) error { return p.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries: in the background for a leader with followers that
// vote, else before it returns. A change of the configuration is always stored
// first, because it can make this peer the only voter.
func (p *parallelLogs) StoreLogs(entries []*raft.Log) error {
	configures := slices.ContainsFunc(entries, func(e *raft.Log) bool { return e.Type == raft.LogConfiguration })
	if configures || !p.shared() && !plant.On(plant.UnsyncedAcknowledgement) {
		return p.store(entries)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.unsynced) >= maxUnsynced && p.failure == nil {
		p.changed.Wait()
	}
	if p.failure != nil {
		return p.failure
	}
	p.unsynced = append(p.unsynced, entries...)
	if !p.writing {
		p.writing = true
		go p.write()
	}
	return nil
}

// store stores entries. When it has cleared the end of the log for them it returns
// only once they are stored: hashicorp/raft goes on to believe in the entries that
// are gone, would refuse all that come in their place, and panic when it is told
// that they are committed. On a full disk it waits for room, and otherwise ends the
// goroutine of Raft, which is the caller's: this peer has been told to stop.
func (p *parallelLogs) store(entries []*raft.Log) error {
	err := p.synced()
	if err == nil {
		err = p.LogStore.StoreLogs(entries)
	}
	if !p.cleared.Load() {
		return err
	}
	for isFull(err) {
		<-time.After(spaceRetry)
		err = p.LogStore.StoreLogs(entries)
	}
	if err != nil {
		p.broken(err)
		goruntime.Goexit()
	}
	p.cleared.Store(false)
	return nil
}

// write writes what is unsynced until nothing is.
func (p *parallelLogs) write() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.unsynced) > 0 {
		batch := p.unsynced[:min(len(p.unsynced), maxAppendEntries)]
		p.mu.Unlock()
		err := p.LogStore.StoreLogs(batch)
		for isFull(err) {
			// The disk watch takes leadership away meanwhile; the entries may
			// still be committed by others, so they are not dropped.
			<-time.After(spaceRetry)
			err = p.LogStore.StoreLogs(batch)
		}
		p.mu.Lock()
		if err != nil {
			p.failure = err
			p.broken(err)
			break
		}
		p.unsynced = p.unsynced[len(batch):]
		p.changed.Broadcast()
	}
	if len(p.unsynced) == 0 {
		p.unsynced = nil
	}
	p.writing = false
	p.changed.Broadcast()
}

// errDeposed answers for a leader that leads no more.
var errDeposed = errors.New("this peer does not lead in that term any more")

// synced waits until all entries that were given before are on disk. It fails
// when they never will be.
func (p *parallelLogs) synced() error { return p.syncedWhile(always) }

// syncedWhile is synced, but fails with errDeposed when leads returns false
// meanwhile; wake has it look.
func (p *parallelLogs) syncedWhile(leads func() bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.unsynced) == 0 || plant.On(plant.UnsyncedAcknowledgement) {
		return p.failure
	}
	last := p.unsynced[len(p.unsynced)-1].Index
	for p.failure == nil && len(p.unsynced) > 0 && p.unsynced[0].Index <= last {
		if !leads() {
			return errDeposed
		}
		p.changed.Wait()
	}
	return p.failure
}

// wake tells those who wait that this peer may have stopped leading.
func (p *parallelLogs) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.changed.Broadcast()
}

// GetLog reads an entry.
func (p *parallelLogs) GetLog(index uint64, entry *raft.Log) error {
	p.mu.Lock()
	if n := len(p.unsynced); n > 0 && index >= p.unsynced[0].Index && index <= p.unsynced[n-1].Index {
		*entry = *p.unsynced[index-p.unsynced[0].Index]
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	return p.LogStore.GetLog(index, entry)
}

// FirstIndex returns the index of the first entry, 0 without any.
func (p *parallelLogs) FirstIndex() (uint64, error) {
	if err := p.synced(); err != nil {
		return 0, err
	}
	return p.LogStore.FirstIndex()
}

// LastIndex returns the index of the last entry, 0 without any.
func (p *parallelLogs) LastIndex() (uint64, error) {
	p.mu.Lock()
	if n := len(p.unsynced); n > 0 {
		last := p.unsynced[n-1].Index
		p.mu.Unlock()
		return last, nil
	}
	p.mu.Unlock()
	return p.LogStore.LastIndex()
}

// DeleteRange deletes entries.
func (p *parallelLogs) DeleteRange(first, last uint64) error {
	if err := p.synced(); err != nil {
		return err
	}
	end, err := p.LogStore.LastIndex()
	if err != nil {
		return err
	}
	if last < end {
		return p.LogStore.DeleteRange(first, last)
	}
	p.cleared.Store(true)
	err = p.LogStore.DeleteRange(first, last)
	if err != nil {
		p.cleared.Store(false)
	}
	return err
}
