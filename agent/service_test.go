package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// served is an agent with one running instance behind its service.
func served(t *testing.T, f func(t *testing.T, agent *node, leader *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context)) {
	t.Helper()
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		f(t, agent, leader, agent.serve(t), as(t.Context(), asPeer))
	})
}

func invoke(id, payload string) *pb.InvokeInstanceRequest {
	return &pb.InvokeInstanceRequest{InstanceId: id, Request: &pb.InvokeRequest{Target: "web", Payload: []byte(payload), ContentType: "text/plain"}}
}

func TestInvokeHandsTheRequestOverAndTheAnswerBack(t *testing.T) {
	served(t, func(t *testing.T, agent *node, _ *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		agent.fake.OnInvoke(func(_ context.Context, _ runtime.Spec, _ runtime.Host, h runtime.Handler, payload []byte) ([]byte, error) {
			req := &pb.InvokeRequest{}
			if err := proto.Unmarshal(payload, req); err != nil || h != runtime.HandlerInvoke {
				return nil, fmt.Errorf("%s: %w", h, err)
			}
			return proto.Marshal(&pb.InvokeResponse{
				Payload: []byte(req.GetTarget() + " " + string(req.GetPayload())), ContentType: req.GetContentType(), InstanceId: "a lie",
			})
		})
		resp, err := client.InvokeInstance(ctx, invoke("web-1", "hello"))
		if err != nil {
			t.Fatal(err)
		}
		want := &pb.InvokeResponse{Payload: []byte("web hello"), ContentType: "text/plain", InstanceId: "web-1", NodeId: testNode}
		if !proto.Equal(resp.GetResponse(), want) {
			t.Fatalf("got %v, want %v", resp.GetResponse(), want)
		}
	})
}

func TestInvokeErrors(t *testing.T) {
	answer := func(err error) runtimeFunc {
		return func(context.Context, runtime.Spec, runtime.Host, runtime.Handler, []byte) ([]byte, error) {
			return nil, err
		}
	}
	hang := func(ctx context.Context, _ runtime.Spec, _ runtime.Host, _ runtime.Handler, _ []byte) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	for _, c := range []struct {
		name   string
		id     string
		guest  runtimeFunc
		code   pb.ErrorCode
		detail [2]string
		text   string
	}{
		{"not here", "web-9", nil, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, [2]string{"node", testNode}, "web-9"},
		{"busy", "web-1", answer(fmt.Errorf("no slot: %w", runtime.ErrBusy)), pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, [2]string{}, "no slot"},
		{"too slow", "web-1", answer(fmt.Errorf("after 2s: %w", runtime.ErrTimeLimit)), pb.ErrorCode_ERROR_CODE_TIMEOUT, [2]string{"exit_reason", "TIME_LIMIT"}, "after 2s"},
		{"crashed", "web-1", answer(fmt.Errorf("unreachable in f3: %w", runtime.ErrCrashed)), pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, [2]string{"exit_reason", "CRASHED"}, "unreachable in f3"},
		{"no handler", "web-1", answer(runtime.ErrNoHandler), pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, [2]string{}, "no such handler"},
		{"the caller's deadline", "web-1", hang, pb.ErrorCode_ERROR_CODE_TIMEOUT, [2]string{}, ""},
		{"a senseless answer", "web-1", func(context.Context, runtime.Spec, runtime.Host, runtime.Handler, []byte) ([]byte, error) {
			return []byte{0xff}, nil
		}, pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, [2]string{"instance", "web-1"}, "not an InvokeResponse"},
	} {
		t.Run(c.name, func(t *testing.T) {
			served(t, func(t *testing.T, agent *node, _ *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
				agent.fake.OnInvoke(c.guest)
				ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				_, err := client.InvokeInstance(ctx, invoke(c.id, "x"))
				e := apierror.From(err)
				if e == nil || e.Code() != c.code || !strings.Contains(e.Error(), c.text) {
					t.Fatalf("got %v", err)
				}
				if c.detail[0] != "" && e.Detail(c.detail[0]) != c.detail[1] {
					t.Fatalf("detail %s is %q", c.detail[0], e.Detail(c.detail[0]))
				}
			})
		})
	}
}

type runtimeFunc = func(context.Context, runtime.Spec, runtime.Host, runtime.Handler, []byte) ([]byte, error)

