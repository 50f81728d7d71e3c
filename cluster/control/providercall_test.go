package control

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// replicated is a peer with a messaging provider that runs on the nodes n1 and n2.
func replicated(t *testing.T, first, second *fakeAgent) *testPeer {
	t.Helper()
	p := newPeer(t)
	p.addNode("n1", first)
	p.addNode("n2", second)
	if _, err := p.client.RegisterProvider(asAlice(t.Context()), &pb.RegisterProviderRequest{Spec: &pb.ProviderSpec{
		Id: "bus", Type: "messaging", Driver: "nats", Replicas: 2,
	}}); err != nil {
		t.Fatal(err)
	}
	p.runReplica("bus", 0, "n1", pb.ProviderState_PROVIDER_STATE_RUNNING)
	p.runReplica("bus", 1, "n2", pb.ProviderState_PROVIDER_STATE_RUNNING)
	return p
}

func unreachable(t *testing.T) grpc.ClientConnInterface {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:gone", grpc.WithTransportCredentials(noCredentials), grpc.WithContextDialer(refuseToDial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestTheReplicasOfAProviderAreShown(t *testing.T) {
	p := replicated(t, &fakeAgent{}, &fakeAgent{})
	ctx := asAlice(t.Context())
	got, err := p.client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: "bus"})
	if err != nil || len(got.GetReplicas()) != 2 || got.GetProvider().GetReplica() != 0 ||
		got.GetReplicas()[1].GetPlacement().GetNodeId() != "n2" {
		t.Errorf("get: %v, %v", got, err)
	}
	list, err := p.client.ListProviders(ctx, &pb.ListProvidersRequest{})
	if err != nil || len(list.GetProviders()) != 2 {
		t.Errorf("list: %v, %v", list, err)
	}
	stopped, err := p.client.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: "bus", Grace: durationpb.New(3 * time.Second)})
	if err != nil || stopped.GetProvider().GetDesiredRunning() {
		t.Errorf("stop: %v, %v", stopped, err)
	}
	for _, r := range p.state.View().ProviderReplicas("bus") {
		if r.GetDesiredRunning() || r.GetStopGrace().AsDuration() != 3*time.Second {
			t.Errorf("replica %v", r)
		}
	}
}

func TestCallProviderTriesAnotherReplicaOnlyWhenTheCallHadNoEffect(t *testing.T) {
	fails := func(e *apierror.Error) func(*testing.T, *testPeer, *fakeAgent) {
		return func(_ *testing.T, _ *testPeer, a *fakeAgent) {
			a.call = func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
				return nil, e
			}
		}
	}
	unavailable := func() *apierror.Error { return apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "it drains") }
	for _, test := range []struct {
		name  string
		spoil func(*testing.T, *testPeer, *fakeAgent)
		again bool
		code  pb.ErrorCode
	}{
		{"not reached", func(t *testing.T, p *testPeer, _ *fakeAgent) {
			t.Helper()
			p.connect("n1", unreachable(t))
		}, true, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
		{"not there", fails(apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "not here")), true, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND},
		{"not serving", fails(unavailable()), true, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE},
		{"broken off", fails(unavailable().With("outcome", "unknown")), false, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE},
		{"reached and then broken", fails(apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "broke")), false, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
		{"refused", fails(apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "full")), false, pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED},
		{"out of time", fails(apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "late")), false, pb.ErrorCode_ERROR_CODE_TIMEOUT},
	} {
		t.Run(test.name, func(t *testing.T) {
			var served atomic.Int64
			good := &fakeAgent{call: func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
				served.Add(1)
				return &pb.InvokeCapabilityResponse{}, nil
			}}
			bad := &fakeAgent{}
			p := replicated(t, bad, good)
			test.spoil(t, p, bad)
			failures := 0
			for range 40 {
				_, err := p.client.CallProvider(asAlice(t.Context()), &pb.CallProviderRequest{ProviderId: "bus", Capability: "messaging", Operation: "publish"})
				if err != nil {
					failures++
					wantCode(t, err, test.code)
				}
			}
			if test.again && failures > 0 {
				t.Errorf("%d of 40 calls failed, although another replica could serve", failures)
			}
			if !test.again && (failures == 0 || int(served.Load())+failures != 40) {
				t.Errorf("%d of 40 calls failed and %d were served: some were repeated", failures, served.Load())
			}
		})
	}
}

