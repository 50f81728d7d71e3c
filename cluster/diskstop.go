package cluster

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
	"github.com/wasmatrix/wasmatrix/fsm"
)

// diskState is what a peer knows of its disk.
type diskState struct {
	// space is nil when the stores were injected.
	space     atomic.Pointer[diskSpace]
	candidacy candidacy
	// ruined is set when this peer must stop because of its disk, stuck when Raft cannot be ended either.
	ruined, stuck atomic.Bool
	// hanging counts the writes that exceed the limit at this moment.
	hanging atomic.Int32
}

// watchDisk connects the watch of the disk with what a peer does about it.
func (p *Peer) watchDisk(g *guard) *diskWatch {
	watch := &diskWatch{limit: p.cfg.Timers.DiskLimit, dead: max(p.cfg.Timers.DiskDead, p.cfg.Timers.DiskLimit)}
	watch.slow = func() {
		p.log.Error("a write to the disk hangs, this peer stops acting as a leader", "limit", watch.limit)
		p.disk.candidacy.slowWrite(time.Now())
		g.seal()
		p.disk.hanging.Add(1)
		p.changed.notify()
	}
	watch.recovered = func() {
		p.log.Warn("the disk can be written to again")
		p.disk.hanging.Add(-1)
		g.unseal()
	}
	watch.damaged = func(err error) {
		g.seal()
		p.disk.ruined.Store(true)
		p.fail(p.advise(err))
	}
	watch.full = func() {
		if space := p.disk.space.Load(); space != nil {
			space.setFull(true)
		}
		p.tellFull(true)
	}
	g.stand = func() error {
		var leaderless time.Duration
		if since := p.role.leaderless.Load(); since != 0 {
			leaderless = time.Since(time.Unix(0, since))
		}
		return p.disk.candidacy.check(time.Now(), leaderless)
	}
	return watch
}

// tellFull takes in whether the disk is full: what waits for this peer to lead wants to know.
func (p *Peer) tellFull(full bool) {
	if p.disk.candidacy.setFull(full) {
		p.changed.notify()
	}
}

// holePause is what a log that is being changed gets before it counts as having a hole.
const holePause = 10 * time.Millisecond

// isHole reports whether the log lacks an entry that was not applied yet and that
// Raft counts on. This peer stops then: what it would do next is panic.
func (p *Peer) isHole(logs *parallelLogs, index uint64) bool {
	r := p.raft.Load()
	counts := func() bool {
		return r != nil && !logs.cleared.Load() && r.AppliedIndex() < index && index <= r.LastIndex()
	}
	if !counts() {
		return false
	}
	<-time.After(holePause)
	var entry raft.Log
	if !counts() || logs.GetLog(index, &entry) == nil {
		return false
	}
	first, _ := logs.FirstIndex()
	last, _ := logs.LastIndex()
	p.fail(p.advise(fmt.Errorf("%w: entry %d is not in the log (%d to %d on disk); %d are applied, %d should be there, the snapshot is at %s",
		ErrDiskFailed, index, first, last, r.AppliedIndex(), r.LastIndex(), r.Stats()["last_snapshot_index"])))
	return true
}

// startRaft starts Raft. hashicorp/raft panics when it cannot write its term or read the log.
func (p *Peer) startRaft(stores *lastResort, transport raft.Transport) (r *raft.Raft, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			r, err = nil, fmt.Errorf("start raft: %w: %v", ErrDiskFailed, reason)
		}
	}()
	r, err = raft.NewRaft(p.cfg.raftConfig(), fsm.NewRaftFSM(p.state, p.fail), stores, stores, stores, transport)
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	stores.armed.Store(true)
	return r, nil
}

// abandonWait is how long a peer without a disk waits for Raft to end.
const abandonWait = time.Second

// abandon ends a peer whose disk is gone: it has fallen silent already, and
// waits for nothing that needs the disk.
func (p *Peer) abandon(ctx context.Context, n *node) error {
	if p.disk.stuck.Load() {
		return errors.Join(errHanging, n.guard.Close())
	}
	limit, cancel := context.WithTimeout(ctx, abandonWait)
	defer cancel()
	if err := p.flights.await(limit, n.raft.Shutdown()); err != nil {
		return errors.Join(errHanging, n.guard.Close())
	}
	if err := p.flights.await(limit, futureFunc(n.storage.close)); err != nil {
		return errors.Join(errHanging, err)
	}
	return nil
}

// advise adds to an error of the disk what to do about it.
func (p *Peer) advise(err error) error {
	dir := raftDir(p.cfg.DataDir)
	switch {
	case errors.Is(err, ErrCorrupt):
		return fmt.Errorf("%w\nnothing in %s is used any more. When other peers of this cluster run: `mv %s %s` and start this peer again; "+
			"it gets everything from them. When it was the only peer: do the same, and then `wasmatrix cluster snapshot restore FILE` with the last saved snapshot. See \"When a disk fails\" in docs/operations.md",
			err, dir, dir, filepath.Join(p.cfg.DataDir, "raft.damaged"))
	case errors.Is(err, ErrDiskHangs):
		return fmt.Errorf("%w\nthis process ends, because what it waits for cannot be undone: look at the disk of %s, then start this peer again", err, dir)
	case errors.Is(err, ErrDiskFailed):
		return fmt.Errorf("%w\nwhat %s holds is not known before it has been read again: look at the disk, then start this peer again; it checks its files and goes on, or says what is damaged", err, dir)
	case errors.Is(err, raftfile.ErrInUse):
		return fmt.Errorf("%w\na peer runs on %s already", err, p.cfg.DataDir)
	default:
		return err
	}
}