func TestInvokeOfWhatDoesNotRunTellsItsState(t *testing.T) {
	served(t, func(t *testing.T, agent *node, leader *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		agent.fake.Crash("web-1", trap)
		within(t, 500*time.Millisecond, "it waits", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		_, err := client.InvokeInstance(ctx, invoke("web-1", "x"))
		e := apierror.From(err)
		if e.Code() != pb.ErrorCode_ERROR_CODE_CONFLICT || e.Detail("state") != "INSTANCE_STATE_CRASHED" ||
			e.Detail("status") != "unreachable" || e.Detail("next_retry_at") == "" {
			t.Fatalf("got %v", e.Proto(ctx))
		}
	})
}

func TestTheCorrelationIDGoesThroughTheGuest(t *testing.T) {
	served(t, func(t *testing.T, agent *node, _ *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		var failure *pb.Error
		agent.fake.OnInvoke(func(ctx context.Context, spec runtime.Spec, host runtime.Host, _ runtime.Handler, _ []byte) ([]byte, error) {
			request, _ := proto.Marshal(&pb.LogWriteRequest{Message: "from the guest"})
			if _, err := host.Call(ctx, "log", "write", request); err != nil {
				return nil, err
			}
			fmt.Fprintln(spec.Stdout, "printed")
			_, err := host.Call(ctx, "kv", "get", nil)
			var f *runtime.Failure
			if !errors.As(err, &f) {
				return nil, fmt.Errorf("no failure: %w", err)
			}
			failure = &pb.Error{}
			if err := proto.Unmarshal(f.Encoded, failure); err != nil || uint32(failure.GetCode()) != f.Code {
				return nil, fmt.Errorf("code %d: %w", f.Code, err)
			}
			answer, err := host.Call(ctx, "context", "get", nil)
			if err != nil {
				return nil, err
			}
			about := &pb.ContextGetResponse{}
			if err := proto.Unmarshal(answer, about); err != nil {
				return nil, err
			}
			return proto.Marshal(&pb.InvokeResponse{ContentType: about.String()})
		})
		ctx = metadata.AppendToOutgoingContext(ctx, correlation.Header, "call-7")
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		resp, err := client.InvokeInstance(ctx, invoke("web-1", "x"))
		if err != nil {
			t.Fatal(err)
		}
		if failure.GetCorrelationId() != "call-7" || failure.GetTimestamp() == nil {
			t.Errorf("the failure of a capability call is %v", failure)
		}
		about := resp.GetResponse().GetContentType()
		for _, part := range []string{`"web-1"`, `"web"`, "generation:1", `"call-7"`, "deadline_ms:5000"} {
			if !strings.Contains(strings.ReplaceAll(about, ":  ", ":"), part) {
				t.Errorf("the context %s lacks %s", about, part)
			}
		}
		for _, e := range logged(t, client, ctx, "web-1") {
			if e.GetStream() != pb.LogStream_LOG_STREAM_SYSTEM && e.GetCorrelationId() != "call-7" {
				t.Errorf("a line of the call carries %q: %v", e.GetCorrelationId(), e)
			}
		}
	})
}

// logged returns the kept lines of an instance.
func logged(t *testing.T, client pb.NodeAgentServiceClient, ctx context.Context, target string) []*pb.LogEntry {
	t.Helper()
	stream, err := client.FollowLogs(ctx, &pb.FollowLogsRequest{Targets: []string{target}})
	if err != nil {
		t.Fatal(err)
	}
	var out []*pb.LogEntry
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, msg.GetEntry())
	}
}

func TestQueryAndList(t *testing.T) {
	served(t, func(t *testing.T, agent *node, leader *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		grant := &pb.CapabilityAssignment{InstanceId: "web-1", ProviderId: "kv", Permissions: []string{"kv:read"}, Bucket: "web"}
		job := func(inst *pb.Instance) { inst.Name, inst.Spec.Name = "job", "job" }
		leader.put(
			putInstance(instance(leader, "web-2")), putInstance(instance(leader, "job-1", job, stopped)),
			&pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: grant}},
		)
		within(t, time.Second, "both run", agent.running("web-1", "web-2"))
		if _, err := agent.Invoke(ctx, "web-1", runtime.HandlerHTTP, nil); err != nil {
			t.Fatal(err)
		}
		resp, err := client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: "web-1"})
		if err != nil {
			t.Fatal(err)
		}
		if st := resp.GetInstance().GetStatus(); st.GetState() != stateRunning || st.GetUsage().GetInvocations() != 1 {
			t.Fatalf("status %v", st)
		}
		if len(resp.GetAssignments()) != 1 || !proto.Equal(resp.GetAssignments()[0], grant) {
			t.Fatalf("assignments %v", resp.GetAssignments())
		}
		if leader.reported("web-1").GetUsage() != nil {
			t.Fatal("resource use was reported to the registry")
		}
		for target, want := range map[string]pb.ErrorCode{
			"job": 0, "jo": 0, "web": pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"we": pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "nix": pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND,
		} {
			if _, err := client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: target}); apierror.CodeOf(err) != want {
				t.Errorf("query of %q: %v", target, err)
			}
		}
		for _, c := range []struct {
			req  *pb.ListInstancesRequest
			want []string
			next string
		}{
			{&pb.ListInstancesRequest{}, []string{"job-1", "web-1", "web-2"}, ""},
			{&pb.ListInstancesRequest{PageSize: 2}, []string{"job-1", "web-1"}, "web-1"},
			{&pb.ListInstancesRequest{PageSize: 2, PageToken: "web-1"}, []string{"web-2"}, ""},
			{&pb.ListInstancesRequest{Name: "web"}, []string{"web-1", "web-2"}, ""},
			{&pb.ListInstancesRequest{NodeId: "n9"}, nil, ""},
			{&pb.ListInstancesRequest{States: []pb.InstanceState{stateStopped}}, []string{"job-1"}, ""},
		} {
			resp, err := client.ListInstances(ctx, c.req)
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, inst := range resp.GetInstances() {
				ids = append(ids, inst.GetId())
			}
			if !slices.Equal(ids, c.want) || resp.GetNextPageToken() != c.next {
				t.Errorf("%v lists %v and goes on at %q", c.req, ids, resp.GetNextPageToken())
			}
		}
	})
}

func TestInAClusterWorkloadsGoToTheControlPlane(t *testing.T) {
	served(t, func(t *testing.T, _ *node, _ *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		_, start := client.StartInstance(ctx, &pb.StartInstanceRequest{})
		_, stop := client.StopInstance(ctx, &pb.StopInstanceRequest{})
		up, err := client.UploadModule(ctx)
		if err == nil {
			_, err = up.CloseAndRecv()
		}
		for _, err := range []error{start, stop, err} {
			if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT {
				t.Errorf("got %v", err)
			}
		}
	})
}
