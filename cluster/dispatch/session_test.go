package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	conflict = pb.ErrorCode_ERROR_CODE_CONFLICT
	noLeader = pb.ErrorCode_ERROR_CODE_NO_LEADER
	denied   = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
)

func wantCode(t testing.TB, what string, err error, want pb.ErrorCode) {
	t.Helper()
	if got := apierror.CodeOf(err); got != want {
		t.Errorf("%s: %v (%v), want %v", what, got, err, want)
	}
}

// pass lets virtual time go by.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestFollowerNamesTheLeader(t *testing.T) {
	peer := &fakePeer{registry: newRegistry(t), id: "p2", leader: "p1"}
	d, err := New(Config{Peer: peer})
	if err != nil {
		t.Fatal(err)
	}
	ctx := as(t.Context(), "n1")
	calls := map[string]func() error{
		"RegisterNode": func() error {
			_, err := d.RegisterNode(ctx, &pb.RegisterNodeRequest{Info: nodeInfo("n1")})
			return err
		},
		"Heartbeat": func() error {
			_, err := d.Heartbeat(ctx, &pb.HeartbeatRequest{NodeId: "n1", Epoch: 1})
			return err
		},
		"ReportStatus": func() error {
			_, err := d.ReportStatus(ctx, &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1})
			return err
		},
		"RecordSubscription": func() error {
			_, err := d.RecordSubscription(ctx, &pb.RecordSubscriptionRequest{NodeId: "n1", Epoch: 1})
			return err
		},
		"WatchAssignments": func() error {
			return d.WatchAssignments(&pb.WatchAssignmentsRequest{NodeId: "n1", Epoch: 1}, streamOf(ctx))
		},
	}
	for name, call := range calls {
		err := call()
		wantCode(t, name, err, noLeader)
		if got := apierror.From(err).Detail("leader_api_address"); got != "p1:7400" {
			t.Errorf("%s: leader_api_address %q, want p1:7400", name, got)
		}
	}
	peer.setLeader("")
	if err := calls["Heartbeat"](); apierror.From(err).Detail("leader_api_address") != "" {
		t.Errorf("a leader is named although none is known: %v", err)
	}
}

func TestOnlyTheNodesOwnAgentMaySpeakForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLead(t, newRegistry(t), "p1").settle(t)
		l.register(t, "n1", 0)
		subject := func(kind identity.Kind, name string, role identity.Role) context.Context {
			return identity.WithCaller(t.Context(), identity.Subject{Cluster: "c", Kind: kind, Name: name, Role: role})
		}
		for name, ctx := range map[string]context.Context{
			"nobody":         t.Context(),
			"another worker": as(t.Context(), "n2"),
			"a mere peer":    subject(identity.Node, "n1", identity.RoleServer),
			"an operator":    subject(identity.User, "n1", identity.RoleAdmin),
		} {
			_, err := l.RegisterNode(ctx, &pb.RegisterNodeRequest{Info: nodeInfo("n1")})
			wantCode(t, name+" registers", err, denied)
			_, err = l.Heartbeat(ctx, &pb.HeartbeatRequest{NodeId: "n1", Epoch: 1})
			wantCode(t, name+" renews", err, denied)
			_, err = l.ReportStatus(ctx, &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1})
			wantCode(t, name+" reports", err, denied)
			_, err = l.RecordSubscription(ctx, &pb.RecordSubscriptionRequest{NodeId: "n1", Epoch: 1})
			wantCode(t, name+" subscribes", err, denied)
			err = l.WatchAssignments(&pb.WatchAssignmentsRequest{NodeId: "n1", Epoch: 1}, streamOf(ctx))
			wantCode(t, name+" watches", err, denied)
		}
		_, err := l.renew(t, "n1", 1)
		wantCode(t, "the node itself", err, pb.ErrorCode_ERROR_CODE_UNSPECIFIED)
		both := subject(identity.Node, "n1", identity.RoleBoth)
		_, err = l.Heartbeat(both, &pb.HeartbeatRequest{NodeId: "n1", Epoch: 1})
		wantCode(t, "the node in both roles", err, pb.ErrorCode_ERROR_CODE_UNSPECIFIED)
	})
}

func TestRegistrationTellsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLead(t, newRegistry(t), "p1").settle(t)
		first := l.register(t, "n1", 0)
		if first.Epoch != 1 || first.LeaseTtl.AsDuration() != DefaultLeaseTTL || !slices.Equal(first.PeerApiAddresses, []string{"p1:7400"}) {
			t.Errorf("session %v", first)
		}
		if again := l.register(t, "n1", 1); again.Epoch != 1 {
			t.Errorf("epoch %d for an agent that only lost its connection, want 1", again.Epoch)
		}
		if again := l.register(t, "n1", 0); again.Epoch != 2 {
			t.Errorf("epoch %d for a new agent process, want 2", again.Epoch)
		}
		_, err := l.renew(t, "n1", 1)
		wantCode(t, "renewal of the old epoch", err, conflict)
		_, err = l.renew(t, "n1", 2)
		wantCode(t, "renewal of the new epoch", err, pb.ErrorCode_ERROR_CODE_UNSPECIFIED)
	})
}

func TestNodeIsLostWhenItsLeaseEndsAndNotEarlier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		l.register(t, "n2", 0)
		for range 8 {
			pass(DefaultLeaseTTL / renewalsPerTTL)
			for _, id := range []string{"n1", "n2"} {
				if _, err := l.renew(t, id, 1); err != nil {
					t.Fatal(err)
				}
			}
		}
		life := held(DefaultLeaseTTL)
		pass(DefaultLeaseTTL / 2)
		if _, err := l.renew(t, "n2", 1); err != nil {
			t.Fatal(err)
		}
		pass(life - DefaultLeaseTTL/2 - time.Millisecond)
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_READY {
			t.Fatalf("n1 is %s before its lease ended", got)
		}
		pass(2 * time.Millisecond)
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_LOST {
			t.Fatalf("n1 is %s after its lease ended", got)
		}
		if got := r.node("n2").GetState(); got != pb.NodeState_NODE_STATE_READY {
			t.Fatalf("n2, which renewed, is %s", got)
		}
		if minimum := DefaultLeaseTTL * 101 / 100; life <= minimum {
			t.Errorf("a lease is held %s, not longer than TTL and drift, %s", life, minimum)
		}
		_, err := l.renew(t, "n1", 1)
		wantCode(t, "renewal of a lost epoch", err, conflict)
		if got := l.register(t, "n1", 1); got.Epoch != 2 {
			t.Errorf("epoch %d after the loss, want 2", got.Epoch)
		}
		if got := l.metric(t, "wasmatrix_node_lease_expirations_total"); got != 1 {
			t.Errorf("%v expirations counted, want 1", got)
		}
	})
}

func TestNewLeaderGivesEveryNodeAFullLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		old := newLead(t, r, "p1").settle(t)
		for _, id := range []string{"n1", "n2"} {
			old.register(t, id, 0)
		}
		pass(DefaultLeaseTTL - time.Millisecond)
		old.peer.setLeader("p2")
		old.stop()
		next := newLead(t, r, "p2").settle(t)
		pass(held(DefaultLeaseTTL) - time.Millisecond)
		if _, err := next.renew(t, "n1", 1); err != nil {
			t.Fatalf("a healthy node is refused after a leader change: %v", err)
		}
		pass(2 * time.Millisecond)
		if r.node("n1").GetState() != pb.NodeState_NODE_STATE_READY || r.node("n1").GetEpoch() != 1 {
			t.Error("n1 renewed and was lost")
		}
		if r.node("n2").GetState() != pb.NodeState_NODE_STATE_LOST {
			t.Error("n2 never renewed and is not lost")
		}
	})
}

// Whatever a deposed leader answers, the agent's deadline comes before that of
// the leader that follows.
func TestAnswerOfADeposedLeaderNeverOutlivesTheNextLeadersGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		old := newLead(t, r, "p1").settle(t)
		old.register(t, "n1", 0)
		if _, err := old.renew(t, "n1", 1); err != nil {
			t.Fatal(err)
		}
		// Another leader begins here; the old one does not know yet.
		began := time.Now()
		old.peer.setLeader("p2")
		var agentDeadline time.Time
		for range 20 {
			sent := time.Now()
			if resp, err := old.renew(t, "n1", 1); err == nil {
				agentDeadline = sent.Add(resp.LeaseTtl.AsDuration())
			} else {
				wantCode(t, "renewal at a deposed leader", err, noLeader)
			}
			pass(100 * time.Millisecond)
		}
		if agentDeadline.IsZero() {
			t.Fatal("no renewal was answered from the last proof")
		}
		if grace := began.Add(DefaultLeaseTTL); agentDeadline.After(grace) {
			t.Errorf("the agent may go on until %s after the next leader's grace", agentDeadline.Sub(grace))
		}
	})
}

func TestProofsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLead(t, newRegistry(t), "p1").settle(t)
		const nodes = 200
		for k := range nodes {
			l.register(t, fmt.Sprintf("n%d", k), 0)
		}
		l.peer.proof = time.Millisecond
		for range 2 * renewalsPerTTL {
			for k := range nodes {
				go func() {
					if _, err := l.renew(t, fmt.Sprintf("n%d", k), 1); err != nil {
						t.Error(err)
					}
				}()
			}
			pass(DefaultLeaseTTL / renewalsPerTTL)
		}
		if got := l.peer.proofCount(); got > 2*proofsPerTTL {
			t.Errorf("%d proofs in two TTLs, want at most %d", got, 2*proofsPerTTL)
		}
		if got := l.metric(t, "wasmatrix_node_lease_renewals_total"); got != 2*renewalsPerTTL*nodes {
			t.Errorf("%v renewals counted, want %d", got, 2*renewalsPerTTL*nodes)
		}
	})
}

// stalledClock is a clock that a test can move on, as if this process had stood
// still meanwhile.
type stalledClock struct{ offset atomic.Int64 }

func (c *stalledClock) Now() time.Time { return time.Now().Add(time.Duration(c.offset.Load())) }

func (c *stalledClock) Timer(d time.Duration) (<-chan time.Time, func()) {
	return systemClock{}.Timer(d)
}

func TestNobodyIsLostBecauseTheLeaderStoodStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		clock := &stalledClock{}
		l := newLead(t, r, "p1", func(c *Config) { c.Clock = clock }).settle(t)
		l.register(t, "n1", 0)
		synctest.Wait()
		clock.offset.Store(int64(time.Minute))
		pass(held(DefaultLeaseTTL))
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_READY {
			t.Fatalf("n1 is %s", got)
		}
		pass(held(DefaultLeaseTTL))
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_LOST {
			t.Fatalf("n1, which never renewed, is %s", got)
		}
	})
}

func TestExpiriesOfManyNodesAndFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		for k := range 300 {
			r.addNode(t, fmt.Sprintf("n%03d", k))
		}
		l := newLead(t, r, "p1").settle(t)
		l.peer.mu.Lock()
		l.peer.failures = []error{errors.New("disk is slow"), errors.New("disk is slow")}
		l.peer.mu.Unlock()
		pass(held(DefaultLeaseTTL))
		lost := func() (n int) {
			for _, node := range r.state.View().Nodes(nil) {
				if node.GetState() == pb.NodeState_NODE_STATE_LOST {
					n++
				}
			}
			return n
		}
		if got := lost(); got != 298 {
			t.Errorf("%d nodes are lost, want all but the two whose expiry failed", got)
		}
		pass(expiryRetry)
		if got := lost(); got != 300 {
			t.Errorf("%d nodes are lost after the retry, want 300", got)
		}
	})
}

// Its expiry is on the way to the log, so the epoch must not be promised again.
func TestEpochWhoseEndIsUnderWayIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		l.peer.mu.Lock()
		l.peer.failures = []error{errors.New("disk is slow")}
		l.peer.mu.Unlock()
		pass(held(DefaultLeaseTTL))
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_READY {
			t.Fatalf("n1 is %s although its expiry could not be committed", got)
		}
		_, err := l.renew(t, "n1", 1)
		wantCode(t, "a renewal", err, conflict)
		if got := l.register(t, "n1", 1); got.Epoch != 2 {
			t.Errorf("epoch %d, want a new one", got.Epoch)
		}
		pass(2 * expiryRetry)
		if n := r.node("n1"); n.GetState() != pb.NodeState_NODE_STATE_READY || n.GetEpoch() != 2 {
			t.Errorf("the late expiry of epoch 1 hit epoch 2: %v", n)
		}
	})
}

