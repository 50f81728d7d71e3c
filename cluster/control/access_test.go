package control

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func methods() map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	list := pb.File_wasmatrix_v1_control_proto.Services().ByName("ControlPlaneService").Methods()
	for i := range list.Len() {
		all[fullMethod(string(list.Get(i).Name()))] = list.Get(i)
	}
	return all
}

func TestTheAccessTableNamesEveryCallAndNothingElse(t *testing.T) {
	want := slices.Sorted(maps.Keys(methods()))
	got := slices.Sorted(maps.Keys(access))
	if !slices.Equal(got, want) {
		t.Errorf("the table has %v, the service %v", got, want)
	}
}

func TestWhoMayCallWhat(t *testing.T) {
	p := newPeer(t)
	// A caller whose identity the server cannot read has none.
	viewer := identity.Subject{Cluster: "test", Kind: identity.User, Name: "mallory", Role: "viewer"}
	for full, method := range methods() {
		for _, test := range []struct {
			who    string
			caller identity.Subject
			allow  bool
		}{
			{"nobody", identity.Subject{}, false},
			{"a user of an unknown role", viewer, false},
			{"a worker", worker, full == pb.ControlPlaneService_FetchModule_FullMethodName},
			{"a peer", server, full == pb.ControlPlaneService_FetchModule_FullMethodName},
			{"an admin", alice, true},
		} {
			err := call(as(t.Context(), test.caller), p.conn, full, method)
			denied := apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
			if denied == test.allow {
				t.Errorf("%s by %s: %v, want allowed %v", method.Name(), test.who, err, test.allow)
			}
			if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR {
				t.Errorf("%s by %s with an empty request: %v", method.Name(), test.who, err)
			}
		}
	}
}

func TestACallThatTheTableDoesNotKnowIsRefused(t *testing.T) {
	ctx := identity.WithCaller(t.Context(), alice)
	if err := authorise(ctx, fullMethod("StartInstance")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, authorise(ctx, fullMethod("AddedLater")), pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED)
}

// call makes a call of any kind with an empty request and returns its error.
func call(ctx context.Context, conn *grpc.ClientConn, full string, method protoreflect.MethodDescriptor) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var in, out proto.Message = dynamicpb.NewMessage(method.Input()), dynamicpb.NewMessage(method.Output())
	if !method.IsStreamingClient() && !method.IsStreamingServer() {
		return conn.Invoke(ctx, full, in, out)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{
		ServerStreams: method.IsStreamingServer(), ClientStreams: method.IsStreamingClient(),
	}, full)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(in); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	for {
		switch err := stream.RecvMsg(out); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case !method.IsStreamingServer():
			return nil
		}
	}
}

func TestChangesAreAuditedAndReadsAreNot(t *testing.T) {
	p := newPeer(t)
	p.start("web", 1)
	if _, err := p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{}); err != nil {
		t.Fatal(err)
	}
	_, _ = p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: "nothing", RequestId: "r1"})
	_, _ = p.client.DrainNode(as(t.Context(), worker), &pb.DrainNodeRequest{NodeId: "n1"})
	var audit []string
	for _, line := range p.audit.lines() {
		if _, rest, ok := strings.Cut(line, "msg=audit "); ok {
			audit = append(audit, rest)
		}
	}
	want := []string{
		"method=StartInstance user=alice correlation_id=corr-1 outcome=OK name=web module=sha256:",
		"method=StopInstance user=alice correlation_id=corr-1 outcome=INSTANCE_NOT_FOUND target=nothing request_id=r1",
		"method=DrainNode user=w1 correlation_id=\"\" outcome=PERMISSION_DENIED node=n1",
	}
	if len(audit) != len(want) {
		t.Fatalf("audit log is\n%s", strings.Join(audit, "\n"))
	}
	for i := range want {
		if !strings.HasPrefix(audit[i], want[i]) {
			t.Errorf("audit line %d is %q, want %q…", i, audit[i], want[i])
		}
	}
}

func TestRolesThatAreNoAdminsAreRefused(t *testing.T) {
	for _, caller := range []identity.Subject{
		{Cluster: "test", Kind: identity.User, Name: "mallory", Role: "viewer"},
		{Cluster: "test", Kind: identity.User, Name: "mallory", Role: identity.RoleServer},
		{Cluster: "test", Kind: identity.Node, Name: "w1", Role: identity.RoleAdmin},
	} {
		for full := range methods() {
			if err := authorise(identity.WithCaller(t.Context(), caller), full); err == nil {
				t.Errorf("%s by %s is allowed", full, caller)
			}
		}
	}
}
