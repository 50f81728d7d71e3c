package remote_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestGuestReachesAProviderOnAnotherNode(t *testing.T) {
	p := newPair(t)
	if err := p.set(t, "orders/1", "one"); err != nil {
		t.Fatal(err)
	}
	if got, err := p.get(t, "orders/1"); err != nil || got != "one" {
		t.Errorf("get = %q, %v", got, err)
	}
	large := strings.Repeat("x", 1<<20)
	if err := p.set(t, "orders/large", large); err != nil {
		t.Fatal(err)
	}
	if got, err := p.get(t, "orders/large"); err != nil || got != large {
		t.Errorf("a value of 1 MiB came back with %d bytes, %v", len(got), err)
	}
}

// The calling side's opinion does not count: when its directory says yes and
// the serving side's says no, the call is refused.
func TestServingSideDecides(t *testing.T) {
	tests := []struct {
		name   string
		change func(*testing.T, *provider.Directory)
		want   error
	}{
		{"permission revoked", func(t *testing.T, d *provider.Directory) {
			d.PutAssignment(provider.Assignment{Instance: "i", Provider: "kv", Permissions: permissions(t, "kv:write"), Bucket: "hello"})
		}, provider.ErrDenied},
		{"assignment revoked", func(_ *testing.T, d *provider.Directory) { d.RemoveAssignment("i", "kv") }, provider.ErrDenied},
		{"instance gone", func(_ *testing.T, d *provider.Directory) { d.RemoveRemoteInstance("i") }, provider.ErrInstanceNotFound},
		{"instance moved", func(_ *testing.T, d *provider.Directory) {
			d.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: "c", Generation: 4})
		}, provider.ErrDenied},
		{"instance on another node", func(_ *testing.T, d *provider.Directory) {
			d.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: "c", Generation: 3})
		}, provider.ErrDenied},
		{"provider gone", func(_ *testing.T, d *provider.Directory) { d.RemoveProvider("kv") }, provider.ErrNotFound},
		{"provider moved", func(_ *testing.T, d *provider.Directory) {
			d.PutProvider(provider.ProviderRecord{ID: "kv", Type: "kv", Node: "c", Running: true})
		}, provider.ErrUnavailable},
		{"provider of another type", func(_ *testing.T, d *provider.Directory) {
			d.PutProvider(provider.ProviderRecord{ID: "kv", Type: "http", Node: "b", Running: true})
		}, provider.ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t)
			if err := p.set(t, "orders/1", "one"); err != nil {
				t.Fatal(err)
			}
			tt.change(t, p.b.dir)
			_, err := p.get(t, "orders/1")
			var e *provider.Error
			if !errors.Is(err, tt.want) || !errors.As(err, &e) || len(e.Details) == 0 {
				t.Errorf("got %v, want %v with details", err, tt.want)
			}
		})
	}
}

