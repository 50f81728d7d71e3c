package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// membershipActor is named as the actor of this duty's commands.
	membershipActor = "duty/membership"
	// membershipRetry is how long after a failure the duty looks again.
	membershipRetry = time.Second
	// configLimit bounds how long a change of the Raft configuration waits for the one before.
	configLimit = 10 * time.Second
)

// membershipDuty keeps the registry's peers equal to the Raft configuration,
// with their present addresses, and removes peers that have been dead for long.
func (p *Peer) membershipDuty(ctx context.Context) error {
	dead := map[string]time.Time{}
	for {
		changed := p.changed.wait()
		next, err := p.tendMembers(ctx, dead)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			p.log.Warn("tend the members", "error", err)
			next = membershipRetry
		}
		if !pause(ctx, next, changed) {
			return nil
		}
	}
}

// tendMembers does what is due and returns when to look again at the latest. A
// peer that makes trouble does not keep the others from being tended.
func (p *Peer) tendMembers(ctx context.Context, dead map[string]time.Time) (time.Duration, error) {
	servers := p.servers()
	var errs []error
	for _, s := range servers {
		errs = append(errs, p.recordPeer(ctx, s))
	}
	for _, peer := range p.state.View().Peers(nil) {
		if !slices.ContainsFunc(servers, func(s raft.Server) bool { return string(s.ID) == peer.GetId() }) {
			errs = append(errs, p.forgetPeer(ctx, peer.GetId()))
		}
	}
	next, err := p.removeDead(ctx, servers, dead)
	return next, errors.Join(append(errs, err)...)
}

// recordPeer writes a peer's addresses into the registry.
func (p *Peer) recordPeer(ctx context.Context, s raft.Server) error {
	id := string(s.ID)
	known, recorded := p.state.View().Peer(id)
	want := &pb.Peer{Id: id, RaftAddress: p.recordedAddress(id), ApiAddress: known.GetApiAddress()}
	if m, ok := p.member(id); ok && m.Alive {
		want.RaftAddress, want.ApiAddress = m.Metadata.GetRaftAddress(), m.Metadata.GetApiAddress()
	}
	if recorded && known.GetRaftAddress() == want.GetRaftAddress() && known.GetApiAddress() == want.GetApiAddress() {
		return nil
	}
	if err := p.confirm(ctx, want); err != nil {
		return err
	}
	return p.putPeer(ctx, want)
}

// confirm asks a peer itself whether its addresses are these: its answer comes
// over mutual TLS, gossip from anybody with its key. What no gossip has told
// needs no confirmation.
func (p *Peer) confirm(ctx context.Context, want *pb.Peer) error {
	id := want.GetId()
	if id == p.cfg.ID || want.GetApiAddress() == "" {
		return nil
	}
	status, err := p.askStatus(ctx, want.GetApiAddress())
	if err != nil {
		return fmt.Errorf("confirm the addresses of %s: %w", id, err)
	}
	for _, peer := range status.GetPeers() {
		if peer.GetSelf() && peer.GetId() == id && peer.GetRaftAddress() == want.GetRaftAddress() {
			return nil
		}
	}
	return fmt.Errorf("confirm the addresses of %s: %s at %s does not say that its raft is at %s",
		id, status.GetPeerId(), want.GetApiAddress(), want.GetRaftAddress())
}

func (p *Peer) putPeer(ctx context.Context, peer *pb.Peer) error {
	_, err := p.Propose(ctx, &pb.Command{
		Actor:   membershipActor,
		Payload: &pb.Command_PutPeer{PutPeer: &pb.PutPeerCommand{Peer: peer}},
	})
	if err != nil {
		return fmt.Errorf("record peer %s: %w", peer.GetId(), err)
	}
	return nil
}

func (p *Peer) forgetPeer(ctx context.Context, id string) error {
	_, err := p.Propose(ctx, &pb.Command{
		Actor:   membershipActor,
		Payload: &pb.Command_RemovePeer{RemovePeer: &pb.RemovePeerCommand{PeerId: id}},
	})
	if err != nil && apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND {
		return fmt.Errorf("forget peer %s: %w", id, err)
	}
	return nil
}

