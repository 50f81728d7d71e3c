package control

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestStartInstanceCreatesTheReplicas(t *testing.T) {
	p := newPeer(t)
	p.addProvider("store", "kv")
	digest := p.addModule(modulestest.Reactor("wasmatrix:kv/v1 get"))
	resp, err := p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "web", Module: digest, Replicas: 3,
		Capabilities: []*pb.CapabilityGrant{{Provider: "store", Permissions: []string{"kv:read", "kv:write:a/"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.GetInstances()) != 3 || resp.GetIndex() == 0 {
		t.Fatalf("response is %v", resp)
	}
	shape := regexp.MustCompile(`^web-[bcdfghjkmnpqrstvwxz2-9]{5}$`)
	for _, inst := range resp.GetInstances() {
		if !shape.MatchString(inst.GetId()) || inst.GetName() != "web" || !inst.GetDesiredRunning() ||
			inst.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_PENDING || inst.GetCorrelationId() != "corr-1" {
			t.Errorf("instance is %v", inst)
		}
		if restart := inst.GetSpec().GetRestart(); restart != nil {
			t.Errorf("defaults of the restart policy were filled in: %v", restart)
		}
		a, ok := p.state.View().Assignment(inst.GetId(), "store")
		if !ok || !cmp.Equal(a.GetPermissions(), []string{"kv:read", "kv:write:a/"}) {
			t.Errorf("assignment of %s is %v", inst.GetId(), a)
		}
	}
	cmd := p.proposed[len(p.proposed)-1]
	if cmd.GetActor() != alice.String() || cmd.GetCorrelationId() != "corr-1" {
		t.Errorf("command says actor %q, correlation id %q", cmd.GetActor(), cmd.GetCorrelationId())
	}
}

func TestARepeatedRequestHasTheFirstResult(t *testing.T) {
	p := newPeer(t)
	ctx := asAlice(t.Context())
	req := &pb.StartInstanceRequest{RequestId: "r1", Spec: &pb.WorkloadSpec{
		Name: "web", Module: p.addModule(modulestest.Reactor()), Replicas: 2, Env: map[string]string{"a": "1", "b": "2", "c": "3"},
	}}
	first, err := p.client.StartInstance(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.client.StartInstance(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ids(first.GetInstances()), ids(again.GetInstances())); diff != "" || first.GetIndex() != again.GetIndex() {
		t.Errorf("the repetition gave other instances or index %d instead of %d\n%s", again.GetIndex(), first.GetIndex(), diff)
	}
	if n := len(p.state.View().Instances(nil)); n != 2 {
		t.Errorf("there are %d instances, want 2", n)
	}
	other := proto.CloneOf(req)
	other.Spec.Replicas = 3
	_, err = p.client.StartInstance(ctx, other)
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)

	// The same bytes as another kind of request are another request.
	if _, err := p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "web", RequestId: "r2"}); err != nil {
		t.Fatal(err)
	}
	_, err = p.client.RestartInstance(ctx, &pb.RestartInstanceRequest{Target: "web", RequestId: "r2"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)

	// The target of a removal is gone when the request is repeated.
	removal := &pb.RemoveInstanceRequest{Target: "web", Force: true, RequestId: "r3"}
	removed, err := p.client.RemoveInstance(ctx, removal)
	if err != nil {
		t.Fatal(err)
	}
	repeated, err := p.client.RemoveInstance(ctx, removal)
	if err != nil || !proto.Equal(removed, repeated) || len(removed.GetInstanceIds()) != 2 {
		t.Errorf("the repeated removal gave %v, %v; the first %v", repeated, err, removed)
	}
}

func TestStartInstanceRefusesWhatCannotWork(t *testing.T) {
	p := newPeer(t)
	p.addProvider("store", "kv")
	p.addProvider("bus", "messaging")
	p.addProvider("web", "http")
	p.addProvider("bank", "external")
	reactor := p.addModule(modulestest.Reactor("wasmatrix:kv/v1 get", "wasmatrix:log/v1 write"))
	publisher := p.addModule(modulestest.Reactor("wasmatrix:messaging/v1 publish"))
	outbound := p.addModule(modulestest.Reactor("wasmatrix:http/v1 request"))
	external := p.addModule(modulestest.Reactor("wasmatrix:provider/v1 call"))
	handlers := p.addModule(modulestest.Wasm(nil, "wasmatrix_alloc", "wasmatrix_on_http", "wasmatrix_on_message"))
	command, reactor2 := p.addModule(modulestest.Command()), p.addModule(modulestest.Reactor())
	p.addProvider("bus2", "messaging")
	p.start("taken", 1)
	taken := p.state.View().InstancesByName(nil, "taken")[0].GetId()

	spec := func(change func(*pb.WorkloadSpec)) *pb.WorkloadSpec {
		s := &pb.WorkloadSpec{Name: "app", Module: reactor, Capabilities: []*pb.CapabilityGrant{
			{Provider: "store", Permissions: []string{"kv:read"}},
		}}
		change(s)
		return s
	}
	grant := func(provider string, permissions ...string) func(*pb.WorkloadSpec) {
		return func(s *pb.WorkloadSpec) {
			s.Capabilities = []*pb.CapabilityGrant{{Provider: provider, Permissions: permissions}}
		}
	}
	with := func(module string, grant func(*pb.WorkloadSpec)) func(*pb.WorkloadSpec) {
		return func(s *pb.WorkloadSpec) { s.Module = module; grant(s) }
	}
	trigger := func(module string, way *pb.Trigger) func(*pb.WorkloadSpec) {
		return func(s *pb.WorkloadSpec) { s.Module, s.Capabilities, s.Triggers = module, nil, []*pb.Trigger{way} }
	}
	http := &pb.Trigger{Trigger: &pb.Trigger_Http{Http: &pb.HttpTrigger{Path: "/"}}}
	triggered := func(module, subject string, grants ...*pb.CapabilityGrant) func(*pb.WorkloadSpec) {
		return func(s *pb.WorkloadSpec) {
			trigger(module, &pb.Trigger{Trigger: &pb.Trigger_Subscribe{Subscribe: subject}})(s)
			s.Capabilities = grants
		}
	}
	allow := func(provider, permission string) *pb.CapabilityGrant {
		return &pb.CapabilityGrant{Provider: provider, Permissions: []string{permission}}
	}
	subscribe := func(subject string) *pb.Trigger {
		return &pb.Trigger{Trigger: &pb.Trigger_Subscribe{Subscribe: subject}}
	}
	tests := []struct {
		name   string
		change func(*pb.WorkloadSpec)
		code   pb.ErrorCode
		says   string
		next   string
	}{
		{"a path for a module", func(s *pb.WorkloadSpec) { s.Module = "./hello.wasm" }, invalidRequest, "not a digest", "module push"},
		{"a module nobody has", func(s *pb.WorkloadSpec) { s.Module = modulestest.Digest(nil) }, pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "no module", "module push"},
		{"a name in use", func(s *pb.WorkloadSpec) { s.Name = "taken" }, pb.ErrorCode_ERROR_CODE_CONFLICT, "in use", "wasmatrix instance rm taken --force, or another name with --name"},
		{"a name that is an id", func(s *pb.WorkloadSpec) { s.Name = taken }, invalidRequest, "id of an instance", "--name"},
		{"a provider nobody has", grant("nothing", "kv:read"), pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "nothing", "provider list"},
		{"no permission", grant("store", "kv:peek"), invalidRequest, "kv:peek", "permissions"},
		{"permission of another type", grant("store", "msg:publish"), invalidRequest, "type kv", "provider list"},
		{"permission of another provider", with(external, grant("bank", "provider:other:pay")), invalidRequest, "another provider", "provider:bank:pay"},
		{
			"a bucket of a provider without",
			func(s *pb.WorkloadSpec) {
				s.Capabilities = append(s.Capabilities, &pb.CapabilityGrant{Provider: "bus", Permissions: []string{"msg:publish"}, Bucket: "b"})
			}, invalidRequest, "buckets", "leave the bucket out",
		},
		{"import without a grant", with(publisher, grant("store", "kv:read")), denied, "guest.wasm imports wasmatrix:messaging/v1 publish and no msg:publish permission was granted", "add --allow msg:publish:<topic>"},
		{"import with the wrong action", grant("store", "kv:write"), denied, "imports wasmatrix:kv/v1 get and no kv:read", "add --allow kv:read"},
		{"domain without request", with(outbound, grant("web", "http:domain:example.com")), denied, "http:request", "add --allow http:request"},
		{"external call without a grant", with(external, grant("store", "kv:read")), denied, "no provider permission", "add --allow provider:<id>:<operation>"},
		{"too little memory", func(s *pb.WorkloadSpec) { s.Limits = &pb.InstanceLimits{Memory: "1KiB"} }, invalidRequest, "64KiB to 4GiB", ""},
		{"too much memory", func(s *pb.WorkloadSpec) { s.Limits = &pb.InstanceLimits{Memory: "5GiB"} }, invalidRequest, "64KiB to 4GiB", ""},
		{"no amount of memory", func(s *pb.WorkloadSpec) { s.Limits = &pb.InstanceLimits{Memory: "lots"} }, invalidRequest, "lots", "32MiB"},
		{
			"backoff longer than the longest", func(s *pb.WorkloadSpec) {
				s.Restart = &pb.RestartPolicy{Backoff: durationpb.New(time.Minute), MaxBackoff: durationpb.New(time.Second)}
			}, invalidRequest, "max_backoff", "raise",
		},
		{"a label no node can have", func(s *pb.WorkloadSpec) {
			s.Placement = &pb.PlacementRules{Labels: map[string]string{"zone": strings.Repeat("x", 64)}}
		}, invalidRequest, "zone", "node list"},
		{"a variable with an equals sign", func(s *pb.WorkloadSpec) { s.Env = map[string]string{"A=B": "c"} }, invalidRequest, "A=B", ""},
		{"an argument with a zero byte", func(s *pb.WorkloadSpec) { s.Args = []string{"a", "b\x00"} }, invalidRequest, "argument 2", ""},
		{"a spec that fills the log", func(s *pb.WorkloadSpec) { s.Args = slices.Repeat([]string{strings.Repeat("x", 100_000)}, 30) }, invalidRequest, "bytes", "provider"},
		{"replicas that fill a snapshot", func(s *pb.WorkloadSpec) { s.Stdin, s.Replicas = make([]byte, 1<<20), 100 }, invalidRequest, "100 replicas", "fewer replicas"},
		{"an HTTP trigger", trigger(handlers, http), invalidRequest, "kind http", "leave triggers out"},
		{"a subscription without a provider", trigger(handlers, subscribe("orders.*")), denied, "none was granted", "add --allow msg:subscribe:orders.*"},
		{"a subscription at a kv", triggered(handlers, "orders.*", allow("store", "kv:read")), denied, "none was granted", "msg:subscribe:orders.*"},
		{"a subscription wider than the grant", triggered(handlers, "orders.>", allow("bus", "msg:subscribe:orders.*")), denied, "covered by no granted permission", "add --allow msg:subscribe:orders.>"},
		{"a subscription that may only publish", triggered(handlers, "orders", allow("bus", "msg:publish")), denied, "covered by no granted permission", "add --allow msg:subscribe:orders"},
		{"a subscription at two providers", triggered(handlers, "a", allow("bus", "msg:subscribe"), allow("bus2", "msg:subscribe:a")), invalidRequest, "2 providers", "one of them only"},
		{"no subject", triggered(handlers, "a..b", allow("bus", "msg:subscribe")), invalidRequest, "not a subject", "join tokens by dots"},
		{"a subscription of a command", triggered(command, "a", allow("bus", "msg:subscribe")), invalidRequest, "is a command", "exports wasmatrix_on_message"},
		{"a subscription without a handler", triggered(reactor2, "a", allow("bus", "msg:subscribe")), invalidRequest, "does not export wasmatrix_on_message", "register a message handler"},
		{"a subscription at a provider nobody has", triggered(handlers, "a", allow("nothing", "msg:subscribe")), pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "nothing", "provider list"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := len(p.state.View().Instances(nil))
			_, err := p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{Spec: spec(test.change)})
			wantCode(t, err, test.code)
			e := apierror.From(err).Proto(t.Context())
			if !strings.Contains(e.GetMessage(), test.says) {
				t.Errorf("message %q does not say %q", e.GetMessage(), test.says)
			}
			if !strings.Contains(e.GetNextStep(), test.next) {
				t.Errorf("next step %q does not say %q", e.GetNextStep(), test.next)
			}
			if after := len(p.state.View().Instances(nil)); after != before {
				t.Errorf("%d instances were created all the same", after-before)
			}
		})
	}
}