// forge calls node b's server directly, as a malicious agent would.
func (p *pair) forge(t *testing.T, as *identity.Identity, ctx context.Context, req *pb.InvokeCapabilityRequest) error {
	t.Helper()
	conn, err := p.pool(t, as).Conn("passthrough:///b:1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = pb.NewNodeAgentServiceClient(conn).InvokeCapability(ctx, req)
	return err
}

func instanceCaller(id string, generation, epoch uint64) *pb.InvokeCapabilityRequest_Instance {
	return &pb.InvokeCapabilityRequest_Instance{Instance: &pb.InstanceCaller{InstanceId: id, Generation: generation, NodeEpoch: epoch}}
}

func userCaller(name string) *pb.InvokeCapabilityRequest_User {
	return &pb.InvokeCapabilityRequest_User{User: &pb.UserCaller{User: name, Bucket: "hello"}}
}

func TestForgedCallersAreRefused(t *testing.T) {
	p := newPair(t)
	worker := func(name string) *identity.Identity { return p.issue(t, identity.Node, name, identity.RoleWorker) }
	peer := p.issue(t, identity.Node, "p", identity.RoleServer)
	both := p.issue(t, identity.Node, "pw", identity.RoleBoth)
	admin := p.issue(t, identity.User, "alice", identity.RoleAdmin)
	key := getRequest(t, "orders/1")
	const ok = pb.ErrorCode_ERROR_CODE_UNSPECIFIED
	const denied = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
	tests := []struct {
		name      string
		as        *identity.Identity
		forwarded string
		req       *pb.InvokeCapabilityRequest
		want      pb.ErrorCode
	}{
		{"the true one", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, ok},
		{"from another node", worker("c"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied},
		{"from the serving node itself", worker("b"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied},
		{"from a peer", peer, "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied},
		{
			"by a peer in the name of the node", both, "spiffe://test/node/a/worker",
			&pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied,
		},
		{
			"by a worker in the name of the node", worker("c"), "spiffe://test/node/a/worker",
			&pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied,
		},
		{"from a user", admin, "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied},
		{
			"from a user with the name of the node", p.issue(t, identity.User, "a", identity.RoleAdmin), "",
			&pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied,
		},
		{
			"from a peer with the name of the node", p.issue(t, identity.Node, "a", identity.RoleServer), "",
			&pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5)}, denied,
		},
		{"an old generation", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 2, 5)}, denied},
		{"a future generation", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 4, 5)}, denied},
		{"no generation", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 0, 0)}, denied},
		{"an old epoch", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 4)}, denied},
		{
			"another instance", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("j", 3, 5)},
			pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND,
		},
		{"no instance", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("", 3, 5)}, denied},
		{"no caller", worker("a"), "", &pb.InvokeCapabilityRequest{}, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		{
			"another key", worker("a"), "",
			&pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5), Payload: getRequest(t, "secrets/1")}, denied,
		},
		{
			"another provider", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: instanceCaller("i", 3, 5), ProviderId: "kv2"},
			pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
		},
		{"a worker as a user", worker("a"), "", &pb.InvokeCapabilityRequest{Caller: userCaller("alice")}, denied},
		{
			"a worker that forwards a user", worker("a"), "spiffe://test/user/alice/admin",
			&pb.InvokeCapabilityRequest{Caller: userCaller("alice")}, denied,
		},
		{"a user as himself", admin, "", &pb.InvokeCapabilityRequest{Caller: userCaller("alice")}, ok},
		{"a user who does not name himself", admin, "", &pb.InvokeCapabilityRequest{Caller: userCaller("")}, ok},
		{"a user as another", admin, "", &pb.InvokeCapabilityRequest{Caller: userCaller("bob")}, denied},
		{"a peer that vouches for a user", peer, "", &pb.InvokeCapabilityRequest{Caller: userCaller("alice")}, ok},
		{"a peer that forwards a user", peer, "spiffe://test/user/alice/admin", &pb.InvokeCapabilityRequest{Caller: userCaller("alice")}, ok},
		{"a peer that names no user", peer, "", &pb.InvokeCapabilityRequest{Caller: userCaller("")}, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := tt.req
			req.Capability, req.Operation = "kv", "get"
			if req.ProviderId == "" {
				req.ProviderId = "kv"
			}
			if req.Payload == nil {
				req.Payload = key
			}
			ctx := t.Context()
			if tt.forwarded != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, identity.ForwardedCallerKey, tt.forwarded)
			}
			err := p.forge(t, tt.as, ctx, req)
			if got := apierror.CodeOf(err); got != tt.want {
				t.Errorf("got %v (%v), want %v", got, err, tt.want)
			}
		})
	}
}

func TestCallWithoutAnAuthenticatedCallerIsRefused(t *testing.T) {
	p := newPair(t)
	_, err := remote.NewServer(p.b.router).InvokeCapability(t.Context(), &pb.InvokeCapabilityRequest{
		Caller: userCaller("alice"), ProviderId: "kv", Capability: "kv", Operation: "get", Payload: getRequest(t, "x"),
	})
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("got %v", err)
	}
}

func TestProviderStopsAndStartsUnderRemoteCalls(t *testing.T) {
	p := newPair(t)
	if err := p.set(t, "orders/1", "one"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var fine, unavailable atomic.Int64
	stop := make(chan struct{})
	for range 200 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				switch _, err := p.port.Call(t.Context(), "kv", "list", encode(t, &pb.KvListRequest{Provider: "kv", Prefix: []byte("orders/")})); {
				case err == nil:
					fine.Add(1)
				case errors.Is(err, provider.ErrUnavailable):
					unavailable.Add(1)
				default:
					t.Errorf("a call got %v", err)
					return
				}
			}
		})
	}
	await(t, "calls to succeed", func() bool { return fine.Load() > 500 })
	if err := p.b.host.Stop(t.Context(), "kv"); err != nil {
		t.Errorf("Stop: %v", err)
	}
	await(t, "calls to be refused", func() bool { return unavailable.Load() > 500 })
	p.startKV(t)
	before := fine.Load()
	await(t, "calls to succeed again", func() bool { return fine.Load() > before+500 })
	close(stop)
	wg.Wait()
}

