package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// RecordSubscription commits a subscription and streams it, as the leader does.
func (p *fakePeer) RecordSubscription(_ context.Context, req *pb.RecordSubscriptionRequest) (*pb.RecordSubscriptionResponse, error) {
	if err := p.enter("RecordSubscription"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	if err := p.alive(req.GetEpoch()); err != nil {
		p.mu.Unlock()
		return nil, err
	}
	a := p.set.grants[assignmentKey{req.GetInstanceId(), req.GetProviderId()}]
	p.mu.Unlock()
	if a == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "not granted")
	}
	next := &pb.CapabilityAssignment{}
	proto.Merge(next, a)
	next.Subscriptions = slices.DeleteFunc(next.Subscriptions, func(s string) bool { return s == req.GetSubject() })
	existed := len(next.Subscriptions) < len(a.GetSubscriptions())
	if req.GetSubscribed() {
		next.Subscriptions = append(next.Subscriptions, req.GetSubject())
	}
	p.put(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: next}})
	return &pb.RecordSubscriptionResponse{Existed: existed}, nil
}

// bus is a messaging provider of a node, and what an instance may do there.
func bus(node string) *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutProvider{PutProvider: &pb.Provider{
		Id: "bus", Spec: &pb.ProviderSpec{Id: "bus", Type: "messaging"}, Placement: &pb.Placement{NodeId: node, Generation: 1},
	}}}
}

func grantBus(instance string, subscriptions ...string) *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: &pb.CapabilityAssignment{
		InstanceId: instance, ProviderId: "bus", Permissions: []string{"msg:subscribe:jobs.>"}, Subscriptions: subscriptions,
	}}}
}

func TestASubscriptionIsRecordedAtTheLeader(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(bus(testNode), grantBus("web-1"), putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		desk := agent.hosting.messages
		call := provider.Call{Instance: "web-1", Name: "web", Generation: 1}
		record := func(subject string, subscribed bool) (bool, error) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			return desk.Record(ctx, call, "bus", subject, subscribed)
		}
		if existed, err := record("jobs.*", true); existed || err != nil {
			t.Fatalf("got %t, %v", existed, err)
		}
		if subs := desk.Subscriptions("bus"); len(subs) != 1 || subs[0].Instance != "web-1" || subs[0].Subject != "jobs.*" || subs[0].Node != testNode {
			t.Errorf("when Record has answered the node knows %v", subs)
		}

		// The leader is cut off: the record waits for the next session.
		leader.isolate(false)
		done := make(chan error, 1)
		go func() {
			_, err := record("jobs.a", true)
			done <- err
		}()
		<-time.After(2 * time.Second)
		leader.heal()
		if err := <-done; err != nil {
			t.Errorf("after the leader came back: %v", err)
		}

		if existed, err := record("jobs.*", false); !existed || err != nil {
			t.Errorf("ending it: %t, %v", existed, err)
		}
		call.Instance = "other-1"
		if _, err := record("jobs.*", true); !errors.Is(err, provider.ErrDenied) {
			t.Errorf("a refusal is final: %v", err)
		}
		leader.isolate(false)
		call.Instance = "web-1"
		if _, err := record("jobs.b", true); !errors.Is(err, provider.ErrTimeout) {
			t.Errorf("without a leader: %v", err)
		}
		leader.heal()
	})
}

