package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// wantOutcome fails unless err says this of the write with this request id.
func wantOutcome(t *testing.T, what string, err error, code pb.ErrorCode, outcome, requestID string) {
	t.Helper()
	e := apierror.From(err)
	if err == nil || e.Code() != code || e.Detail(DetailOutcome) != outcome || e.Detail(apierror.DetailRequestID) != requestID {
		t.Errorf("%s: got %v %v outcome=%s request_id=%s, want %v %s %s", what, e.Code(), err,
			e.Detail(DetailOutcome), e.Detail(apierror.DetailRequestID), code, outcome, requestID)
	}
}

const (
	noLeaderCode  = pb.ErrorCode_ERROR_CODE_NO_LEADER
	timeoutCode   = pb.ErrorCode_ERROR_CODE_TIMEOUT
	lostCode      = pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE
	invalidCode   = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
	internalCode  = pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR
	conflictCode  = pb.ErrorCode_ERROR_CODE_CONFLICT
	exhaustedCode = pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED
)

// TestEveryErrorOfRaftSaysWhatBecameOfTheWrite goes by the table of what
// hashicorp/raft can answer.
func TestEveryErrorOfRaftSaysWhatBecameOfTheWrite(t *testing.T) {
	t.Parallel()
	p := newLab(t).start("n1", expect(1))
	for _, c := range []struct {
		err     error
		code    pb.ErrorCode
		outcome string
	}{
		{raft.ErrNotLeader, noLeaderCode, OutcomeFailed},
		{raft.ErrLeadershipTransferInProgress, noLeaderCode, OutcomeFailed},
		{raft.ErrEnqueueTimeout, timeoutCode, OutcomeFailed},
		{raft.ErrAbortedByRestore, conflictCode, OutcomeFailed},
		{raft.ErrLeadershipLost, noLeaderCode, OutcomeUnknown},
		{raft.ErrRaftShutdown, noLeaderCode, OutcomeUnknown},
		{errors.New("disk gone"), noLeaderCode, OutcomeUnknown},
	} {
		err := apierror.OfWrite(t.Context(), p.raftError(c.err), "r")
		wantOutcome(t, c.err.Error(), err, c.code, c.outcome, "r")
	}
	huge := &pb.Command{RequestId: "r", Payload: &pb.Command_CreateInstances{CreateInstances: &pb.CreateInstancesCommand{
		Spec: &pb.WorkloadSpec{Name: "w", Stdin: make([]byte, fsm.MaxCommandBytes)},
	}}}
	l := p.lab
	leader := l.leader()
	_, err := leader.Propose(t.Context(), huge)
	wantOutcome(t, "too large", err, invalidCode, OutcomeFailed, "r")
	_, err = leader.Propose(t.Context(), &pb.Command{RequestId: "r"})
	wantOutcome(t, "without payload", err, internalCode, OutcomeFailed, "r")

	// Refused by the state: committed that nothing happened.
	refused := refused()
	refused.RequestId = "r"
	_, err = leader.Propose(t.Context(), refused)
	wantOutcome(t, "refused", err, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, OutcomeFailed, "r")
	if apierror.From(err).Detail(apierror.DetailIndex) == "" {
		t.Errorf("a refusal of the state does not name its index: %v", err)
	}
	unknown := write("s")
	unknown.Session = &pb.CommandSession{Id: "never opened", Sequence: 1}
	_, err = leader.Propose(t.Context(), unknown)
	wantOutcome(t, "an unknown session", err, conflictCode, OutcomeUnknown, "s")
	if apierror.From(err).Detail(apierror.DetailIndex) != "" {
		t.Error("the refusal of an unknown session counts as the answer to the request")
	}

	// The turn to write does not come in time.
	release, err := leader.stamp.take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = leader.Propose(ctx, write("late"))
	release()
	wantOutcome(t, "no turn", err, timeoutCode, OutcomeFailed, "late")
	if has(leader.state.View(), "late") {
		t.Error("it was written all the same")
	}
}

