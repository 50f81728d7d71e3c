package fsm

import (
	"bytes"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// How long the answer to a request id is remembered that belongs to no client
// session: DedupAge of command time, always. When DedupKept of them are younger
// than that, further requests of that kind are refused instead of forgetting one
// early. Two peers must never run with different values.
const (
	DedupKept = 131_072
	DedupAge  = 10 * time.Minute
)

// forgetAtOnce bounds how many aged answers one command forgets, so that the
// first command after a quiet time is not slow. One command remembers at most one
// answer, so the bound on their number holds all the same.
const forgetAtOnce = 16

// The detail that says what became of a request, in refusals that are not
// remembered: a repetition may get another answer. Unknown is what only an earlier
// attempt may have done.
const (
	detailOutcome  = "outcome"
	detailAttempt  = "attempt"
	outcomeFailed  = "failed"
	outcomeUnknown = "unknown"
)

// run answers a command: from memory when it is a repeated request, else by its
// transition.
func (t *tx) run() *pb.CommandResult {
	t.forget()
	t.expireSessions()
	id, session := t.cmd.GetRequestId(), t.cmd.GetSession()
	if id == "" && session == nil {
		return t.conditional()
	}
	if known, ok := first[*pb.DedupRecord](t.txn, tableDedup, indexID, id); ok && id != "" && !plant.On(plant.NoDedup) {
		if bytes.Equal(known.GetRequestDigest(), t.cmd.GetRequestDigest()) {
			return clone(known.GetResult())
		}
		return t.result(nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"request id %q was used for another request", id).
			with("request_id", id).
			next("choose a new request id"))
	}
	r := t.roomForAnswer()
	if session != nil {
		r = t.enterSession(id, session)
	}
	if r != nil {
		return t.result(nil, r)
	}
	res := t.conditional()
	t.remember(id, session, res)
	return clone(res)
}

// conditional does what the command says if what it expects is so.
func (t *tx) conditional() *pb.CommandResult {
	for _, p := range t.cmd.GetPreconditions() {
		if r := t.unmet(p); r != nil {
			return t.result(nil, r)
		}
	}
	return t.transition()
}

// roomForAnswer refuses a request that would push out an answer which somebody
// may still count on.
func (t *tx) roomForAnswer() *refusal {
	if t.sum.dedupCount < DedupKept {
		return nil
	}
	return refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
		"the answers to %d requests outside of client sessions are kept for %s each, there is no room for more", DedupKept, DedupAge).
		with("kept", strconv.Itoa(DedupKept)).
		with(detailOutcome, outcomeFailed).
		next("write within a session (OpenSession), or without a request id")
}

// forget drops answers that are too old.
func (t *tx) forget() {
	if t.now == nil || t.sum.dedupCount == 0 {
		return
	}
	limit := timestamppb.New(t.now.AsTime().Add(-DedupAge))
	for range forgetAtOnce {
		oldest, ok := first[*pb.DedupRecord](t.txn, tableDedup, indexOrder)
		if !ok || !before(oldest.GetTime(), limit) {
			return
		}
		t.dropAnswer(oldest)
	}
}

// remember keeps the answer to a request.
func (t *tx) remember(id string, session *pb.CommandSession, res *pb.CommandResult) {
	rec := &pb.DedupRecord{
		RequestId:     id,
		RequestDigest: t.cmd.GetRequestDigest(),
		Result:        res,
		Time:          t.now,
		SessionId:     session.GetId(),
		Sequence:      session.GetSequence(),
	}
	t.chain.put(hashDedup, rec)
	t.insert(tableDedup, rec)
	t.sum.countAnswer(rec, 1)
}

func (t *tx) dropAnswer(rec *pb.DedupRecord) {
	t.chain.remove(hashDedup, rec.GetRequestId())
	t.delete(tableDedup, rec)
	t.sum.countAnswer(rec, -1)
}

// countAnswer keeps the numbers of answers, which are bounded apart.
func (s *summary) countAnswer(rec *pb.DedupRecord, by int) {
	if rec.GetSessionId() == "" {
		s.dedupCount += by
	} else {
		s.sessionAnswers += by
	}
}
