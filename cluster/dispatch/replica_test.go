package dispatch

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// drain takes all messages that are on their way.
func (s *agentStream) drain(t *testing.T) []*pb.AssignmentChange {
	t.Helper()
	var out []*pb.AssignmentChange
	for m := s.take(t); m != nil; m = s.take(t) {
		out = append(out, m.GetChanges()...)
	}
	return out
}

func (s *agentStream) knows(t *testing.T, want ...string) {
	t.Helper()
	if got := slices.Sorted(maps.Keys(s.known)); !slices.Equal(got, want) {
		t.Errorf("the agent knows %q, want %q", got, want)
	}
}

// busWorld has a messaging provider with replicas on n1 and n2, and an instance on
// n3 that uses it.
func busWorld(t *testing.T) (*registry, *lead) {
	t.Helper()
	r := newRegistry(t)
	l := newLead(t, r, "p1").settle(t)
	for _, id := range []string{"n1", "n2", "n3", "n4"} {
		l.register(t, id, 0)
	}
	r.addBus(t, "bus", "n1", "n2")
	r.create(t, &pb.WorkloadSpec{Name: "w"}, "w-1")
	r.place(t, "w-1", "n3")
	r.grant(t, "w-1", "bus")
	synctest.Wait()
	return r, l
}

func TestEveryUserKnowsEveryReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := busWorld(t)
		user, first, second := l.watch(t, "n3", 1), l.watch(t, "n1", 1), l.watch(t, "n2", 1)
		user.drain(t)
		first.drain(t)
		second.drain(t)
		user.knows(t, "assignment w-1 bus", "instance w-1", "node n1", "node n2", "provider bus", "provider bus/1")
		first.knows(t, "assignment w-1 bus", "node n3", "provider bus", "remote w-1")
		second.knows(t, "assignment w-1 bus", "node n3", "provider bus/1", "remote w-1")
		if p := second.known["provider bus/1"].GetPutProvider(); p.GetReplica() != 1 || p.GetSpec().GetReplicas() != 2 {
			t.Errorf("n2 hosts %v", p)
		}
		if p := user.known["provider bus/1"].GetPutProvider(); p.GetReplica() != 1 || p.GetPlacement().GetNodeId() != "n2" {
			t.Errorf("n3 uses %v", p)
		}

		// A replica moves: its users hear of it, its new node gets the callers.
		r.do(t, &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n2", Epoch: 1}}})
		r.placeReplica(t, "bus", 1, "n4")
		fourth := l.watch(t, "n4", 1)
		fourth.drain(t)
		user.drain(t)
		user.knows(t, "assignment w-1 bus", "instance w-1", "node n1", "node n4", "provider bus", "provider bus/1")
		fourth.knows(t, "assignment w-1 bus", "node n3", "provider bus/1", "remote w-1")

		// One is taken away: its node and its users are told by its own name.
		r.do(t, &pb.Command{Payload: &pb.Command_UpdateProvider{UpdateProvider: &pb.UpdateProviderCommand{Spec: &pb.ProviderSpec{
			Id: "bus", Type: "messaging", Driver: "nats", Replicas: 1,
		}}}})
		for name, s := range map[string]*agentStream{"n3": user, "n4": fourth} {
			if !slices.ContainsFunc(s.drain(t), func(c *pb.AssignmentChange) bool { return c.GetRemoveProvider() == "bus/1" }) {
				t.Errorf("%s was not told that bus/1 is gone", name)
			}
		}
		fourth.knows(t)
		first.drain(t)
		first.knows(t, "assignment w-1 bus", "node n3", "provider bus", "remote w-1")
	})
}

func TestTheGraceOfAStopReachesTheHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := busWorld(t)
		host := l.watch(t, "n1", 1)
		host.drain(t)
		for _, grace := range []time.Duration{time.Minute, time.Second} {
			r.do(t, &pb.Command{Payload: &pb.Command_SetProviderRunning{SetProviderRunning: &pb.SetProviderRunningCommand{
				ProviderId: "bus", Grace: durationpb.New(grace),
			}}})
			host.drain(t)
			if p := host.known["provider bus"].GetPutProvider(); p.GetDesiredRunning() || p.GetStopGrace().AsDuration() != grace {
				t.Errorf("the host knows %v, want to stop within %s", p, grace)
			}
		}
	})
}