// await polls a condition that other goroutines make true.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-deadline:
			t.Fatalf("waited 10 s for %s", what)
		case <-tick.C:
		}
	}
}

func TestErrorsOfTheServingSideArriveWhole(t *testing.T) {
	p := newPair(t)
	full := provider.Errorf(provider.ErrExhausted, "the disk of %s is full", "/x").With("file", "/x").NextStep("free space")
	n := &scripted{answers: []error{full}}
	c := n.attach(t, p)
	ctx := correlation.With(t.Context(), "trace-1")
	_, err := c.Invoke(ctx, "s:1", call("set", false))
	var e *provider.Error
	if !errors.As(err, &e) || !errors.Is(err, provider.ErrExhausted) {
		t.Fatalf("got %v", err)
	}
	if e.Message != full.Message || e.Next != full.Next || e.Details["file"] != "/x" {
		t.Errorf("arrived as %+v", e)
	}
	if n.correlation != "trace-1" {
		t.Errorf("correlation id %q went along", n.correlation)
	}
	if n.calls.Load() != 1 {
		t.Errorf("%d calls, want no retry of an answered one", n.calls.Load())
	}
}

// scripted is an agent that fails as told.
type scripted struct {
	answers     []error // of the calls in turn; after the last all succeed
	calls       atomic.Int64
	correlation string
	before      func(ctx context.Context)
}

func (s *scripted) attach(t *testing.T, p *pair) *remote.Client {
	t.Helper()
	s.listen(t, p)
	return p.client(t, p.pool(t, p.issue(t, identity.Node, "a", identity.RoleWorker)))
}

func (s *scripted) listen(t *testing.T, p *pair) *grpc.Server {
	t.Helper()
	id := p.issue(t, identity.Node, "s", identity.RoleWorker)
	return p.serve(t, p.listen("s:1"), id, &agentServer{invoke: s.invoke})
}

func (s *scripted) invoke(ctx context.Context, _ *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	n := int(s.calls.Add(1))
	s.correlation = correlation.ID(ctx)
	if s.before != nil {
		s.before(ctx)
	}
	if n <= len(s.answers) {
		err := s.answers[n-1]
		if _, own := errors.AsType[*provider.Error](err); own {
			return nil, remote.ToAPI(err)
		}
		return nil, err
	}
	return &pb.InvokeCapabilityResponse{Payload: []byte("fine")}, nil
}

func call(operation string, repeatable bool) provider.RemoteCall {
	return provider.RemoteCall{
		Provider: "kv", Capability: "kv", Operation: operation, Payload: []byte{}, Node: "s", Instance: "i", Generation: 3, Repeatable: repeatable,
	}
}

func TestRetriesOnlyWhereTheyAreSafe(t *testing.T) {
	broke := status.Error(codes.Unavailable, "the connection broke")
	tests := []struct {
		name       string
		repeatable bool
		answers    []error
		calls      int64
		want       error
		outcome    string
	}{
		{name: "a read is tried again", repeatable: true, answers: []error{broke, broke}, calls: 3},
		{name: "a read is tried three times at most", repeatable: true, answers: []error{broke, broke, broke}, calls: 3, want: provider.ErrCommunication},
		{name: "a write is not", answers: []error{broke}, calls: 1, want: provider.ErrCommunication, outcome: "unknown"},
		{
			name: "a provider that is unavailable is not asked again", repeatable: true,
			answers: []error{provider.Errorf(provider.ErrUnavailable, "stopped")}, calls: 1, want: provider.ErrUnavailable,
		},
		{
			name: "a refusal by gRPC itself is final", repeatable: true,
			answers: []error{status.Error(codes.PermissionDenied, "no")}, calls: 1, want: provider.ErrDenied,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t)
			s := &scripted{answers: tt.answers}
			c := s.attach(t, p)
			answer, err := c.Invoke(t.Context(), "s:1", call("op", tt.repeatable))
			if s.calls.Load() != tt.calls || !errors.Is(err, tt.want) || tt.want == nil && string(answer) != "fine" {
				t.Errorf("%d calls, %q, %v; want %d calls, %v", s.calls.Load(), answer, err, tt.calls, tt.want)
			}
			var e *provider.Error
			if errors.As(err, &e) && e.Details["outcome"] != tt.outcome {
				t.Errorf("outcome %q, want %q", e.Details["outcome"], tt.outcome)
			}
		})
	}
}

