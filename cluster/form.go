package cluster

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	firstJoinRetry = 100 * time.Millisecond
	// waitingLog is how often a peer that waits for others says so.
	waitingLog = 5 * time.Second
	// catchUpPoll is how often a joining peer looks whether it has caught up.
	catchUpPoll = 20 * time.Millisecond
	// joinLimit bounds one call of a joining peer.
	joinLimit = 15 * time.Second
	// askLimit bounds a question to another peer that must not hold up anything.
	askLimit = 2 * time.Second
	// voteRetries is how often, in the stabilization time, a peer asks for its vote.
	voteRetries = 8
)

// step is what a peer without a past does next.
type step int

const (
	stepWait step = iota
	stepBootstrap
	stepJoin
)

// planStart decides from what gossip shows what a peer without a past does. The
// reason is for people.
func planStart(cfg Config, members []gossip.Member) (next step, servers []raft.Server, reason string) {
	var ids, strangers []string
	var others bool
	for _, m := range members {
		meta := m.Metadata
		self := meta.GetPeerId() == cfg.ID
		switch {
		case !m.Alive:
			continue
		case meta.GetBootstrapped() && !self:
			return stepJoin, nil, fmt.Sprintf("peer %s belongs to a cluster already", meta.GetPeerId())
		case meta.GetBootstrapExpect() == 0:
			others = others || !self
			continue
		}
		others = others || !self
		if int(meta.GetBootstrapExpect()) != cfg.BootstrapExpect {
			strangers = append(strangers, fmt.Sprintf("%s expects %d", meta.GetPeerId(), meta.GetBootstrapExpect()))
			continue
		}
		ids = append(ids, meta.GetPeerId())
		servers = append(servers, raft.Server{
			Suffrage: raft.Voter, ID: raft.ServerID(meta.GetPeerId()), Address: raft.ServerAddress(meta.GetRaftAddress()),
		})
	}
	expect, have := cfg.BootstrapExpect, strings.Join(ids, ", ")
	switch {
	case expect == 0:
		return stepWait, nil, "waiting for a cluster to join: no live member belongs to one"
	case len(strangers) > 0:
		return stepWait, nil, fmt.Sprintf("bootstrap_expect differs: here it is %d, but %s", expect, strings.Join(strangers, ", "))
	case len(ids) > expect:
		return stepWait, nil, fmt.Sprintf("bootstrap_expect is %d, but %d peers have it: %s; stop some or change it", expect, len(ids), have)
	case len(ids) < expect:
		return stepWait, nil, fmt.Sprintf("waiting for %d peers, have %d: %s", expect, len(ids), have)
	case expect == 1 && !others && !cfg.alone():
		// The others may have a cluster that this peer has forgotten.
		return stepWait, nil, "waiting for an answer from one of the join addresses"
	}
	return stepBootstrap, servers, fmt.Sprintf("all %d peers are here: %s", expect, have)
}

// settle makes a peer without a past part of a cluster, and then watches that
// it stays part of it, until ctx ends.
func (p *Peer) settle(ctx context.Context, n *node) error {
	if n.settle {
		if err := p.form(ctx, n); err != nil {
			return err
		}
	}
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error { p.rise(gctx, n); return nil })
	group.Go(func() error { p.stay(gctx, n); return nil })
	return group.Wait()
}

// form bootstraps or joins. It returns when this peer has its place, or ctx ended.
func (p *Peer) form(ctx context.Context, n *node) error {
	retry := firstJoinRetry
	var said string
	var saidAt time.Time
	for ctx.Err() == nil {
		changed := p.changed.wait()
		next, servers, reason := planStart(p.cfg, p.known())
		if reason != said || time.Since(saidAt) > waitingLog {
			said, saidAt = reason, time.Now()
			p.log.Info("forming a cluster", "state", reason)
		}
		if next == stepBootstrap {
			done, err := p.bootstrap(n, servers)
			if done || err != nil {
				return err
			}
			next = stepJoin
		}
		if next == stepWait {
			pause(ctx, waitingLog, changed)
			continue
		}
		led := p.led()
		err := p.join(ctx, n)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		p.log.Info("not joined yet", "error", err, "retry", retry)
		if p.lull(ctx, retry, led) {
			retry = firstJoinRetry
			continue
		}
		retry = min(2*retry, p.cfg.Timers.JoinRetry)
	}
	return nil
}

func (p *Peer) led() bool {
	leader, _ := p.Leader()
	return leader != ""
}

