package fsm

import (
	"encoding/binary"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The bounds of client sessions. Two peers must never run with different values.
const (
	// MaxSessions is how many sessions there are at most. One more takes the place
	// of the one that has been idle the longest, if that is for DedupAge at least.
	MaxSessions = 16_384
	// MaxSessionAnswers is how many answers all sessions keep together at most.
	MaxSessionAnswers = 262_144
	// MaxOutstanding is how many requests of a session may be without an answer.
	MaxOutstanding = 256
	// DefaultSessionIdle is how long a session is kept without a request when its
	// client did not say.
	DefaultSessionIdle = time.Hour
	// MinSessionIdle and MaxSessionIdle bound what a client may ask for. A session
	// is never forgotten sooner than an answer outside of sessions.
	MinSessionIdle = DedupAge
	MaxSessionIdle = 24 * time.Hour
)

const (
	// acknowledgedAtOnce is by how much a client's first outstanding request must
	// grow before its answers are dropped: one change of the session's record for
	// many requests.
	acknowledgedAtOnce = 32
	// idleGrain is the part of the idle timeout by which the record of the last
	// request may lag, for the same reason; a session lives that much longer.
	idleGrain = 64
	// expireAtOnce bounds how many sessions one command lets go. Each has at most
	// MaxOutstanding + acknowledgedAtOnce answers.
	expireAtOnce = 2
)

// openClientSession begins a client session of the caller.
func (t *tx) openClientSession(c *pb.OpenSessionCommand) ([]string, *refusal) {
	if r := checkID("the session's id", c.GetSessionId()); r != nil {
		return nil, r
	}
	idle := c.GetIdleTimeout().AsDuration()
	if !c.GetIdleTimeout().IsValid() || idle < MinSessionIdle || idle > MaxSessionIdle {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"a session is kept idle for %s to %s, not %s", MinSessionIdle, MaxSessionIdle, idle)
	}
	if _, taken := t.session(c.GetSessionId()); taken {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the session id %q is taken", c.GetSessionId()).
			with("session", c.GetSessionId()).
			next("choose another id")
	}
	if t.sum.sessionCount >= MaxSessions && !t.evictIdle("") {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
			"there are %d client sessions and all were used within %s", MaxSessions, DedupAge).
			next("write without a session, or try again in a few minutes")
	}
	t.putSession(&pb.ClientSession{
		Id:               c.GetSessionId(),
		Actor:            t.cmd.GetActor(),
		IdleTimeout:      c.GetIdleTimeout(),
		ActiveAt:         t.now,
		FirstOutstanding: 1,
	})
	t.sum.sessionCount++
	return []string{c.GetSessionId()}, nil
}

// enterSession decides whether a request that is not known may be carried out
// for its session, and lets the answers go that the client has.
func (t *tx) enterSession(id string, c *pb.CommandSession) *refusal {
	if id == "" || c.GetSequence() == 0 || c.GetFirstOutstanding() > c.GetSequence() {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"a request of a session has a request id and a number from 1 that is not below its first outstanding one").
			with("session", c.GetId()).
			with("sequence", strconv.FormatUint(c.GetSequence(), 10)).
			with(detailOutcome, outcomeFailed)
	}
	s, ok := t.session(c.GetId())
	if !ok || s.GetActor() != t.cmd.GetActor() {
		return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"the session %q is not known any more; this attempt did nothing, an earlier one may have", c.GetId()).
			with("session", c.GetId()).
			with(detailOutcome, outcomeUnknown).
			with(detailAttempt, outcomeFailed).
			next("open a new session; if this was a repetition look at the state before you write again")
	}
	if c.GetSequence() < s.GetFirstOutstanding() {
		return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"the client has said that it has the answer to request %d of the session; it is not done again", c.GetSequence()).
			with("session", c.GetId()).
			with("first_outstanding", strconv.FormatUint(s.GetFirstOutstanding(), 10)).
			with(detailOutcome, outcomeUnknown).
			with(detailAttempt, outcomeFailed)
	}
	if other, used := first[*pb.DedupRecord](t.txn, tableDedup, indexSession, c.GetId(), c.GetSequence()); used && !plant.On(plant.NoDedup) {
		return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"number %d of the session was used for another request", c.GetSequence()).
			with("session", c.GetId()).
			with("used_by", other.GetRequestId()).
			with(detailOutcome, outcomeFailed).
			next("give each request of a session its own number")
	}
	outstanding := max(c.GetFirstOutstanding(), s.GetFirstOutstanding())
	if c.GetSequence()-outstanding >= MaxOutstanding {
		return refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
			"request %d of the session is too far ahead of request %d, whose answer the client does not have", c.GetSequence(), outstanding).
			with("session", c.GetId()).
			with(detailOutcome, outcomeFailed).
			next("wait for answers, or open another session")
	}
	if t.sum.sessionAnswers >= MaxSessionAnswers && !t.evictIdle(s.GetId()) {
		return refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
			"client sessions keep %d answers and all were used within %s", t.sum.sessionAnswers, DedupAge).
			with(detailOutcome, outcomeFailed).
			next("acknowledge answers with first_outstanding, or try again in a few minutes")
	}
	t.useSession(s, outstanding)
	return nil
}

