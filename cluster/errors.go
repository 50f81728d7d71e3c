package cluster

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The details of errors of this package.
const (
	// DetailOutcome says whether a write may have happened: OutcomeFailed or OutcomeUnknown.
	DetailOutcome = apierror.DetailOutcome
	// OutcomeFailed: the write did not happen and never will.
	OutcomeFailed = apierror.OutcomeFailed
	// OutcomeUnknown: the write may have happened, or may still happen; repeat it with the same request id.
	OutcomeUnknown = apierror.OutcomeUnknown
	// DetailLeader is the leader's id, when it is known.
	DetailLeader = "leader_id"
	// DetailLeaderAddress is host:port of the leader's API, when it is known.
	DetailLeaderAddress = "leader_api_address"
)

// noLeader says that this peer does not lead, or cannot, and nothing was done:
// NO_LEADER, or RESOURCE_EXHAUSTED when its disk is full and nobody else leads.
func (p *Peer) noLeader() *apierror.Error {
	const code = pb.ErrorCode_ERROR_CODE_NO_LEADER
	var e *apierror.Error
	id, address := p.Leader()
	voters, alive := p.voters()
	switch {
	case p.role.closing.Load():
		e = apierror.New(code, "peer %s is shutting down", p.cfg.ID).Next("repeat the call at another peer")
	case p.disk.hanging.Load() > 0:
		e = apierror.New(code, "the disk of peer %s hangs", p.cfg.ID).Next("repeat the call at another peer; look at the disk of %s", p.cfg.ID)
	case p.role.outside.Load():
		e = apierror.New(code, "peer %s is not part of the cluster any more", p.cfg.ID).
			With("removed", "true").
			Next("ask another peer; %s", p.backIn())
	case (id == p.cfg.ID || id == "") && p.hasFullDisk():
		// Elected or not, this is what the operator must know.
		e = p.diskFull("peer")
	case id == p.cfg.ID:
		e = apierror.New(code, "peer %s was elected a moment ago and does not serve yet", p.cfg.ID).Next("repeat the call")
	case id != "":
		e = apierror.New(code, "peer %s does not lead, %s does", p.cfg.ID, id).
			With(DetailLeader, id).With(DetailLeaderAddress, address).
			Next("repeat the call at %s", address)
	case voters == 0:
		e = apierror.New(code, "no leader: peer %s is not part of a cluster yet", p.cfg.ID).
			Next("wasmatrix status --watch")
	default:
		e = apierror.New(code, "no leader: %d of %d voting peers alive, quorum is %d", alive, voters, voters/2+1).
			With("voters", strconv.Itoa(voters)).With("voters_alive", strconv.Itoa(alive)).
			Next("wasmatrix status; start the peers that are missing; reads work with --stale")
	}
	return e.With("peer", p.cfg.ID).With(DetailOutcome, OutcomeFailed)
}

// voters counts the voters of the Raft configuration, and those that gossip sees alive.
func (p *Peer) voters() (all, alive int) {
	for _, s := range p.servers() {
		if s.Suffrage != raft.Voter {
			continue
		}
		all++
		if m, ok := p.member(string(s.ID)); ok && m.Alive {
			alive++
		}
	}
	return all, alive
}

// unknown says that a write was under way when what it depended on went away.
func unknown(code pb.ErrorCode, why string) *apierror.Error {
	return apierror.New(code, "%s; the write may have happened", why).
		With(DetailOutcome, OutcomeUnknown).
		Next("repeat the call with the same request id")
}

// raftError turns an error of hashicorp/raft into one of the API. Errors that
// are not listed are failures of the leader's disk: the entry may be on it.
func (p *Peer) raftError(err error) error {
	const code = pb.ErrorCode_ERROR_CODE_NO_LEADER
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return p.noLeader()
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "the leader has more to write than it can").
			With(DetailOutcome, OutcomeFailed).Next("repeat the call later")
	case errors.Is(err, raft.ErrAbortedByRestore):
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "a snapshot was restored during the call").
			With(DetailOutcome, OutcomeFailed).Next("look at the restored state and repeat the call")
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown):
		return unknown(code, "leadership was lost during the call")
	case foundNoRoom(err) && p.disk.space.Load() != nil:
		return p.diskFull("the leader")
	default:
		return unknown(code, "the leader could not write its log: "+err.Error())
	}
}

// contextError says that the caller's time was over before the outcome was known.
func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return unknown(pb.ErrorCode_ERROR_CODE_TIMEOUT, "the deadline passed before the write was committed")
	}
	return unknown(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "the caller went away before the write was committed")
}

// remaining returns the time until ctx's deadline, at most limit and never 0.
func remaining(ctx context.Context, limit time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline))
	}
	return max(limit, time.Millisecond)
}
