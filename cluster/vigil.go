package cluster

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// maxPool is how many idle connections to each peer the transport keeps.
const maxPool = 3

// errMyTurn answers a pre-vote request that crossed a better one of this peer.
var errMyTurn = errors.New("this peer asks for votes itself and has the better claim")

// nudgeStep is by how much the heartbeat timeout is lowered to make Raft look at
// the last contact, and how long after the timeout that is done.
const nudgeStep = time.Millisecond

// vigil makes followers notice together, and as soon as they may, that the leader
// has fallen silent.
//
// hashicorp/raft looks at the last contact only when a timer fires that is drawn
// between one and two heartbeat timeouts, so it notices after one to three of
// them. A follower that has not noticed refuses pre-votes, whoever was refused
// waits for another one to two, and with one peer of three gone both others are
// needed. So the vigil has Raft look when the timeout is over; and since peers
// then notice within milliseconds, it settles what happens between them: of two
// candidates that ask each other only one gets an answer, or both would stand and
// neither win; and a better candidate that noticed a moment earlier is kept
// waiting instead of being refused. All of that only moves or loses messages and
// moves timers, which Raft allows anybody.
type vigil struct {
	hop
	id raft.ServerID
	// limit is the heartbeat timeout.
	limit time.Duration
	// raft returns nil before Raft has started.
	raft func() *raft.Raft
	// changed tells, among other things, that the leader is not known any more.
	changed *signal
	lost    *lost

	mu     sync.Mutex
	asking map[raft.ServerID]*question
}

// question is a pre-vote request of this peer that was granted or not answered yet.
type question struct {
	*raft.RequestPreVoteRequest
	at      time.Time
	granted bool
}

// newVigil puts a vigil of the peer id between Raft and a transport.
func newVigil(inner raft.Transport, id string, limit time.Duration, changed *signal, r func() *raft.Raft) (*vigil, error) {
	h, err := newHop(inner)
	return &vigil{
		hop: h, id: raft.ServerID(id), limit: limit, changed: changed, raft: r, lost: newLost(limit),
		asking: map[raft.ServerID]*question{},
	}, err
}

// run passes incoming messages on until ctx ends.
func (v *vigil) run(ctx context.Context) {
	var held sync.WaitGroup
	defer held.Wait()
	v.each(ctx, func(rpc raft.RPC) {
		req, ok := rpc.Command.(*raft.RequestPreVoteRequest)
		if !ok {
			v.pass(ctx, rpc)
			return
		}
		// It may have to wait, and nothing else shall wait for it.
		held.Go(func() {
			if err := v.admit(ctx, req); err != nil {
				rpc.Respond(nil, err)
				return
			}
			v.pass(ctx, rpc)
		})
	})
}

// AppendEntries sends entries, or a heartbeat. Entries for a follower that is lost
// wait until it is back.
func (v *vigil) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	beat := isHeartbeat(args)
	if !beat {
		v.lost.await(id, args.Term, v.raft())
	}
	err := again(func() error { return v.Transport.AppendEntries(id, target, args, resp) })
	if beat {
		v.lost.note(id, err)
	}
	return err
}

// RequestVote asks for a vote.
func (v *vigil) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return again(func() error { return v.Transport.RequestVote(id, target, args, resp) })
}

// RequestPreVote asks whether a vote would be given.
func (v *vigil) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	mine := &question{RequestPreVoteRequest: args, at: time.Now()}
	v.mu.Lock()
	v.asking[id] = mine
	v.mu.Unlock()
	err := again(func() error { return v.preVote.RequestPreVote(id, target, args, resp) })
	v.mu.Lock()
	defer v.mu.Unlock()
	if mine.granted = err == nil && resp.Granted; !mine.granted && v.asking[id] == mine {
		delete(v.asking, id)
	}
	return err
}

// TimeoutNow tells a peer to stand for election.
func (v *vigil) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return again(func() error { return v.Transport.TimeoutNow(id, target, args, resp) })
}

// again sends a message anew as long as it met a pooled connection whose other
// end is gone: a peer that was restarted leaves those behind, and an election
// that fails for one costs a whole timeout. Each message of Raft may arrive twice.
func again(send func() error) error {
	for range maxPool {
		err := send()
		stale := errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) ||
			errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
		if !stale {
			return err
		}
	}
	return send()
}