func TestASubscriptionReachesBothSides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := busWorld(t)
		streams := map[string]*agentStream{}
		for _, id := range []string{"n1", "n2", "n3"} {
			streams[id] = l.watch(t, id, 1)
			streams[id].drain(t)
		}
		before := time.Now()
		record := func(subject string, subscribed bool) *pb.RecordSubscriptionResponse {
			t.Helper()
			resp, err := l.RecordSubscription(as(t.Context(), "n2"), r.subscription("n2", "w-1", "bus", subject, subscribed))
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		everywhere := func(want ...string) {
			t.Helper()
			for id, s := range streams {
				s.drain(t)
				if got := s.known["assignment w-1 bus"].GetPutAssignment().GetSubscriptions(); !slices.Equal(got, want) {
					t.Errorf("%s knows the subscriptions %v, want %v", id, got, want)
				}
			}
		}
		if resp := record("orders.*", true); resp.GetExisted() || resp.GetIndex() == 0 {
			t.Errorf("new: %v", resp)
		}
		everywhere("orders.*")
		if !record("orders.*", true).GetExisted() {
			t.Error("repeated, it did not exist")
		}
		if !record("orders.*", false).GetExisted() || record("orders.*", false).GetExisted() {
			t.Error("ended, it existed once")
		}
		everywhere()
		// No timer stands between a commit and the agents: virtual time stood still.
		if took := time.Since(before); took != 0 {
			t.Errorf("the agents heard of it after %s", took)
		}

		stale := r.subscription("n2", "w-1", "bus", "a", true)
		stale.Generation--
		_, err := l.RecordSubscription(as(t.Context(), "n2"), stale)
		wantCode(t, "an older generation", err, conflict)
		stale = r.subscription("n2", "w-1", "bus", "a", true)
		stale.Epoch++
		_, err = l.RecordSubscription(as(t.Context(), "n2"), stale)
		wantCode(t, "another epoch", err, conflict)
		_, err = l.RecordSubscription(as(t.Context(), "n3"), r.subscription("n3", "w-1", "bus", "a", true))
		wantCode(t, "a node without the provider", err, conflict)
	})
}

func TestAnInstanceCannotFloodTheLogWithSubscriptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := busWorld(t)
		change := func(i int) error {
			_, err := l.RecordSubscription(as(t.Context(), "n1"), r.subscription("n1", "w-1", "bus", "a", i%2 == 0))
			return err
		}
		done := 0
		for ; change(done) == nil; done++ {
			if done > 2*subscriptionBurst {
				t.Fatal("it may change its subscriptions without end")
			}
		}
		wantCode(t, "one more", change(done), pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED)
		if done != subscriptionBurst {
			t.Errorf("%d changes at once, want %d", done, subscriptionBurst)
		}
		r.create(t, &pb.WorkloadSpec{Name: "v"}, "v-1")
		r.place(t, "v-1", "n3")
		r.grant(t, "v-1", "bus")
		if _, err := l.RecordSubscription(as(t.Context(), "n1"), r.subscription("n1", "v-1", "bus", "a", true)); err != nil {
			t.Errorf("another instance is refused too: %v", err)
		}
		pass(time.Second)
		if err := change(done); err != nil {
			t.Errorf("a second later: %v", err)
		}
		before := r.state.View().Index()
		_, err := l.RecordSubscription(as(t.Context(), "n1"), r.subscription("n1", "nobody", "bus", "a", true))
		wantCode(t, "no such instance", err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
		if r.state.View().Index() != before {
			t.Error("what is refused is in the log")
		}
	})
}

func TestFullQuotasAreForgotten(t *testing.T) {
	q, now := newQuotas(), time.Unix(1000, 0)
	for i := range fewQuotas {
		if err := q.take(fmt.Sprint(i), now); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.take("late", now.Add(time.Minute)); err != nil || len(q.byInstance) != 1 {
		t.Errorf("%d quotas are kept, %v", len(q.byInstance), err)
	}
}

func TestARevocationReachesTheServingSideAtOnceAlsoUnderANewLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, old := busWorld(t)
		host := old.watch(t, "n1", 1)
		host.drain(t)
		revoke := &pb.Command{Payload: &pb.Command_RevokeCapability{RevokeCapability: &pb.RevokeCapabilityCommand{
			InstanceIds: []string{"w-1"}, ProviderId: "bus",
		}}}
		before := time.Now()
		r.do(t, revoke)
		host.drain(t)
		host.knows(t, "provider bus")
		if took := time.Since(before); took != 0 {
			t.Errorf("it took %s of timers", took)
		}

		// Committed by a leader that falls right after: the next one sends a full set
		// as soon as the agent asks.
		r.grant(t, "w-1", "bus")
		host.drain(t)
		old.peer.setLeader("p2")
		old.stop()
		r.do(t, revoke)
		before = time.Now()
		next := newLead(t, r, "p2").settle(t)
		again := next.watch(t, "n1", 1)
		again.drain(t)
		again.knows(t, "provider bus")
		if took := time.Since(before); took != 0 {
			t.Errorf("the full set took %s of timers", took)
		}
	})
}

func TestRefusedCallsAreReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := busWorld(t)
		resp, err := l.ReportStatus(as(t.Context(), "n3"), &pb.ReportStatusRequest{NodeId: "n3", Epoch: 1, Denials: []*pb.DenialReport{
			{InstanceId: "w-1", ProviderId: "bus", Need: "msg:publish:a", Count: 2},
		}})
		if err != nil {
			t.Fatal(err)
		}
		events := r.state.View().Events(0, 0)
		if last := events[len(events)-1]; last.GetKind() != pb.EventKind_EVENT_KIND_CAPABILITY_DENIED || last.GetIndex() != resp.GetIndex() {
			t.Errorf("the last fact is %v", last)
		}
	})
}
