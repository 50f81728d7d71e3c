package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// dutyRetry is the pause after a failure of a leader that cannot be replaced.
const dutyRetry = time.Second

// lead runs the duties whenever this peer leads, until ctx ends.
func (p *Peer) lead(ctx context.Context, n *node) {
	leads := false
	for {
		if leads {
			leads = p.reign(ctx, n)
			continue
		}
		select {
		case <-ctx.Done():
			return
		case leads = <-n.raft.LeaderCh():
		}
	}
}

// reign is one leadership, from election to loss. It returns whether another
// one has begun already.
func (p *Peer) reign(ctx context.Context, n *node) (again bool) {
	ruleCtx, cancel := context.WithCancel(ctx)
	var duties errgroup.Group
	failed := make(chan struct{})
	duties.Go(func() error {
		err := p.rule(ruleCtx, n.raft)
		if err != nil {
			close(failed)
		}
		return err
	})
	end := func() {
		p.role.leads.Store(false)
		p.changed.notify()
		cancel()
	}
	defer func() {
		end()
		// The next leadership must not begin before the last has ended.
		if err := duties.Wait(); err != nil {
			p.log.Error("a duty of the leader failed", "error", err)
		}
	}()
	select {
	case <-ctx.Done():
		return false
	case leads := <-n.raft.LeaderCh():
		return leads
	case <-failed:
	}
	end()
	if again, lost := p.resign(ctx, n); lost {
		return again
	}
	// Nobody else can lead.
	return pause(ctx, dutyRetry, nil) && n.raft.State() == raft.Leader
}

// rule makes this peer serve as the leader and runs the duties. It returns nil
// when leadership or ctx ended, or when all duties are done.
func (p *Peer) rule(ctx context.Context, r *raft.Raft) error {
	if err := p.commitEarlier(ctx, r); err != nil {
		if ctx.Err() != nil || errors.Is(err, raft.ErrLeadershipLost) || errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrRaftShutdown) {
			return nil
		}
		return fmt.Errorf("wait for what was committed before: %w", err)
	}
	p.log.Info("this peer leads", "term", r.CurrentTerm())
	p.role.leads.Store(true)
	p.changed.notify()
	group, gctx := errgroup.WithContext(ctx)
	for _, duty := range append([]Duty{p.membershipDuty, p.incarnationDuty, p.diskDuty}, p.duties...) {
		group.Go(func() error { return duty(gctx) })
	}
	err := group.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// resign hands leadership to another peer, or else falls silent until the
// others have elected one. It reports whether leadership was lost and, if so,
// whether it was won again.
func (p *Peer) resign(ctx context.Context, n *node) (again, lost bool) {
	err := p.handOver(ctx, n.raft)
	if errors.Is(err, raft.ErrLeadershipTransferInProgress) {
		// Duties fail while somebody else hands leadership over: that must not be
		// disturbed. Raft gives it up after an election timeout.
		if again, lost := p.awaitLoss(ctx, n, 2*p.cfg.Timers.Heartbeat); lost {
			return again, true
		}
		err = p.handOver(ctx, n.raft)
	}
	if err != nil {
		p.log.Warn("leadership was not handed over, falling silent", "error", err)
		n.guard.seal()
		defer n.guard.unseal()
	}
	return p.awaitLoss(ctx, n, 10*p.cfg.Timers.Heartbeat)
}

// awaitLoss waits until leadership is lost, and reports whether it was and, if
// so, whether it was won again.
func (p *Peer) awaitLoss(ctx context.Context, n *node, limit time.Duration) (again, lost bool) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, true
	case leads := <-n.raft.LeaderCh():
		return leads, true
	case <-timer.C:
		return false, false
	}
}

// handOver gives leadership to another voter, the most up-to-date one unless it
// might be one that is dead, or has a full disk.
func (p *Peer) handOver(ctx context.Context, r *raft.Raft) error {
	var live []raft.Server
	all := true
	for _, s := range p.servers() {
		id := string(s.ID)
		if id == p.cfg.ID || s.Suffrage != raft.Voter {
			continue
		}
		if p.isAlive(id) && !p.role.contacts.isLost(id) && !p.toldFull(id) {
			live = append(live, s)
		} else {
			all = false
		}
	}
	switch {
	case len(live) == 0:
		return errors.New("no other voter is alive and has room on its disk")
	case all:
		return p.flights.await(ctx, r.LeadershipTransfer())
	default:
		return p.flights.await(ctx, r.LeadershipTransferToServer(live[0].ID, raft.ServerAddress(p.recordedAddress(string(live[0].ID)))))
	}
}

// contacts is which followers the leader reaches, and which it does not.
type contacts struct {
	mu   sync.Mutex
	lost map[string]bool
	// steady is since when those that are not lost have been in touch.
	steady map[string]time.Time
}

// begin takes in that heartbeats to a follower begin or end.
func (c *contacts) begin(id string, removed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(id, !removed)
}

// beat takes in what became of a heartbeat, and reports whether that is news.
func (c *contacts) beat(id string, reached bool) (news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, steady := c.steady[id]; steady == reached {
		return false
	}
	c.put(id, reached)
	return true
}

func (c *contacts) put(id string, reached bool) {
	c.lost[id] = !reached
	if reached {
		c.steady[id] = time.Now()
	} else {
		delete(c.steady, id)
	}
}

// steadySince returns since when the leader has reached a follower without
// interruption; zero when it does not.
func (c *contacts) steadySince(id string) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steady[id]
}

func (c *contacts) isLost(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost[id]
}

// observe follows what Raft tells about itself, until ctx ends.
func (p *Peer) observe(ctx context.Context, n *node) {
	r := n.raft
	seen := make(chan raft.Observation, 256)
	observer := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState, raft.PeerObservation:
			return true
		}
		return false
	})
	r.RegisterObserver(observer)
	defer r.DeregisterObserver(observer)
	last := ""
	for {
		last = p.noteLeader(r, last)
		select {
		case <-ctx.Done():
			return
		case o := <-seen:
			p.note(o)
			n.logs.wake()
		}
	}
}

// note takes in one observation and wakes whoever waits for it.
func (p *Peer) note(o raft.Observation) {
	if data, ok := o.Data.(raft.PeerObservation); ok {
		p.role.contacts.begin(string(data.Peer.ID), data.Removed)
	}
	p.changed.notify()
}

// beat takes in whether a heartbeat got through to a follower. What hashicorp/raft
// tells of failed and resumed heartbeats is not enough: when a follower is removed
// and added again, the last failure of the old one may come after the new one has
// begun, which never fails and so never resumes.
func (p *Peer) beat(id raft.ServerID, reached bool) {
	if p.role.contacts.beat(string(id), reached) {
		p.changed.notify()
	}
}

// noteLeader keeps how long there has been no leader, and returns the last leader.
func (p *Peer) noteLeader(r *raft.Raft, last string) string {
	_, id := r.LeaderWithID()
	leader := string(id)
	switch {
	case leader == "":
		p.role.leaderless.CompareAndSwap(0, time.Now().UnixNano())
		return last
	case leader != last:
		p.metrics.leaderChanges.Inc()
		p.log.Info("new leader", "leader", leader, "term", r.CurrentTerm())
	}
	p.role.leaderless.Store(0)
	p.role.outside.Store(false)
	p.announce(func(meta *pb.PeerMetadata) { meta.Bootstrapped = true })
	return leader
}