func TestACallGoesToTheReplicaThatRuns(t *testing.T) {
	p := replicated(t, &fakeAgent{}, &fakeAgent{call: func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
		return &pb.InvokeCapabilityResponse{Payload: []byte("n2")}, nil
	}})
	p.apply(&pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n1", Epoch: 1}}})
	req := &pb.CallProviderRequest{ProviderId: "bus", Capability: "messaging", Operation: "publish"}
	for range 20 {
		if resp, err := p.client.CallProvider(asAlice(t.Context()), req); err != nil || string(resp.GetPayload()) != "n2" {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	p.apply(&pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n2", Epoch: 1}}})
	ctx, cancel := context.WithTimeout(asAlice(t.Context()), 20*time.Second)
	defer cancel()
	_, err := p.client.CallProvider(ctx, req)
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE)
	if e := apierror.From(err); e.Detail("state") != "PENDING" || e.Detail("bus/1") == "" {
		t.Errorf("the replicas are not told: %v", e.Proto(ctx))
	}
}

// sends makes an agent confirm a subscription, send one message, and go on until
// its caller leaves.
func sends(text string, left chan<- struct{}) *fakeAgent {
	return &fakeAgent{messages: func(req *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
		if err := stream.Send(&pb.SubscribeMessagesResponse{}); err != nil {
			return err
		}
		m := &pb.Message{Subject: req.GetSubject(), Payload: []byte(text)}
		if err := stream.Send(&pb.SubscribeMessagesResponse{Message: m, Dropped: 2}); err != nil {
			return err
		}
		<-stream.Context().Done()
		left <- struct{}{}
		return stream.Context().Err()
	}}
}

func TestSubscribeMessagesRelaysARunningReplica(t *testing.T) {
	left := make(chan struct{}, 4)
	p := replicated(t, &fakeAgent{}, sends("hello", left))
	p.connect("n1", unreachable(t))
	p.loseLeader()
	for range 10 { // either replica may be tried first
		ctx, cancel := context.WithTimeout(asAlice(t.Context()), 20*time.Second)
		stream, err := p.client.SubscribeMessages(ctx, &pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: "orders.*"})
		if err != nil {
			t.Fatal(err)
		}
		first, err := stream.Recv()
		if err != nil || first.GetMessage() != nil {
			t.Fatalf("first answer %v, %v", first, err)
		}
		second, err := stream.Recv()
		if err != nil || string(second.GetMessage().GetPayload()) != "hello" || second.GetMessage().GetSubject() != "orders.*" || second.GetDropped() != 2 {
			t.Fatalf("second answer %v, %v", second, err)
		}
		cancel()
		select {
		case <-left:
		case <-time.After(10 * time.Second):
			t.Fatal("the agent's stream goes on without a listener")
		}
	}
}

func TestSubscribeMessagesEndsWithWhatTheAgentSays(t *testing.T) {
	breaks := &fakeAgent{messages: func(_ *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
		if err := stream.Send(&pb.SubscribeMessagesResponse{}); err != nil {
			return err
		}
		return apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "it was stopped")
	}}
	p := replicated(t, breaks, breaks)
	p.addProvider("store", "kv")
	receive := func(ctx context.Context, req *pb.SubscribeMessagesRequest) (n int, err error) {
		stream, err := p.client.SubscribeMessages(ctx, req)
		for ; err == nil; n++ {
			_, err = stream.Recv()
		}
		return n - 1, err
	}
	ctx := asAlice(t.Context())
	n, err := receive(ctx, &pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: "a"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE)
	if n != 1 {
		t.Errorf("%d answers: another replica was asked after the first had begun", n)
	}
	for name, c := range map[string]struct {
		req  *pb.SubscribeMessagesRequest
		code pb.ErrorCode
	}{
		"no such provider": {&pb.SubscribeMessagesRequest{ProviderId: "nothing", Subject: "a"}, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND},
		"a kv":             {&pb.SubscribeMessagesRequest{ProviderId: "store", Subject: "a"}, invalidRequest},
		"no subject":       {&pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: "a..b"}, invalidRequest},
		"an empty subject": {&pb.SubscribeMessagesRequest{ProviderId: "bus"}, invalidRequest},
	} {
		if n, err := receive(ctx, c.req); apierror.CodeOf(err) != c.code || n != 0 {
			t.Errorf("%s: %d answers and %v, want %v", name, n, err, c.code)
		}
	}
	_, err = receive(as(t.Context(), identity.Subject{Cluster: "test", Kind: identity.Node, Name: "w1", Role: identity.RoleWorker}),
		&pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: "a"})
	wantCode(t, err, denied)
}

func TestSubscribeMessagesEndsWithThePeer(t *testing.T) {
	left := make(chan struct{}, 1)
	agent := sends("hello", left)
	p := replicated(t, agent, agent)
	stream, err := p.client.SubscribeMessages(asAlice(t.Context()), &pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	p.service.Close()
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, io.EOF) {
		t.Fatal("the stream ended as if there were no more messages")
	}
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE)
	<-left
}