func TestMayDeliver(t *testing.T) {
	permissions, err := permission.ParseSet([]string{"msg:subscribe:jobs.>"})
	if err != nil {
		t.Fatal(err)
	}
	d := provider.NewDirectory(testNode)
	d.Replace(provider.Records{
		Instances: []provider.InstanceRecord{
			{ID: "web-1", Name: "web", Node: testNode, Generation: 1}, {ID: "far-1", Name: "far", Node: "n3", Generation: 1},
		},
		Providers: []provider.ProviderRecord{
			{ID: "bus", Type: "messaging", Node: "n2"}, {ID: "bus", Replica: 1, Type: "messaging", Node: "n3"}, {ID: "kv", Type: "kv", Node: "n2"},
		},
		Assignments: []provider.Assignment{
			{Instance: "web-1", Provider: "bus", Permissions: permissions, Subscriptions: []string{"jobs.*", "news.*"}},
			{Instance: "web-1", Provider: "kv", Permissions: permissions, Subscriptions: []string{"jobs.*"}},
		},
	})
	for name, c := range map[string]struct {
		node, instance, id, subject, subscription string
		want                                      pb.ErrorCode
	}{
		"as it should be":               {"n2", "web-1", "bus", "jobs.a", "jobs.*", 0},
		"by another replica":            {"n3", "web-1", "bus", "jobs.a", "jobs.*", 0},
		"by another node":               {"n4", "web-1", "bus", "jobs.a", "jobs.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"of no messaging provider":      {"n2", "web-1", "kv", "jobs.a", "jobs.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"of an unknown provider":        {"n2", "web-1", "what", "jobs.a", "jobs.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"to an unknown instance":        {"n2", "web-2", "bus", "jobs.a", "jobs.*", pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND},
		"to an instance elsewhere":      {"n2", "far-1", "bus", "jobs.a", "jobs.*", pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND},
		"for no subscription of its":    {"n2", "web-1", "bus", "jobs.a", "jobs.>", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"without a permission any more": {"n2", "web-1", "bus", "news.a", "news.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"with another subject":          {"n2", "web-1", "bus", "jobs.a.b", "jobs.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
		"with a wildcard for subject":   {"n2", "web-1", "bus", "jobs.*", "jobs.*", pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
	} {
		err := mayDeliver(d, c.node, c.instance, &pb.Message{Provider: c.id, Subject: c.subject, Subscription: c.subscription})
		if apierror.CodeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// reply answers a message with its content.
func reply(_ context.Context, _ runtime.Spec, _ runtime.Host, handler runtime.Handler, payload []byte) ([]byte, error) {
	m := &pb.Message{}
	if err := proto.Unmarshal(payload, m); err != nil || handler != runtime.HandlerMessage {
		return nil, runtime.ErrNoHandler
	}
	return proto.Marshal(&pb.MessageResult{Reply: m.GetPayload(), Reason: m.GetSubject()})
}

func TestAMessageComesFromAnotherNode(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(bus("n2"), grantBus("web-1", "jobs.*"), putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.OnInvoke(reply)
		client := agent.serve(t)
		req := &pb.DeliverMessageRequest{InstanceId: "web-1", Message: &pb.Message{
			Provider: "bus", Subject: "jobs.a", Subscription: "jobs.*", Payload: []byte("hi"), Delivery: 1,
		}}
		resp, err := client.DeliverMessage(as(t.Context(), asWorker), req)
		if err != nil || string(resp.GetResult().GetReply()) != "hi" || resp.GetResult().GetReason() != "jobs.a" {
			t.Errorf("got %v, %v", resp, err)
		}
		for _, caller := range []string{asAdmin, asPeer, "node/n3/worker"} {
			if _, err := client.DeliverMessage(as(t.Context(), caller), req); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
				t.Errorf("%s: %v", caller, err)
			}
		}
		leader.put(grantBus("web-1"))
		within(t, time.Second, "the subscription has ended", func() bool { return len(agent.directory.Subscriptions("bus")) == 0 })
		if _, err := client.DeliverMessage(as(t.Context(), asWorker), req); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
			t.Errorf("after its end: %v", err)
		}
	})
}

// farAgent is a connection to another node's agent, which answers with what it got.
type farAgent struct{ grpc.ClientConnInterface }

func (farAgent) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	req, sent := args.(*pb.DeliverMessageRequest)
	resp, expected := reply.(*pb.DeliverMessageResponse)
	if _, bounded := ctx.Deadline(); !sent || !expected || !bounded || method != pb.NodeAgentService_DeliverMessage_FullMethodName {
		return errors.New("not a delivery within a deadline")
	}
	if req.GetInstanceId() == "busy-1" {
		return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "busy")
	}
	resp.Result = &pb.MessageResult{Reply: []byte(req.GetInstanceId() + " " + req.GetMessage().GetSubject())}
	return nil
}

func TestAMessageGoesWhereItsInstanceRuns(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n, func(cfg *Config) {
			cfg.Conn = func(address string) (grpc.ClientConnInterface, error) {
				if address == "n2-agent" {
					return farAgent{}, nil
				}
				return n.dial(address)
			}
		}))
		leader.put(bus(testNode), grantBus("web-1", "jobs.*"), putInstance(instance(leader, "web-1")),
			&pb.AssignmentChange{Change: &pb.AssignmentChange_PutNode{PutNode: &pb.NodeAddress{NodeId: "n2", AgentAddress: "n2-agent"}}})
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.OnInvoke(reply)
		message, err := proto.Marshal(&pb.Message{Provider: "bus", Subject: "jobs.a", Payload: []byte("hi")})
		if err != nil {
			t.Fatal(err)
		}
		desk := agent.hosting.messages
		answer, err := desk.Deliver(t.Context(), provider.Subscription{Instance: "web-1", Node: testNode}, message)
		got := &pb.MessageResult{}
		if err != nil || proto.Unmarshal(answer, got) != nil || string(got.GetReply()) != "hi" {
			t.Errorf("here: %v, %v", got, err)
		}
		answer, err = desk.Deliver(t.Context(), provider.Subscription{Instance: "web-2", Node: "n2"}, message)
		if err != nil || proto.Unmarshal(answer, got) != nil || string(got.GetReply()) != "web-2 jobs.a" {
			t.Errorf("there: %v, %v", got, err)
		}
		for name, c := range map[string]struct {
			to   provider.Subscription
			want error
		}{
			"an instance that is gone": {provider.Subscription{Instance: "web-9", Node: testNode}, provider.ErrInstanceNotFound},
			"a busy one elsewhere":     {provider.Subscription{Instance: "busy-1", Node: "n2"}, provider.ErrExhausted},
			"an unknown node":          {provider.Subscription{Instance: "web-2", Node: "n7"}, provider.ErrUnavailable},
		} {
			if _, err := desk.Deliver(t.Context(), c.to, message); !errors.Is(err, c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestAStandaloneAgentKeepsSubscriptions(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, _ pb.NodeAgentServiceClient, ctx context.Context) {
		withBus := func(cfg *Config) { cfg.Providers = []*pb.ProviderSpec{{Id: "bus", Type: "messaging"}} }
		agent = agent.again(withBus)
		client := agent.serve(t)
		spec := workload(t, client, ctx, func(s *pb.WorkloadSpec) {
			s.Capabilities = []*pb.CapabilityGrant{{Provider: "bus", Permissions: []string{"msg:subscribe:jobs.>"}}}
			s.Triggers = []*pb.Trigger{{Trigger: &pb.Trigger_Subscribe{Subscribe: "jobs.spec"}}, {Trigger: &pb.Trigger_Subscribe{Subscribe: "other"}}}
		})
		resp, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		call := provider.Call{Instance: resp.GetInstances()[0].GetId(), Generation: 1}
		record := func(subject string, subscribed bool) bool {
			t.Helper()
			existed, err := agent.hosting.messages.Record(ctx, call, "bus", subject, subscribed)
			if err != nil {
				t.Fatal(err)
			}
			return existed
		}
		subjects := func() string {
			var out []string
			for _, s := range agent.hosting.messages.Subscriptions("bus") {
				out = append(out, s.Subject)
			}
			return strings.Join(out, " ")
		}
		if record("jobs.b", true) || !record("jobs.b", true) || record("jobs.a", true) || !record("jobs.b", false) {
			t.Error("existed is wrong")
		}
		if got := subjects(); got != "jobs.a jobs.spec" {
			t.Errorf("subscribed to %q", got)
		}
		agent = agent.again()
		if got := subjects(); got != "jobs.a jobs.spec" {
			t.Errorf("after a restart subscribed to %q", got)
		}
	})
}