// useSession notes that a session was used, and up to where its client has answers.
func (t *tx) useSession(s *pb.ClientSession, outstanding uint64) {
	acknowledged := outstanding >= s.GetFirstOutstanding()+acknowledgedAtOnce
	if !acknowledged && nanos(t.now) <= nanos(s.GetActiveAt())+uint64(s.GetIdleTimeout().AsDuration()/idleGrain) {
		return
	}
	used := shallow(s)
	used.ActiveAt = t.now
	if acknowledged {
		t.dropAnswers(s.GetId(), outstanding)
		used.FirstOutstanding = outstanding
	}
	t.putSession(used)
}

// dropAnswers drops the answers of a session to requests below a number.
func (t *tx) dropAnswers(id string, below uint64) {
	var gone []*pb.DedupRecord
	it, err := t.txn.Get(tableDedup, indexSession+"_prefix", id+terminator)
	must(err)
	for raw := it.Next(); raw != nil; raw = it.Next() {
		rec, ok := raw.(*pb.DedupRecord)
		if !ok || rec.GetSequence() >= below {
			break
		}
		gone = append(gone, rec)
	}
	for _, rec := range gone {
		t.dropAnswer(rec)
	}
}

// expireSessions ends sessions that have been idle for too long.
func (t *tx) expireSessions() {
	if t.now == nil || t.sum.sessionCount == 0 {
		return
	}
	for range expireAtOnce {
		next, ok := first[*pb.ClientSession](t.txn, tableSessions, indexExpiry)
		if !ok || expiryOf(next) >= nanos(t.now) {
			return
		}
		t.dropSession(next)
	}
}

// evictIdle ends the session that has been idle the longest, unless somebody may
// still repeat a request of it, and reports whether it did.
func (t *tx) evictIdle(except string) bool {
	oldest, ok := first[*pb.ClientSession](t.txn, tableSessions, indexOrder)
	if !ok || oldest.GetId() == except || nanos(oldest.GetActiveAt())+uint64(idleAtLeast(oldest)) > nanos(t.now) {
		return false
	}
	t.dropSession(oldest)
	return true
}

// idleAtLeast is how long ago active_at must be for a session to have been idle
// for DedupAge: the record of its last request may lag.
func idleAtLeast(s *pb.ClientSession) time.Duration {
	return DedupAge + s.GetIdleTimeout().AsDuration()/idleGrain
}

func (t *tx) session(id string) (*pb.ClientSession, bool) {
	return first[*pb.ClientSession](t.txn, tableSessions, indexID, id)
}

func (t *tx) putSession(s *pb.ClientSession) {
	t.chain.put(hashSession, s)
	t.insert(tableSessions, s)
}

func (t *tx) dropSession(s *pb.ClientSession) {
	const all = ^uint64(0)
	t.dropAnswers(s.GetId(), all)
	t.chain.remove(hashSession, s.GetId())
	t.delete(tableSessions, s)
	t.sum.sessionCount--
}

// expiryOf is when a session ends if it is not used.
func expiryOf(s *pb.ClientSession) uint64 {
	idle := s.GetIdleTimeout().AsDuration()
	return nanos(s.GetActiveAt()) + uint64(idle+idle/idleGrain)
}

// nanos is a command time as a number that grows with it; what is missing or
// before 1970 is 0.
func nanos(at *timestamppb.Timestamp) uint64 {
	if at == nil {
		return 0
	}
	return uint64(max(0, at.AsTime().UnixNano()))
}

// sessionIndex indexes the answers that sessions keep by session and number.
type sessionIndex struct{}

// FromObject implements memdb.SingleIndexer.
func (sessionIndex) FromObject(raw any) (bool, []byte, error) {
	rec, ok := raw.(*pb.DedupRecord)
	if !ok || rec.GetSessionId() == "" {
		return false, nil, wrongType(ok, raw)
	}
	return true, []byte(answerKey(rec.GetSessionId(), rec.GetSequence())), nil
}

// FromArgs implements memdb.Indexer; the arguments are the session's id and the number.
func (sessionIndex) FromArgs(args ...any) ([]byte, error) {
	if len(args) == 2 {
		id, isText := args[0].(string)
		number, isNumber := args[1].(uint64)
		if isText && isNumber {
			return []byte(answerKey(id, number)), nil
		}
	}
	return nil, wrongType(false, args)
}

// PrefixFromArgs implements memdb.PrefixIndexer; the argument is the prefix.
func (sessionIndex) PrefixFromArgs(args ...any) ([]byte, error) {
	return textIndex[*pb.DedupRecord]{}.PrefixFromArgs(args...)
}

// answerKey orders the answers of a session by their numbers.
func answerKey(session string, number uint64) string {
	return string(binary.BigEndian.AppendUint64([]byte(session+terminator), number))
}