// TestWhatIsInFlightHasAnUnknownOutcome: a leader that is cut off has taken the
// write and can tell nobody what becomes of it; here it is lost, and repeating it
// has its effect once.
func TestWhatIsInFlightHasAnUnknownOutcome(t *testing.T) {
	t.Parallel()
	s := newSimulation(t)
	for _, id := range []string{"n1", "n2", "n3"} {
		s.start(id, expect(3))
	}
	old := s.leader()
	s.put("before")
	s.cut(old.cfg.ID, s.others(old.cfg.ID)...)

	var group sync.WaitGroup
	results := map[string]error{}
	var mu sync.Mutex
	propose := func(id string, ctx context.Context) {
		group.Go(func() {
			_, err := old.Propose(ctx, write(id))
			mu.Lock()
			defer mu.Unlock()
			results[id] = err
		})
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	gone, leave := context.WithCancel(t.Context())
	propose("deadline", short)
	propose("gone", gone)
	propose("deposed", t.Context())
	<-short.Done()
	leave()
	group.Wait()
	wantOutcome(t, "leadership lost", results["deposed"], noLeaderCode, OutcomeUnknown, "deposed")
	if err := results["deadline"]; apierror.CodeOf(err) != timeoutCode || apierror.From(err).Detail(DetailOutcome) != OutcomeUnknown {
		t.Errorf("deadline: %v", err)
	}
	if err := results["gone"]; apierror.CodeOf(err) != lostCode || apierror.From(err).Detail(DetailOutcome) != OutcomeUnknown {
		t.Errorf("the caller went away: %v", err)
	}
	_, err := old.Propose(t.Context(), write("later"))
	wantOutcome(t, "at a deposed leader", err, noLeaderCode, OutcomeFailed, "later")

	s.heal()
	for _, id := range []string{"deposed", "deadline", "gone"} {
		s.put(id)
		s.everywhere(id)
	}
}

// TestAStoppingPeerRefusesForCertain: nothing that comes after the stop began is
// taken, and what was taken before is answered.
func TestAStoppingPeerRefusesForCertain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	var acknowledged, unknowns sync.Map
	var refused atomic.Bool
	var group sync.WaitGroup
	var started atomic.Int32
	for w := range 4 {
		group.Go(func() {
			for i := 0; !refused.Load() && i < 5000; i++ {
				id := fmt.Sprintf("w%d-%d", w, i)
				_, err := leader.Propose(t.Context(), write(id))
				started.Add(1)
				switch e := apierror.From(err); {
				case err == nil:
					acknowledged.Store(id, true)
				case e.Detail(DetailOutcome) == OutcomeUnknown:
					unknowns.Store(id, true)
				default:
					wantOutcome(t, "while it stops", err, noLeaderCode, OutcomeFailed, id)
					refused.Store(true)
				}
			}
		})
	}
	l.eventually("writes are under way", func() bool { return started.Load() > 8 })
	leader.stop()
	refused.Store(true)
	group.Wait()
	l.put("last")
	view := l.leader().state.View()
	acknowledged.Range(func(id, _ any) bool {
		if name, ok := id.(string); !ok || !has(view, name) {
			t.Errorf("%s was acknowledged and is lost", id)
		}
		return true
	})
	for _, p := range view.Providers(nil) {
		_, known := acknowledged.Load(p.GetId())
		if _, maybe := unknowns.Load(p.GetId()); !known && !maybe && p.GetId() != "last" {
			t.Errorf("%s was refused for certain and is there", p.GetId())
		}
	}
}