// lull waits for d. It ends sooner, and reports true, when somebody leads and
// nobody did before: until this peer has joined the others cannot afford to lose
// another one.
func (p *Peer) lull(ctx context.Context, d time.Duration, led bool) (leader bool) {
	for until := time.Now().Add(d); ; {
		changed := p.changed.wait()
		now := p.led()
		if now && !led {
			return true
		}
		led = now
		left := time.Until(until)
		if left <= 0 || !pause(ctx, left, changed) {
			return false
		}
	}
}

// bootstrap writes the first configuration. It reports false when Raft has
// state by now: another peer was faster, so this one has to join.
func (p *Peer) bootstrap(n *node, servers []raft.Server) (bool, error) {
	err := n.raft.BootstrapCluster(raft.Configuration{Servers: servers}).Error()
	switch {
	case err == nil:
		p.log.Info("bootstrapped a cluster", "servers", fmt.Sprint(servers))
	case errors.Is(err, raft.ErrCantBootstrap) && n.raft.LastIndex() == 1:
		// A crash came between the bootstrap and the mark.
	case errors.Is(err, raft.ErrCantBootstrap):
		return false, nil
	case errors.Is(err, raft.ErrRaftShutdown):
		return true, nil
	default:
		return false, fmt.Errorf("bootstrap: %w", err)
	}
	return true, p.settled(n)
}

// settled lets this peer vote, now and after a restart.
func (p *Peer) settled(n *node) error {
	if err := n.storage.markUnsettled(0); err != nil {
		return err
	}
	p.role.mayVote.Store(true)
	return nil
}

// join asks a peer of the cluster to be added, and catches up. Any error is worth
// another try.
func (p *Peer) join(ctx context.Context, n *node) error {
	index, err := p.askToJoin(ctx)
	if err != nil {
		return err
	}
	if err := p.catchUp(ctx, n, index); err != nil {
		return err
	}
	// What this peer promised before it lost its disk does not count any more:
	// the entry that says so is applied here.
	if err := p.settled(n); err != nil {
		return err
	}
	p.log.Info("joined the cluster", "index", index)
	p.changed.notify()
	return nil
}

// rise asks to become a voter as long as this peer shall be one and is none,
// until ctx ends.
func (p *Peer) rise(ctx context.Context, n *node) {
	said := ""
	for ctx.Err() == nil {
		changed := p.changed.wait()
		leader, _ := p.Leader()
		suffrage, member := p.suffrage(p.cfg.ID)
		if p.cfg.NonVoter || leader == "" || !member || suffrage == raft.Voter {
			pause(ctx, waitingLog, changed)
			continue
		}
		err := p.askForVote(ctx, n)
		switch {
		case err == nil:
			p.log.Info("this peer votes now")
			continue
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			p.log.Info("this peer does not vote yet", "reason", said)
		}
		pause(ctx, max(p.cfg.Timers.Stabilization/voteRetries, catchUpPoll), nil)
	}
}

// askToJoin asks the members that have a history, one after the other; each of
// them forwards to the leader.
func (p *Peer) askToJoin(ctx context.Context) (uint64, error) {
	self, ok := p.member(p.cfg.ID)
	if !ok {
		return 0, errors.New("gossip does not know this peer yet")
	}
	err := errors.New("no live member belongs to a cluster")
	for _, m := range p.known() {
		if !m.Alive || !m.Metadata.GetBootstrapped() || m.Metadata.GetPeerId() == p.cfg.ID {
			continue
		}
		var resp *pb.JoinResponse
		asked := p.ask(ctx, joinLimit, m.Metadata.GetApiAddress(), func(ctx context.Context, c pb.ClusterServiceClient) (err error) {
			resp, err = c.Join(ctx, &pb.JoinRequest{
				PeerId: p.cfg.ID, RaftAddress: self.Metadata.GetRaftAddress(), ApiAddress: p.cfg.APIAdvertise, NonVoter: p.cfg.NonVoter,
				ClusterId: p.incarnation.String(),
			})
			return err
		})
		if asked == nil {
			return resp.GetIndex(), nil
		}
		err = errors.Join(err, fmt.Errorf("ask %s to join: %w", m.Metadata.GetPeerId(), asked))
	}
	return 0, err
}

// catchUp waits until index is applied here, for as long as there is a leader
// that can send it.
func (p *Peer) catchUp(ctx context.Context, n *node, index uint64) error {
	for n.raft.AppliedIndex() < index {
		since := p.role.leaderless.Load()
		if since != 0 && time.Since(time.Unix(0, since)) > joinLimit {
			return fmt.Errorf("no leader sent what is missing: applied %d of %d", n.raft.AppliedIndex(), index)
		}
		if !pause(ctx, catchUpPoll, nil) {
			return ctx.Err()
		}
	}
	return nil
}