// reconfigure makes one change of the Raft configuration and returns its index.
func (p *Peer) reconfigure(ctx context.Context, change func(*raft.Raft) raft.IndexFuture) (uint64, error) {
	r, leave := p.enter()
	defer leave()
	if r == nil {
		return 0, p.noLeader()
	}
	future := change(r)
	if err := p.flights.await(ctx, future); err != nil {
		if ctx.Err() != nil {
			return 0, contextError(ctx)
		}
		return 0, p.changeError("change the raft configuration", err)
	}
	p.changed.notify()
	return future.Index(), nil
}

// changeError turns what Raft says to an order to do something into an error of
// the API. What is not listed is Raft's reason to refuse.
func (p *Peer) changeError(what string, err error) error {
	for _, known := range []error{raft.ErrNotLeader, raft.ErrLeadershipTransferInProgress, raft.ErrEnqueueTimeout, raft.ErrLeadershipLost, raft.ErrRaftShutdown} {
		if errors.Is(err, known) {
			return p.raftError(err)
		}
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the leader did not %s: %s", what, err).
		With(DetailOutcome, OutcomeFailed).Next("wasmatrix cluster peers")
}

// removeDead removes at most one peer that has been out of reach too long, and
// returns when to look again.
func (p *Peer) removeDead(ctx context.Context, servers []raft.Server, dead map[string]time.Time) (time.Duration, error) {
	const idle = time.Hour
	limit := p.cfg.Timers.DeadPeerAfter
	if limit < 0 {
		return idle, nil
	}
	now := time.Now()
	p.noteDead(servers, dead, now)
	id, due := longestDead(dead)
	if id == "" {
		return idle, nil
	}
	if wait := limit - now.Sub(due); wait > 0 {
		return wait, nil
	}
	if why := mayRemove(servers, id, func(s string) bool { _, gone := dead[s]; return !gone }); why != "" {
		p.log.Warn("a dead peer is kept", "id", id, "dead_since", due, "reason", why)
		return min(idle, limit), nil
	}
	p.log.Warn("removing a dead peer", "id", id, "dead_since", due)
	if err := p.removeServer(ctx, raft.ServerID(id)); err != nil {
		return 0, fmt.Errorf("remove dead peer %s: %w", id, err)
	}
	delete(dead, id)
	return 0, p.forgetPeer(ctx, id)
}

// noteDead keeps since when each server is dead: gossip does not see it and the
// leader does not reach it. Gossip alone could be forged.
func (p *Peer) noteDead(servers []raft.Server, dead map[string]time.Time, now time.Time) {
	present := map[string]bool{}
	for _, s := range servers {
		id := string(s.ID)
		present[id] = true
		m, seen := p.member(id)
		switch alive := seen && m.Alive; {
		case id == p.cfg.ID || alive || !p.role.contacts.isLost(id):
			delete(dead, id)
		case dead[id].IsZero():
			dead[id] = now
		}
	}
	for id := range dead {
		if !present[id] {
			delete(dead, id)
		}
	}
}

func longestDead(dead map[string]time.Time) (id string, since time.Time) {
	for candidate, at := range dead {
		if id == "" || at.Before(since) || at.Equal(since) && candidate < id {
			id, since = candidate, at
		}
	}
	return id, since
}

// mayRemove returns why a server must stay, or "" when it may be removed: what
// remains must have a quorum of live voters, and with more than a minority of
// the voters dead nothing is removed at all, since it may be this side that is
// cut off.
func mayRemove(servers []raft.Server, id string, alive func(id string) bool) string {
	var voters, live int
	votes := false
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if string(s.ID) == id {
			votes = true
		} else if alive(string(s.ID)) {
			live++
		}
	}
	if !votes {
		return ""
	}
	dead := voters - live
	if alive(id) {
		dead--
	}
	rest := voters - 1
	switch {
	case rest == 0:
		return "it is the only voter"
	case dead > (voters-1)/2:
		return fmt.Sprintf("%d of %d voters are dead, more than a minority", dead, voters)
	case live < rest/2+1:
		return fmt.Sprintf("of the %d voters that remain %d would be alive, quorum is %d", rest, live, rest/2+1)
	default:
		return ""
	}
}