// watch has Raft look at the last contact whenever that is a heartbeat timeout
// ago, until ctx ends. From then on nothing waits for lost followers. Where
// contacts have lately been late without anything being wrong it does nothing:
// Raft's own timer takes longer, and then that is right.
func (v *vigil) watch(ctx context.Context, r *raft.Raft) {
	defer v.lost.end()
	var told time.Time // the contact after which Raft was told
	var strain strain
	wait := v.limit / 5
	for {
		began := time.Now()
		if !pause(ctx, wait, nil) {
			return
		}
		overslept := time.Since(began) - wait
		contact := r.LastContact()
		strain.note(contact, r.CurrentTerm(), overslept, v.limit)
		left := v.limit + v.turn(r) - time.Since(contact)
		wait = v.limit / 5
		switch {
		case r.State() != raft.Follower, contact.IsZero(), contact.Equal(told), strain.recent():
		case left >= 0:
			wait = min(wait, left+nudgeStep)
		case overslept > v.limit/8:
			// This process was held up itself: what the leader sent may be waiting here.
			wait = v.limit / 8
		default:
			v.nudge(r)
			told = contact
		}
	}
}

// calm is how long contacts must have been in time to count on it that they are.
const calm = 5 * time.Second

// strain notices a machine, here or at the leader, that has more to do than it can.
type strain struct {
	contact time.Time     // the last one seen
	term    uint64        // in which it was
	silence time.Duration // the longest seen since then
	at      time.Time     // when there was strain last
}

// note takes in a look at the last contact, made so much later than it was meant to be.
func (s *strain) note(contact time.Time, term uint64, late, limit time.Duration) {
	if !contact.Equal(s.contact) {
		// When there is another leader the silence had a reason.
		if term == s.term && s.silence > limit/2 {
			s.at = time.Now()
		}
		s.contact, s.term, s.silence = contact, term, 0
	}
	s.silence = max(s.silence, time.Since(contact))
	if late > limit/4 {
		s.at = time.Now()
	}
}

func (s *strain) recent() bool { return time.Since(s.at) < calm }

// turn is how much longer than the timeout this peer waits. When more than two
// are left, several could win the pre-votes of the others at the same moment.
func (v *vigil) turn(r *raft.Raft) (later time.Duration) {
	_, leader := r.LeaderWithID()
	voters := 0
	for _, s := range r.GetConfiguration().Configuration().Servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		if voters++; s.ID < v.id && s.ID != leader {
			later += v.limit / 25
		}
	}
	if voters <= 3 {
		return 0
	}
	return later
}

// nudge makes a follower look at the last contact now: Raft does so when its
// heartbeat timeout is lowered.
func (v *vigil) nudge(r *raft.Raft) {
	settings := r.ReloadableConfig()
	for _, timeout := range []time.Duration{v.limit + nudgeStep, v.limit} {
		settings.HeartbeatTimeout = timeout
		// It can refuse only values, and these were accepted at the start.
		_ = r.ReloadConfig(settings)
	}
}

// admit returns when a pre-vote request may go to Raft, or errMyTurn.
func (v *vigil) admit(ctx context.Context, req *raft.RequestPreVoteRequest) error {
	if v.crosses(req) {
		return errMyTurn
	}
	r := v.raft()
	if r == nil || r.LastIndex() >= req.LastLogIndex {
		return nil
	}
	contact := r.LastContact()
	if contact.IsZero() || time.Since(contact) < v.limit/2 {
		return nil
	}
	for {
		changed := v.changed.wait()
		// After the timeout Raft gets a moment to find out.
		left := v.limit + v.limit/8 - time.Since(contact)
		_, leader := r.LeaderWithID()
		if left <= 0 || leader == "" || !r.LastContact().Equal(contact) || !pause(ctx, left, changed) {
			return nil
		}
	}
}

// crosses reports whether this peer has just asked the one who asks now, and has
// the better claim: it was granted, or crossed the other's on the way and is the
// better one. A question that stays without an answer gives no claim for long.
func (v *vigil) crosses(req *raft.RequestPreVoteRequest) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	mine, asked := v.asking[raft.ServerID(req.ID)]
	if !asked || time.Since(mine.at) > v.limit/4 {
		return false
	}
	return mine.granted || cmp.Or(
		cmp.Compare(mine.LastLogTerm, req.LastLogTerm),
		cmp.Compare(mine.LastLogIndex, req.LastLogIndex),
		cmp.Compare(string(req.ID), string(v.id)),
	) > 0
}