// A call that certainly never left is tried again even when it is a write.
func TestWriteIsSentAgainWhenItNeverLeft(t *testing.T) {
	p := newPair(t)
	c := p.client(t, p.pool(t, p.issue(t, identity.Node, "a", identity.RoleWorker)))
	began := time.Now()
	_, err := c.Invoke(t.Context(), "s:1", call("set", false))
	var e *provider.Error
	if !errors.Is(err, provider.ErrCommunication) || !errors.As(err, &e) || e.Next == "" || e.Details["outcome"] != "" {
		t.Fatalf("nobody listens: %v, details %v", err, e.Details)
	}
	if took := time.Since(began); took < 120*time.Millisecond || took > 10*time.Second {
		t.Errorf("gave up after %v, want two retries", took)
	}
	s := &scripted{}
	s.listen(t, p)
	deadline, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		answer, err := c.Invoke(deadline, "s:1", call("set", false))
		if err == nil {
			if string(answer) != "fine" || s.calls.Load() != 1 {
				t.Errorf("%q after %d calls, want exactly one to arrive", answer, s.calls.Load())
			}
			return
		}
		if !errors.Is(err, provider.ErrCommunication) || deadline.Err() != nil {
			t.Fatalf("once somebody listens: %v", err)
		}
	}
}

// A connection that breaks under a write leaves its outcome open, and says so.
func TestWriteIsNotSentAgainWhenItsConnectionBreaks(t *testing.T) {
	p := newPair(t)
	arrived, release := make(chan struct{}), make(chan struct{})
	s := &scripted{before: func(context.Context) { close(arrived); <-release }}
	server := s.listen(t, p)
	c := p.client(t, p.pool(t, p.issue(t, identity.Node, "a", identity.RoleWorker)))
	result := make(chan error, 1)
	go func() {
		_, err := c.Invoke(t.Context(), "s:1", call("set", false))
		result <- err
	}()
	<-arrived
	stopped := make(chan struct{})
	go func() { defer close(stopped); server.Stop() }()
	err := <-result
	close(release)
	<-stopped
	var e *provider.Error
	if !errors.Is(err, provider.ErrCommunication) || !errors.As(err, &e) || e.Details["outcome"] != "unknown" || s.calls.Load() != 1 {
		t.Errorf("%d calls, %v; want one call and an unknown outcome", s.calls.Load(), err)
	}
}

