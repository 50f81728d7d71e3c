package capability

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestForgedCallsToAnAgent sends calls straight to the gRPC port of the agent that
// serves a provider, with the real certificate of another node, which then claims
// to be whom it is not.
func TestForgedCallsToAnAgent(t *testing.T) {
	dir := t.TempDir()
	c := harness.Start(t, dev.Options{Nodes: 3, Dir: dir})
	guests := map[string]*pb.Instance{}
	for _, node := range []string{"n2", "n3"} {
		guests[node] = startRelay(t, c, "kv", &pb.WorkloadSpec{
			Name: "guest-" + node, Placement: &pb.PlacementRules{Node: node},
			Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: slices.Concat(baseKV, []string{"kv:write:mine/"})}},
		}).instances[0]
		got, err := c.Client.QueryInstance(c.Context(settleTime), &pb.QueryInstanceRequest{Target: guests[node].Id})
		if err != nil {
			t.Fatal(err)
		}
		guests[node] = got.Instance
	}
	n2 := agentAs(t, c, dir, "n2")
	mine := guests["n2"]
	payload := func(key string) []byte {
		b, err := proto.Marshal(&pb.KvSetRequest{Key: []byte(key), Value: []byte("x")})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	request := func(change func(*pb.InvokeCapabilityRequest, *pb.InstanceCaller)) *pb.InvokeCapabilityRequest {
		caller := &pb.InstanceCaller{InstanceId: mine.Id, Generation: mine.Placement.Generation, NodeEpoch: mine.Placement.NodeEpoch}
		req := &pb.InvokeCapabilityRequest{
			Caller:     &pb.InvokeCapabilityRequest_Instance{Instance: caller},
			ProviderId: "kv", Capability: "kv", Operation: "set", Payload: payload("mine/a"),
		}
		change(req, caller)
		return req
	}
	const (
		ok       = pb.ErrorCode_ERROR_CODE_UNSPECIFIED
		denied   = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
		notFound = pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND
		invalid  = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
		conflict = pb.ErrorCode_ERROR_CODE_CONFLICT
	)
	for name, forged := range map[string]struct {
		change func(*pb.InvokeCapabilityRequest, *pb.InstanceCaller)
		want   pb.ErrorCode
	}{
		"as it should be":             {func(*pb.InvokeCapabilityRequest, *pb.InstanceCaller) {}, ok},
		"an instance of another node": {func(_ *pb.InvokeCapabilityRequest, i *pb.InstanceCaller) { i.InstanceId = guests["n3"].Id }, denied},
		"an instance that is not":     {func(_ *pb.InvokeCapabilityRequest, i *pb.InstanceCaller) { i.InstanceId = "guest-n2-zzzzz" }, notFound},
		"a generation to come":        {func(_ *pb.InvokeCapabilityRequest, i *pb.InstanceCaller) { i.Generation += 1000 }, denied},
		"no generation":               {func(_ *pb.InvokeCapabilityRequest, i *pb.InstanceCaller) { i.Generation = 0 }, invalid},
		"a key outside":               {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Payload = payload("theirs/a") }, denied},
		"an operation outside":        {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Operation = "get" }, denied},
		"an operation that is not":    {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Operation = "drop" }, invalid},
		"a capability that is not":    {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Capability = "files" }, invalid},
		"another capability":          {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Capability = "http" }, invalid},
		"the clock of another":        {func(_ *pb.InvokeCapabilityRequest, i *pb.InstanceCaller) { i.NotAfter, i.Clock = 1<<62, 7 }, conflict},
		"a user":                      {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Caller = asUser("root", "guest-n3") }, denied},
		"nobody":                      {func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Caller = nil }, invalid},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n2.InvokeCapability(c.Context(20*time.Second), request(forged.change))
			if got := apierror.CodeOf(err); got != forged.want && (forged.want != ok || err != nil) {
				t.Errorf("the answer is %v (%s), want %s", err, got, forged.want)
			}
		})
	}
	t.Run("a forwarded caller", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(c.Context(20*time.Second), identity.ForwardedCallerKey, "spiffe://dev/user/admin/admin")
		if _, err := n2.InvokeCapability(ctx, request(func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Caller = asUser("admin", "b") })); apierror.CodeOf(err) != denied {
			t.Errorf("a worker speaks for a user: %v", err)
		}
	})
	t.Run("correlation ids", func(t *testing.T) {
		for _, id := range []string{strings.Repeat("x", 100_000), "a b", "", "ok-1"} {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			ctx = metadata.AppendToOutgoingContext(ctx, "x-correlation-id", id)
			_, err := n2.InvokeCapability(ctx, request(func(r *pb.InvokeCapabilityRequest, _ *pb.InstanceCaller) { r.Payload = payload("theirs/a") }))
			cancel()
			e := apierror.From(err)
			if e.Code() == ok {
				t.Errorf("a correlation id of %d bytes lets a forbidden call through: %v", len(id), err)
			}
		}
	})
}

func asUser(name, bucket string) *pb.InvokeCapabilityRequest_User {
	return &pb.InvokeCapabilityRequest_User{User: &pb.UserCaller{User: name, Bucket: bucket}}
}

// agentAs connects to the agent of n1 with a certificate of another node that is a
// worker and nothing else.
func agentAs(t *testing.T, c *harness.Cluster, dir, node string) pb.NodeAgentServiceClient {
	t.Helper()
	ca, err := identity.LoadCA(filepath.Join(dir, "ca"))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := ca.Issue(identity.Subject{Cluster: "dev", Kind: identity.Node, Name: node, Role: identity.RoleWorker}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(bundle)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(c.Node("n1").Config.AgentAddress(), id.DialOption(func(identity.Subject) bool { return true }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return pb.NewNodeAgentServiceClient(conn)
}
