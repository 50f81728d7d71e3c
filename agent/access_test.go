package agent

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// fakeStream is the server's side of any stream.
type fakeStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a gRPC stream hands out its context by a method
}

func (s *fakeStream) Context() context.Context { return s.ctx }

// TestEveryMethodIsGuarded goes over the methods of the service description, so
// that a new one cannot be forgotten.
func TestEveryMethodIsGuarded(t *testing.T) {
	workersMay := map[string]bool{"InvokeCapability": true, "ReadClock": true}
	onlyWorkers := map[string]bool{"DeliverMessage": true}
	callers := map[string]struct {
		subject  *identity.Subject
		operator bool
		worker   bool
	}{
		"nobody":            {},
		"a worker":          {&identity.Subject{Cluster: "c", Kind: identity.Node, Name: "n2", Role: identity.RoleWorker}, false, true},
		"a peer":            {&identity.Subject{Cluster: "c", Kind: identity.Node, Name: "p1", Role: identity.RoleServer}, true, false},
		"a peer and worker": {&identity.Subject{Cluster: "c", Kind: identity.Node, Name: "p1", Role: identity.RoleBoth}, true, true},
		"an administrator":  {&identity.Subject{Cluster: "c", Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}, true, false},
		"a user of no role": {&identity.Subject{Cluster: "c", Kind: identity.User, Name: "bob"}, false, false},
	}
	desc := guarded(pb.NodeAgentService_ServiceDesc, rules())
	reached := false
	for name, c := range callers {
		ctx := context.Background()
		if c.subject != nil {
			ctx = identity.WithCaller(ctx, *c.subject)
		}
		check := func(method string, err error) {
			t.Helper()
			allowed := c.operator && !onlyWorkers[method] || c.worker && (workersMay[method] || onlyWorkers[method])
			if allowed != reached || !allowed && apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
				t.Errorf("%s calls %s: reached %t, want %t (%v)", name, method, reached, allowed, err)
			}
		}
		for _, m := range desc.Methods {
			reached = false
			intercept := func(ctx context.Context, _ any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
				return next(ctx, nil)
			}
			// The handler gets no request: only what is allowed comes as far as to panic.
			_, err := func() (_ any, err error) {
				defer func() { reached = recover() != nil || err == nil }()
				return m.Handler(&service{}, ctx, func(any) error { return nil }, intercept)
			}()
			check(m.MethodName, err)
		}
		for _, s := range desc.Streams {
			reached = false
			err := func() (err error) {
				defer func() { reached = recover() != nil }()
				return s.Handler(&service{}, &fakeStream{ctx: ctx})
			}()
			check(s.StreamName, err)
		}
	}
	if total := len(desc.Methods) + len(desc.Streams); total != 11 {
		t.Fatalf("the service has %d methods; decide who may call the new ones", total)
	}
}

func TestAMethodWithoutARuleIsClosed(t *testing.T) {
	ctx := identity.WithCaller(context.Background(), identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin})
	if err := authorise(ctx, "New", rules()["New"]); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Fatalf("got %v", err)
	}
}

func TestAccessOverTheWire(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		client := agent.serve(t)
		query := &pb.QueryInstanceRequest{Target: "web-1"}
		for caller, want := range map[string]pb.ErrorCode{
			asAdmin: 0, asPeer: 0, asWorker: pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
		} {
			_, err := client.QueryInstance(as(t.Context(), caller), query)
			if apierror.CodeOf(err) != want {
				t.Errorf("%s: %v", caller, err)
			}
		}
		if _, err := client.QueryInstance(t.Context(), query); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
			t.Errorf("nobody: %v", err)
		}
		logs, err := client.FollowLogs(as(t.Context(), asWorker), &pb.FollowLogsRequest{Targets: []string{"web-1"}})
		if err == nil {
			_, err = logs.Recv()
		}
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
			t.Errorf("a worker's FollowLogs: %v", err)
		}
	})
}