const (
	invalidRequest = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
	denied         = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
)

func TestStartInstanceAcceptsWhatCanWork(t *testing.T) {
	p := newPeer(t)
	p.addProvider("store", "kv")
	p.addProvider("bus", "messaging")
	p.addProvider("bus2", "messaging")
	p.addProvider("bank", "external")
	for name, spec := range map[string]*pb.WorkloadSpec{
		"command": {
			Module: p.addModule(modulestest.Command("wasi_snapshot_preview1 fd_write")), Args: []string{"-v"},
		},
		"handlers": {
			Module: p.addModule(modulestest.Wasm(nil, "wasmatrix_alloc", "wasmatrix_on_http", "wasmatrix_on_message")),
		},
		"triggers": {
			Module: p.addModule(modulestest.Wasm(nil, "wasmatrix_alloc", "wasmatrix_on_http", "wasmatrix_on_message")),
			Capabilities: []*pb.CapabilityGrant{
				{Provider: "bus", Permissions: []string{"msg:subscribe:orders.*"}},
				{Provider: "bus", Permissions: []string{"msg:subscribe:a.>"}},
				{Provider: "bus2", Permissions: []string{"msg:subscribe:b"}},
			},
			Triggers: []*pb.Trigger{
				{Trigger: &pb.Trigger_Subscribe{Subscribe: "orders.*"}},
				{Trigger: &pb.Trigger_Subscribe{Subscribe: "a.b.>"}},
				{Trigger: &pb.Trigger_Subscribe{Subscribe: "b"}},
			},
		},
		"grants": {
			Module: p.addModule(modulestest.Reactor("wasmatrix:kv/v1 cas", "wasmatrix:messaging/v1 request", "wasmatrix:provider/v1 call")),
			Capabilities: []*pb.CapabilityGrant{
				{Provider: "store", Permissions: []string{"kv:write:a/"}, Bucket: "shared"},
				{Provider: "store", Permissions: []string{"kv:read"}},
				{Provider: "bus", Permissions: []string{"msg:publish:a.b"}},
				{Provider: "bank", Permissions: []string{"provider:bank:*"}},
			},
			Limits:    &pb.InstanceLimits{Memory: "4GiB"},
			Runtime:   "microvm",
			Placement: &pb.PlacementRules{Node: "not-there-yet", Labels: map[string]string{"zone": "a"}},
		},
	} {
		spec.Name = name
		if _, err := p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{Spec: spec}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	view := p.state.View()
	id := view.InstancesByName(nil, "triggers")[0].GetId()
	for provider, want := range map[string][]string{"bus": {"a.b.>", "orders.*"}, "bus2": {"b"}} {
		if a, _ := view.Assignment(id, provider); !slices.Equal(a.GetSubscriptions(), want) {
			t.Errorf("subscriptions at %s: %v, want %v", provider, a.GetSubscriptions(), want)
		}
	}
}

func TestAnIdThatIsTakenIsMintedAnew(t *testing.T) {
	p := newPeer(t)
	suffixes := []string{"aaaaa", "aaaaa", "bbbbb", "aaaaa", "ccccc"}
	p.service.handlers.suffix = func() string {
		next := suffixes[0]
		suffixes = suffixes[1:]
		return next
	}
	want := []string{"web-aaaaa", "web-bbbbb"}
	if got := p.start("web", 2); !slices.Equal(got, want) {
		t.Errorf("ids within one request are %v, want %v", got, want)
	}
	if _, err := p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: "web"}); err != nil {
		t.Fatal(err)
	}
	if got := p.start("web", 1); !slices.Equal(got, []string{"web-ccccc"}) {
		t.Errorf("the id beside those of ended instances is %v, want web-ccccc", got)
	}
	p.service.handlers.suffix = func() string { return "aaaaa" }
	_, err := p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: "web"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "web", Module: p.addModule(modulestest.Reactor()),
	}})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED)
}

