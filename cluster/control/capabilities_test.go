package control

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestAssignAndRevokeCapabilities(t *testing.T) {
	p := newPeer(t)
	ctx := asAlice(t.Context())
	p.addProvider("store", "kv")
	web := p.start("web", 2)
	assigned, err := p.client.AssignCapability(ctx, &pb.AssignCapabilityRequest{
		Target: "web", Grant: &pb.CapabilityGrant{Provider: "store", Permissions: []string{"kv:read", "kv:write:a/"}},
	})
	if err != nil || len(assigned.GetAssignments()) != 2 || assigned.GetIndex() == 0 {
		t.Fatalf("assign by name: %v, %v", assigned, err)
	}
	revoked, err := p.client.RevokeCapability(ctx, &pb.RevokeCapabilityRequest{
		Target: web[0], ProviderId: "store", Permissions: []string{"kv:read"},
	})
	if err != nil || len(revoked.GetAssignments()) != 1 || !slices.Equal(revoked.GetAssignments()[0].GetPermissions(), []string{"kv:write:a/"}) {
		t.Fatalf("revoke one permission: %v, %v", revoked, err)
	}
	revoked, err = p.client.RevokeCapability(ctx, &pb.RevokeCapabilityRequest{Target: "web", ProviderId: "store"})
	if err != nil || len(revoked.GetAssignments()) != 0 {
		t.Fatalf("revoke all: %v, %v", revoked, err)
	}
	if _, ok := p.state.View().Assignment(web[1], "store"); ok {
		t.Error("an assignment is left")
	}
	for name, grant := range map[string]*pb.CapabilityGrant{
		"nothing":                    {Provider: "store"},
		"what does not parse":        {Provider: "store", Permissions: []string{"kv"}},
		"what the provider has not":  {Provider: "store", Permissions: []string{"http:request"}},
		"one right and one wrong":    {Provider: "store", Permissions: []string{"kv:read", "msg:publish"}},
		"what no provider can serve": {Provider: "store", Permissions: []string{"gpu:use"}},
	} {
		_, err := p.client.AssignCapability(ctx, &pb.AssignCapabilityRequest{Target: "web", Grant: grant})
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
			t.Errorf("%s: error is %v, want INVALID_REQUEST", name, err)
		}
	}
	_, err = p.client.AssignCapability(ctx, &pb.AssignCapabilityRequest{
		Target: "web", Grant: &pb.CapabilityGrant{Provider: "nothing", Permissions: []string{"kv:read"}},
	})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND)
	_, err = p.client.RevokeCapability(ctx, &pb.RevokeCapabilityRequest{Target: "web", ProviderId: "store", Permissions: []string{"kv:read"}})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
}

func TestTheLifeOfAProvider(t *testing.T) {
	p := newPeer(t)
	ctx := asAlice(t.Context())
	p.addNode("n1", &fakeAgent{})
	spec := &pb.ProviderSpec{Id: "store", Type: "kv", Driver: "memory"}
	registered, err := p.client.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: spec, RequestId: "r1"})
	if err != nil || registered.GetProvider().GetId() != "store" || !registered.GetProvider().GetDesiredRunning() {
		t.Fatalf("register: %v, %v", registered, err)
	}
	again, err := p.client.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: spec, RequestId: "r1"})
	if err != nil || again.GetIndex() != registered.GetIndex() {
		t.Errorf("repeated: %v, %v", again, err)
	}
	_, err = p.client.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: spec})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	p.runProvider("store", "n1", pb.ProviderState_PROVIDER_STATE_RUNNING)
	updated, err := p.client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: &pb.ProviderSpec{Id: "store", Type: "kv", Driver: "bbolt"}})
	if err != nil || updated.GetProvider().GetSpec().GetDriver() != "bbolt" || updated.GetProvider().GetSpecVersion() != 2 {
		t.Errorf("update: %v, %v", updated, err)
	}
	_, err = p.client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: &pb.ProviderSpec{Id: "store", Type: "http"}})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
	_, err = p.client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: &pb.ProviderSpec{
		Id: "store", Type: "kv", Placement: &pb.PlacementRules{Labels: map[string]string{"": "x"}},
	}})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)

	for _, wrong := range []*pb.ProviderSpec{
		{Id: "web", Type: "http", Driver: "proxy"},
		{Id: "bus", Type: "messaging", Driver: "kafka"},
		{Id: "bank", Type: "external", Driver: "rest"},
		{Id: "cache", Type: "kv", Driver: "etcd"},
		{Id: "queue", Type: "queue"},
		{Id: "cache", Type: "kv", Driver: "memory", Replicas: 2},
		{Id: "bus", Type: "messaging", Replicas: 2},
	} {
		_, err := p.client.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: wrong})
		wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
		if next := apierror.From(err).Proto(ctx).GetNextStep(); next == "" {
			t.Errorf("%v is refused without a next step", wrong)
		}
	}
	_, err = p.client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: &pb.ProviderSpec{Id: "store", Type: "kv", Driver: "etcd"}})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)

	id := p.start("web", 1)[0]
	if _, err := p.client.AssignCapability(ctx, &pb.AssignCapabilityRequest{
		Target: id, Grant: &pb.CapabilityGrant{Provider: "store", Permissions: []string{"kv:read"}},
	}); err != nil {
		t.Fatal(err)
	}
	got, err := p.client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: "store"})
	if err != nil || len(got.GetAssignments()) != 1 || got.GetAssignments()[0].GetInstanceId() != id || got.GetIndex() == 0 {
		t.Errorf("get: %v, %v", got, err)
	}
	list, err := p.client.ListProviders(ctx, &pb.ListProvidersRequest{})
	if err != nil || len(list.GetProviders()) != 1 {
		t.Errorf("list: %v, %v", list, err)
	}
	stopped, err := p.client.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: "store"})
	if err != nil || stopped.GetProvider().GetDesiredRunning() {
		t.Errorf("stop: %v, %v", stopped, err)
	}
	started, err := p.client.StartProvider(ctx, &pb.StartProviderRequest{ProviderId: "store"})
	if err != nil || !started.GetProvider().GetDesiredRunning() {
		t.Errorf("start: %v, %v", started, err)
	}
	_, err = p.client.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: "store"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	_, err = p.client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: "nothing"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND)
	p.addProvider("unused", "http")
	gone, err := p.client.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: "unused", RequestId: "r2"})
	if err != nil || gone.GetIndex() == 0 {
		t.Errorf("deregister: %v, %v", gone, err)
	}
	repeated, err := p.client.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: "unused", RequestId: "r2"})
	if err != nil || repeated.GetIndex() != gone.GetIndex() {
		t.Errorf("deregister again: %v, %v", repeated, err)
	}
}