// TestASessionOutlivesItsLeader: its answers are as replicated as anything.
func TestASessionOutlivesItsLeader(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	_, err := leader.Propose(t.Context(), &pb.Command{Actor: "ann", Payload: &pb.Command_OpenSession{
		OpenSession: &pb.OpenSessionCommand{SessionId: "s", IdleTimeout: durationpb.New(time.Hour)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	numbered := func(id string, sequence uint64) *pb.Command {
		cmd := write(id)
		cmd.Actor, cmd.Session = "ann", &pb.CommandSession{Id: "s", Sequence: sequence, FirstOutstanding: 1}
		return cmd
	}
	first, err := leader.Propose(t.Context(), numbered("a", 1))
	if err != nil {
		t.Fatal(err)
	}
	leader.stop()
	next := l.leader()
	again, err := next.Propose(t.Context(), numbered("a", 1))
	if err != nil || again.GetIndex() != first.GetIndex() {
		t.Errorf("repeated at the next leader: %v, %v, the first answer was %v", again, err, first)
	}
	if _, err := next.Propose(t.Context(), numbered("b", 2)); err != nil {
		t.Errorf("the next write of the session: %v", err)
	}
}

// TestLeaderTimeNeverGoesBack: a leader whose clock is behind that of the one
// before goes on from the latest time in the log.
func TestLeaderTimeNeverGoesBack(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	clocks := map[string]time.Duration{"n1": 0, "n2": -time.Hour, "n3": -2 * time.Hour}
	start := time.Now()
	for id, offset := range clocks {
		l.start(id, expect(3), func(c *Config) {
			c.Seams.Now = func() time.Time { return time.Now().Add(offset) }
		})
	}
	l.voters("n1", "n2", "n3")
	last := time.Time{}
	for round, id := range []string{"n1", "n2", "n3", "n1", "n3"} {
		l.eventually(id+" leads", func() bool {
			leader := l.leader()
			if leader.cfg.ID == id {
				return true
			}
			// It may be refused for a while: a peer that has just joined does not vote yet.
			_, _ = pb.NewClusterServiceClient(l.admin(leader)).TransferLeadership(t.Context(), &pb.TransferLeadershipRequest{PeerId: id})
			return l.peers[id].IsLeader()
		})
		for i := range 3 {
			l.put(fmt.Sprintf("p%d-%d", round, i))
			now := l.peers[id].state.View().Time()
			if now.Before(last) {
				t.Fatalf("%s, whose clock is %s off, writes at %v after %v", id, clocks[id], now, last)
			}
			last = now
		}
	}
	if last.Before(start) {
		t.Errorf("the log ends at %v, before the test began at %v: no leader had the right clock", last, start)
	}
}

// TestADamagedCommandStopsThePeer: damage before the entry is stored is not sealed.
func TestADamagedCommandStopsThePeer(t *testing.T) {
	good, err := fsm.EncodeCommand(write("a"))
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(good)
	bad[len(bad)/2] ^= 4
	inner := raft.NewInmemStore()
	var told []error
	logs := &sealedLogs{LogStore: inner, damaged: func(err error) { told = append(told, err) }}
	entries := []*raft.Log{{Index: 1, Data: good}, {Index: 2, Type: raft.LogConfiguration, Data: []byte("x")}, {Index: 3, Data: bad}}
	if err := logs.StoreLogs(entries); !errors.Is(err, fsm.ErrDamagedCommand) || len(told) != 1 || !strings.Contains(err.Error(), "entry 3") {
		t.Errorf("got %v, told %v", err, told)
	}
	if last, _ := inner.LastIndex(); last != 0 {
		t.Errorf("entries up to %d were stored", last)
	}
	if err := logs.StoreLogs(entries[:2]); err != nil {
		t.Error(err)
	}
	if err := inner.StoreLogs(entries[2:]); err != nil {
		t.Fatal(err)
	}
	var out raft.Log
	if err := logs.GetLog(1, &out); err != nil {
		t.Error(err)
	}
	if err := logs.GetLog(3, &out); !errors.Is(err, fsm.ErrDamagedCommand) || len(told) != 2 {
		t.Errorf("reading it: %v, told %v", err, told)
	}
}

// TestForwardingSaysWhatBecameOfTheWrite: what the leader answers comes through,
// and what is lost on the way is in doubt, unless the call only reads.
func TestForwardingSaysWhatBecameOfTheWrite(t *testing.T) {
	p := &Peer{}
	writes := &forwarded{peer: p, req: &pb.RegisterProviderRequest{RequestId: "r"}}
	reads := &forwarded{peer: p, req: &pb.ListProvidersRequest{}}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		gone bool
		code codes.Code
		want pb.ErrorCode
	}{
		"unreachable":      {false, codes.Unavailable, noLeaderCode},
		"cut":              {false, codes.Canceled, noLeaderCode},
		"answer too large": {false, codes.ResourceExhausted, exhaustedCode},
		"broken":           {false, codes.Internal, internalCode},
		"caller gone":      {true, codes.Canceled, lostCode},
	} {
		ctx := t.Context()
		if c.gone {
			ctx = over
		}
		err := apierror.OfWrite(ctx, writes.lost(ctx, status.Error(c.code, "x")), "r")
		wantOutcome(t, name, err, c.want, OutcomeUnknown, "r")
		if c.gone || c.code == codes.ResourceExhausted {
			if got := reads.lost(ctx, status.Error(c.code, "x")); apierror.From(got).Detail(DetailOutcome) != "" {
				t.Errorf("%s: a read has an outcome: %v", name, got)
			}
		}
	}
	answer := apierror.New(conflictCode, "taken").With(DetailOutcome, OutcomeFailed).With(apierror.DetailIndex, "7")
	st := answer.Status(t.Context())
	wantOutcome(t, "an answer", apierror.OfWrite(t.Context(), writes.lost(t.Context(), st.Err()), "r"), conflictCode, OutcomeFailed, "r")
}