func TestStopRestartAndRemoveByIdPrefixAndName(t *testing.T) {
	p := newPeer(t)
	ctx := asAlice(t.Context())
	p.addNode("n1", &fakeAgent{})
	web := p.start("web", 3)
	for _, id := range web {
		p.run(id, "n1")
	}
	stopped, err := p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: web[0]})
	if err != nil || len(stopped.GetInstances()) != 1 || stopped.GetInstances()[0].GetDesiredRunning() {
		t.Fatalf("stop by id: %v, %v", stopped, err)
	}
	stopped, err = p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: web[1][:len(web[1])-1]})
	if err != nil || !slices.Equal(ids(stopped.GetInstances()), web[1:2]) {
		t.Fatalf("stop by prefix: %v, %v", stopped, err)
	}
	stopped, err = p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "web"})
	if err != nil || len(stopped.GetInstances()) != 3 {
		t.Fatalf("stop by name: %v, %v", stopped, err)
	}
	_, err = p.client.RemoveInstance(ctx, &pb.RemoveInstanceRequest{Target: web[0]})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	p.report(web[0], pb.InstanceState_INSTANCE_STATE_STOPPED)
	removed, err := p.client.RemoveInstance(ctx, &pb.RemoveInstanceRequest{Target: web[0]})
	if err != nil || !slices.Equal(removed.GetInstanceIds(), web[:1]) || p.instance(web[0]) != nil {
		t.Fatalf("remove: %v, %v", removed, err)
	}
	p.report(web[1], pb.InstanceState_INSTANCE_STATE_STOPPED)
	restarted, err := p.client.RestartInstance(ctx, &pb.RestartInstanceRequest{Target: web[1]})
	if err != nil || restarted.GetInstances()[0].GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_PENDING {
		t.Fatalf("restart: %v, %v", restarted, err)
	}
	for _, target := range []string{"nothing", "web-zzzzzz"} {
		_, err = p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: target})
		wantCode(t, err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
		_, err = p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: target, RequestId: "with-id-" + target})
		wantCode(t, err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
	}
	_, err = p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "we", RequestId: "ambiguous"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
}

func TestWritesNeedTheLeader(t *testing.T) {
	p := newPeer(t)
	p.start("web", 1)
	p.loseLeader()
	_, err := p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: "web"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_NO_LEADER)
	_, err = p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_NO_LEADER)
	resp, err := p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{Read: &pb.ReadOptions{Stale: true}})
	if err != nil || len(resp.GetInstances()) != 1 {
		t.Errorf("a stale read without a leader: %v, %v", resp, err)
	}
}

func TestNewRefusesAnIncompleteConfiguration(t *testing.T) {
	if _, err := New(Config{}); err == nil || errors.Unwrap(err) != nil {
		t.Errorf("error is %v", err)
	}
}