func TestCallProviderGoesToTheProvidersNodeInTheUsersName(t *testing.T) {
	p := newPeer(t)
	var got *pb.InvokeCapabilityRequest
	p.addNode("n1", &fakeAgent{call: func(_ context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
		got = req
		return &pb.InvokeCapabilityResponse{Payload: []byte("value")}, nil
	}})
	p.addProvider("store", "kv")
	p.runProvider("store", "n1", pb.ProviderState_PROVIDER_STATE_RUNNING)
	req := &pb.CallProviderRequest{ProviderId: "store", Capability: "kv", Operation: "get", Payload: []byte("key"), Bucket: "b"}
	p.loseLeader()
	resp, err := p.client.CallProvider(asAlice(t.Context()), req)
	if err != nil || string(resp.GetPayload()) != "value" {
		t.Fatalf("CallProvider = %v, %v", resp, err)
	}
	if user := got.GetUser(); user.GetUser() != "alice" || user.GetBucket() != "b" || got.GetProviderId() != "store" ||
		got.GetCapability() != "kv" || got.GetOperation() != "get" || string(got.GetPayload()) != "key" {
		t.Errorf("the agent was asked %v", got)
	}
}

func TestCallProviderTellsWhyItCannot(t *testing.T) {
	p := newPeer(t)
	agent := &fakeAgent{call: func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "value is too large")
	}}
	p.addNode("n1", agent)
	p.addProvider("store", "kv")
	p.addProvider("failed", "kv")
	p.addProvider("stopped", "kv")
	p.runProvider("store", "n1", pb.ProviderState_PROVIDER_STATE_RUNNING)
	p.runProvider("failed", "n1", pb.ProviderState_PROVIDER_STATE_FAILED)
	if _, err := p.client.StopProvider(asAlice(t.Context()), &pb.StopProviderRequest{ProviderId: "stopped"}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		req  *pb.CallProviderRequest
		code pb.ErrorCode
		next string
	}{
		{"what nobody has", &pb.CallProviderRequest{ProviderId: "nothing", Capability: "kv"}, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "provider list"},
		{"another capability", &pb.CallProviderRequest{ProviderId: "store", Capability: "http"}, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "provider list"},
		{"one that failed", &pb.CallProviderRequest{ProviderId: "failed", Capability: "kv"}, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "provider get failed"},
		{"one that is stopped", &pb.CallProviderRequest{ProviderId: "stopped", Capability: "kv"}, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "provider start stopped"},
		{"what the provider refuses", &pb.CallProviderRequest{ProviderId: "store", Capability: "kv"}, pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, ""},
	} {
		_, err := p.client.CallProvider(asAlice(t.Context()), test.req)
		if apierror.CodeOf(err) != test.code || !strings.Contains(apierror.From(err).Proto(t.Context()).GetNextStep(), test.next) {
			t.Errorf("%s: %v, want %v and %q", test.name, apierror.From(err).Proto(t.Context()), test.code, test.next)
		}
	}
	conn, err := grpc.NewClient("passthrough:gone", grpc.WithTransportCredentials(noCredentials), grpc.WithContextDialer(refuseToDial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p.connect("n1", conn)
	_, err = p.client.CallProvider(asAlice(t.Context()), &pb.CallProviderRequest{ProviderId: "store", Capability: "kv"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE)
	if apierror.From(err).Detail("node") != "n1" {
		t.Errorf("the error does not name the node: %v", err)
	}
}