// A restored snapshot takes epochs and the index back under a leader that stays.
func TestSessionsStartOverAfterASnapshotIsRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		l.register(t, "n2", 0)
		l.register(t, "n4", 0)
		r.addProvider(t, "kv", "n1", nil)
		var snapshot bytes.Buffer
		if err := r.state.WriteSnapshot(r.state.View(), &snapshot); err != nil {
			t.Fatal(err)
		}
		pass(held(DefaultLeaseTTL)) // all are lost
		l.register(t, "n4", 0)
		for range 3 {
			l.register(t, "n1", 0)
		}
		l.register(t, "n3", 0)
		s, gone := l.watch(t, "n1", 4), l.watch(t, "n3", 1)
		s.take(t)
		gone.take(t)
		before := l.metric(t, "wasmatrix_node_session_wakes_total")
		if err := r.state.Restore(&snapshot); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "the stream of an epoch that never was", <-s.ended, conflict)
		wantCode(t, "the stream of a node that never was", <-gone.ended, conflict)
		again := l.register(t, "n1", 4)
		if _, err := l.renew(t, "n1", again.Epoch); err != nil {
			t.Fatal(err)
		}
		s = l.watch(t, "n1", again.Epoch)
		wantChanges(t, "the new session", s.take(t), "provider kv")
		if got := l.metric(t, "wasmatrix_node_session_wakes_total") - before; got > 10 {
			t.Errorf("sessions woke %v times", got)
		}
		for range 3 * renewalsPerTTL {
			pass(DefaultLeaseTTL / renewalsPerTTL)
			if _, err := l.renew(t, "n1", again.Epoch); err != nil {
				t.Fatal(err)
			}
		}
		pass(held(DefaultLeaseTTL) - DefaultLeaseTTL)
		if got := r.node("n2").GetState(); got != pb.NodeState_NODE_STATE_LOST {
			t.Errorf("n2, alive in the snapshot only, is %s", got)
		}
		if n := r.node("n4"); n.GetState() != pb.NodeState_NODE_STATE_LOST || n.GetEpoch() != 1 {
			t.Errorf("n4, alive in an older epoch in the snapshot, is %v", n)
		}
		if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_READY {
			t.Errorf("n1 is %s", got)
		}
	})
}

func TestNodeThatStaysAwayAfterARestoreIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		var snapshot bytes.Buffer
		if err := r.state.WriteSnapshot(r.state.View(), &snapshot); err != nil {
			t.Fatal(err)
		}
		l.register(t, "n1", 0)
		if err := r.state.Restore(&snapshot); err != nil {
			t.Fatal(err)
		}
		pass(2*held(DefaultLeaseTTL) + time.Millisecond)
		if n := r.node("n1"); n.GetState() != pb.NodeState_NODE_STATE_LOST || n.GetEpoch() != 1 {
			t.Errorf("%v, want epoch 1 to be lost", n)
		}
	})
}

func TestRunEndsWhenLeadershipIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		s := l.watch(t, "n1", 1)
		if m := s.take(t); !m.GetComplete() {
			t.Fatalf("first message %v", m)
		}
		l.peer.setLeader("p2")
		pass(held(DefaultLeaseTTL))
		wantCode(t, "the duty", <-l.ended, noLeader)
		err := <-s.ended
		wantCode(t, "the stream", err, noLeader)
		if got := apierror.From(err).Detail("leader_api_address"); got != "p2:7400" {
			t.Errorf("leader_api_address %q, want p2:7400", got)
		}
		_, err = l.renew(t, "n1", 1)
		wantCode(t, "a renewal afterwards", err, noLeader)
	})
}

func TestReportStatusCommitsOrRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1")
		r.place(t, "a-1", "n1")
		req := r.instanceReport("n1", "a-1", pb.InstanceState_INSTANCE_STATE_RUNNING)
		req.Instances[0].Status.Usage = &pb.ResourceUsage{Invocations: 7}
		resp, err := l.ReportStatus(as(t.Context(), "n1"), req)
		if err != nil {
			t.Fatal(err)
		}
		in, _ := r.state.View().Instance("a-1")
		if in.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING || resp.Index != in.GetModifiedIndex() || in.GetStatus().GetUsage() != nil {
			t.Errorf("answer %v, instance %v", resp, in)
		}
		for name, epoch := range map[string]uint64{"an older epoch": 0, "a newer epoch": 2} {
			_, err = l.ReportStatus(as(t.Context(), "n1"), &pb.ReportStatusRequest{NodeId: "n1", Epoch: epoch})
			wantCode(t, name, err, conflict)
		}
		_, err = l.ReportStatus(as(t.Context(), "n9"), &pb.ReportStatusRequest{NodeId: "n9", Epoch: 1})
		wantCode(t, "a node that never registered", err, conflict)
	})
}

func TestMetricsAreNamedAsPrometheusWants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLead(t, newRegistry(t), "p1").settle(t)
		l.register(t, "n1", 0)
		families, err := l.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		problems, err := promlint.NewWithMetricFamilies(families).Lint()
		if err != nil || len(problems) > 0 {
			t.Errorf("problems %v, error %v", problems, err)
		}
		pass(time.Millisecond)
		if got := l.metric(t, "wasmatrix_nodes"); got != 1 {
			t.Errorf("%v nodes counted, want 1", got)
		}
	})
}