// askForVote catches up with the leader's commit index and asks to be promoted.
func (p *Peer) askForVote(ctx context.Context, n *node) error {
	leader, address := p.Leader()
	if leader == "" || address == "" {
		return errors.New("no leader to ask for a vote")
	}
	var status *pb.StatusResponse
	err := p.ask(ctx, joinLimit, address, func(ctx context.Context, c pb.ClusterServiceClient) (err error) {
		status, err = c.Status(ctx, &pb.StatusRequest{})
		return err
	})
	if err != nil {
		return fmt.Errorf("ask %s for its commit index: %w", leader, err)
	}
	if err := p.catchUp(ctx, n, status.GetCommitIndex()); err != nil {
		return err
	}
	var promoted *pb.PromoteResponse
	err = p.ask(ctx, joinLimit, address, func(ctx context.Context, c pb.ClusterServiceClient) (err error) {
		promoted, err = c.Promote(ctx, &pb.PromoteRequest{PeerId: p.cfg.ID})
		return err
	})
	if err != nil {
		return fmt.Errorf("ask %s to be promoted: %w", leader, err)
	}
	return p.catchUp(ctx, n, promoted.GetIndex())
}

// ask makes one call of another peer's ClusterService.
func (p *Peer) ask(ctx context.Context, limit time.Duration, address string, call func(context.Context, pb.ClusterServiceClient) error) error {
	conn, err := p.dial(address)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return call(ctx, pb.NewClusterServiceClient(conn))
}

// stay notices when the others do not count this peer in any more, until ctx
// ends. A peer that lost its place before it had it for a while joins again; one
// that had it was removed on purpose, or for being dead too long: it says so and
// stays out, also after a restart, until it forgets its past. A last message of
// the leader to a peer that it has just removed is no place.
func (p *Peer) stay(ctx context.Context, n *node) {
	// It has had its place before it was started this time.
	p.role.settled.Store(!n.settle)
	grace := max(8*p.cfg.Timers.Heartbeat, time.Second)
	var led time.Time
	for ctx.Err() == nil {
		changed := p.changed.wait()
		since := p.role.leaderless.Load()
		if since == 0 {
			if led.IsZero() {
				led = time.Now()
			}
			again := grace - time.Since(led)
			if again <= 0 {
				p.role.settled.Store(true)
				again = time.Hour
			}
			pause(ctx, again, changed)
			continue
		}
		led = time.Time{}
		if left := grace - time.Since(time.Unix(0, since)); left > 0 {
			pause(ctx, left, changed)
			continue
		}
		if p.isOutside(ctx) {
			p.outside(ctx, n)
		}
		pause(ctx, grace, changed)
	}
}

func (p *Peer) outside(ctx context.Context, n *node) {
	if !p.role.settled.Load() {
		p.log.Warn("the cluster does not count this peer in any more, joining again")
		if err := p.join(ctx, n); err != nil && ctx.Err() == nil {
			p.log.Warn("not joined yet", "error", err)
		}
		return
	}
	if !p.role.outside.Swap(true) {
		p.log.Error("this peer was removed from the cluster, by an operator or because it was dead for longer than dead_peer_after, and is not let in again",
			"try", p.backIn())
		p.changed.notify()
	}
}

// backIn says how a removed peer gets back into the cluster.
func (p *Peer) backIn() string {
	return fmt.Sprintf("to add it again, stop it, remove the directory %s and start it: it joins as a new peer; else stop it for good",
		filepath.Join(p.cfg.DataDir, "raft"))
}

// isOutside asks the live members whether the cluster has a leader and does not
// count this peer in.
func (p *Peer) isOutside(ctx context.Context) bool {
	for _, m := range p.known() {
		if !m.Alive || m.Metadata.GetPeerId() == p.cfg.ID {
			continue
		}
		status, err := p.askStatus(ctx, m.Metadata.GetApiAddress())
		if err != nil || status.GetLeaderId() == "" || len(status.GetPeers()) == 0 {
			continue
		}
		for _, peer := range status.GetPeers() {
			if peer.GetId() == p.cfg.ID {
				return false
			}
		}
		return true
	}
	return false
}

func (p *Peer) askStatus(ctx context.Context, address string) (*pb.StatusResponse, error) {
	var status *pb.StatusResponse
	err := p.ask(ctx, askLimit, address, func(ctx context.Context, c pb.ClusterServiceClient) (err error) {
		status, err = c.Status(ctx, &pb.StatusRequest{})
		return err
	})
	return status, err
}