func TestDeadlineTravelsAndIsATimeout(t *testing.T) {
	p := newPair(t)
	var left atomic.Int64
	answered := make(chan struct{})
	s := &scripted{before: func(ctx context.Context) {
		deadline, _ := ctx.Deadline()
		left.Store(int64(time.Until(deadline)))
		<-answered // not ctx: its end may come before that of the caller's
	}}
	c := s.attach(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	_, err := c.Invoke(ctx, "s:1", call("set", false))
	close(answered)
	if !errors.Is(err, provider.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	if got := time.Duration(left.Load()); got <= 0 || got > 150*time.Millisecond {
		t.Errorf("the serving side had %v left", got)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := c.Invoke(gone, "s:1", call("set", false)); !errors.Is(err, provider.ErrCommunication) {
		t.Errorf("a cancelled call: %v, want ErrCommunication", err)
	}
}

func TestCallIsBoundedWithoutADeadline(t *testing.T) {
	p := newPair(t)
	var left atomic.Int64
	s := &scripted{before: func(ctx context.Context) {
		if deadline, ok := ctx.Deadline(); ok {
			left.Store(int64(time.Until(deadline)))
		}
	}}
	c := s.attach(t, p)
	if _, err := c.Invoke(t.Context(), "s:1", call("get", true)); err != nil {
		t.Fatal(err)
	}
	if got := time.Duration(left.Load()); got <= 0 || got > provider.DefaultCallTime {
		t.Errorf("the serving side had %v left, want at most %v", got, provider.DefaultCallTime)
	}
}

func TestPoolThatCannotConnect(t *testing.T) {
	c := remote.NewClient(func(string) (grpc.ClientConnInterface, error) { return nil, identity.ErrPoolClosed }, clock())
	_, err := c.Invoke(t.Context(), "s:1", call("get", true))
	if !errors.Is(err, provider.ErrCommunication) || !errors.Is(err, identity.ErrPoolClosed) {
		t.Errorf("got %v", err)
	}
}

func TestErrorsSurviveBothDirections(t *testing.T) {
	sentinels := map[pb.ErrorCode]error{
		pb.ErrorCode_ERROR_CODE_INVALID_REQUEST:       provider.ErrInvalid,
		pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED:     provider.ErrDenied,
		pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND:    provider.ErrNotFound,
		pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND:    provider.ErrInstanceNotFound,
		pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE:  provider.ErrUnavailable,
		pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED:    provider.ErrExhausted,
		pb.ErrorCode_ERROR_CODE_TIMEOUT:               provider.ErrTimeout,
		pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE: provider.ErrCommunication,
		pb.ErrorCode_ERROR_CODE_CONFLICT:              provider.ErrConflict,
		pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR:        provider.ErrInternal,
	}
	for code, sentinel := range sentinels {
		from := provider.Errorf(sentinel, "it failed").With("k", "v").NextStep("try 100%%")
		ctx := correlation.With(t.Context(), "trace-2")
		back := remote.FromAPI(remote.ToAPI(fmt.Errorf("%w", from)).Status(ctx).Err())
		again := remote.ToAPI(back).Proto(t.Context())
		if !errors.Is(back, sentinel) || again.GetCode() != code || again.GetMessage() != "it failed" ||
			again.GetDetails()["k"] != "v" || again.GetNextStep() != "try 100%" || again.GetCorrelationId() != "trace-2" {
			t.Errorf("%v came back as %v", code, again)
		}
		plain := remote.ToAPI(fmt.Errorf("opening: %w", sentinel)).Proto(t.Context())
		if plain.GetCode() != code || plain.GetMessage() != "opening: "+sentinel.Error() {
			t.Errorf("a wrapped sentinel became %v", plain)
		}
	}
	if len(sentinels) != len(pb.ErrorCode_name)-1-3 {
		t.Errorf("%d codes are mapped; all but MODULE_NOT_FOUND, NODE_NOT_FOUND and NO_LEADER must be", len(sentinels))
	}
	if err := remote.FromAPI(apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "x")); !errors.Is(err, provider.ErrCommunication) {
		t.Errorf("NO_LEADER became %v", err)
	}
	if err := remote.FromAPI(apierror.New(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "x")); !errors.Is(err, provider.ErrInternal) {
		t.Errorf("MODULE_NOT_FOUND became %v", err)
	}
	if remote.ToAPI(nil) != nil || remote.FromAPI(nil) != nil {
		t.Error("nil did not stay nil")
	}
	if got := remote.ToAPI(context.DeadlineExceeded).Code(); got != pb.ErrorCode_ERROR_CODE_TIMEOUT {
		t.Errorf("a bare deadline became %v", got)
	}
}

// The serving node hears of an assignment a moment after the calling node: the
// call waits instead of failing.
func TestAssignmentRaceIsInvisibleToTheGuest(t *testing.T) {
	n := newNetwork(t)
	p := &pair{network: n, a: n.agent(t, "a", 0), b: n.agent(t, "b", 5*time.Second)}
	p.a.dir.Replace(records(t))
	late := records(t)
	late.Instances, late.Assignments = nil, nil
	p.b.dir.Replace(late)
	p.startKV(t)
	arrived := make(chan struct{})
	server := remote.NewServer(p.b.router)
	p.b.server.Stop()
	p.b.server = p.serve(t, p.listen("b:1"), p.issue(t, identity.Node, "b", identity.RoleWorker), &agentServer{
		invoke: func(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
			close(arrived)
			return server.InvokeCapability(ctx, req)
		},
		read: server.ReadClock,
	})
	p.port = p.a.router.Port("i", 3, 5)
	result := make(chan error, 1)
	go func() { result <- p.set(t, "orders/1", "one") }()
	<-arrived
	p.b.dir.Replace(records(t))
	if err := <-result; err != nil {
		t.Errorf("after the record arrived: %v", err)
	}
}
