package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

// controlPlane answers StopInstance by target and notes what it saw.
type controlPlane struct {
	pb.UnimplementedControlPlaneServiceServer
	mu    sync.Mutex
	calls int
	seen  context.Context //nolint:containedctx // kept for the assertions of a test
}

func (c *controlPlane) StopInstance(ctx context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	c.mu.Lock()
	c.calls++
	c.seen = ctx
	c.mu.Unlock()
	switch req.GetTarget() {
	case "panic":
		panic("boom")
	case "conflict":
		return nil, fmt.Errorf("stop: %w", apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "it is gone").With("state", "STOPPED").Next("wasmatrix ps"))
	case "plain":
		return nil, errors.New("disk full")
	case "deadline":
		return nil, context.DeadlineExceeded
	}
	return &pb.StopInstanceResponse{Index: 7}, nil
}

func (c *controlPlane) UploadModule(stream grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

type fixture struct {
	control  *controlPlane
	client   pb.ControlPlaneServiceClient
	conn     *grpc.ClientConn
	registry *prometheus.Registry
	log      *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func issue(t testing.TB, ca *identity.CA, s identity.Subject) *identity.Identity {
	t.Helper()
	b, err := ca.Issue(s, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	ca, err := identity.NewCA("dev")
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{control: &controlPlane{}, registry: prometheus.NewRegistry(), log: &lockedBuffer{}}
	srv := grpc.NewServer(rpc.ServerOptions(rpc.ServerConfig{
		Identity:   issue(t, ca, identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleServer}),
		Logger:     slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Registerer: f.registry,
	})...)
	pb.RegisterControlPlaneServiceServer(srv, f.control)
	h := health.NewServer()
	h.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	rpc.RegisterHealthAndReflection(srv, h)
	l := bufconn.Listen(1 << 20)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	ann := issue(t, ca, identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin})
	f.conn, err = grpc.NewClient("passthrough:///bufconn", append(rpc.DialOptions(), ann.DialOption(nil),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))...)
	if err != nil {
		t.Fatal(err)
	}
	f.client = pb.NewControlPlaneServiceClient(f.conn)
	t.Cleanup(func() {
		_ = f.conn.Close()
		srv.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return f
}

func TestEveryFailureLeavesInOneShape(t *testing.T) {
	f := newFixture(t)
	tests := []struct {
		target      string
		wantCode    pb.ErrorCode
		wantGRPC    codes.Code
		wantMessage string
	}{
		{target: "panic", wantCode: pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, wantGRPC: codes.Internal, wantMessage: "ControlPlaneService/StopInstance failed by a defect of wasmatrix"},
		{target: "conflict", wantCode: pb.ErrorCode_ERROR_CODE_CONFLICT, wantGRPC: codes.FailedPrecondition, wantMessage: "stop: it is gone"},
		{target: "plain", wantCode: pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, wantGRPC: codes.Internal, wantMessage: "disk full"},
		{target: "deadline", wantCode: pb.ErrorCode_ERROR_CODE_TIMEOUT, wantGRPC: codes.DeadlineExceeded, wantMessage: "context deadline exceeded"},
		{target: "", wantCode: pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, wantGRPC: codes.InvalidArgument, wantMessage: "invalid request: target: must be at least 1 characters"},
	}
	for _, tt := range tests {
		t.Run("target "+tt.target, func(t *testing.T) {
			ctx := correlation.With(t.Context(), "test-"+tt.target)
			_, err := f.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: tt.target})
			if got := status.Code(err); got != tt.wantGRPC {
				t.Errorf("gRPC code is %v, want %v", got, tt.wantGRPC)
			}
			got := apierror.From(err).Proto(t.Context())
			if got.GetCode() != tt.wantCode || got.GetMessage() != tt.wantMessage {
				t.Errorf("got %v %q, want %v %q", got.GetCode(), got.GetMessage(), tt.wantCode, tt.wantMessage)
			}
			if got.GetCorrelationId() != "test-"+tt.target || got.GetTimestamp() == nil {
				t.Errorf("correlation id %q, timestamp %v", got.GetCorrelationId(), got.GetTimestamp())
			}
		})
	}
	if got := apierror.From(func() error {
		_, err := f.client.StopInstance(t.Context(), &pb.StopInstanceRequest{Target: "conflict"})
		return err
	}()); got.Detail("state") != "STOPPED" || got.Proto(t.Context()).GetNextStep() != "wasmatrix ps" {
		t.Errorf("details or next step were lost: %v", got.Proto(t.Context()))
	}
}

func TestInvalidRequestNamesEveryFieldAndNeverReachesTheHandler(t *testing.T) {
	f := newFixture(t)
	_, err := f.client.StopInstance(t.Context(), &pb.StopInstanceRequest{RequestId: strings.Repeat("x", 65)})
	got := apierror.From(err)
	if got.Code() != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST || !strings.HasSuffix(got.Error(), "(and 1 more)") {
		t.Errorf("got %v", got)
	}
	for _, field := range []string{"target", "request_id"} {
		if got.Detail(field) == "" {
			t.Errorf("no detail for %s in %v", field, got.Proto(t.Context()).GetDetails())
		}
	}
	_, err = f.client.StartInstance(t.Context(), &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "Hello", Module: "m", Capabilities: []*pb.CapabilityGrant{{Provider: "kv"}, {Provider: "K V"}},
	}})
	if got := apierror.From(err); got.Detail("spec.name") == "" || got.Detail("spec.capabilities[1].provider") == "" {
		t.Errorf("got %v", got.Proto(t.Context()))
	}
	if f.control.calls != 0 {
		t.Errorf("the handler ran %d times", f.control.calls)
	}
}

func TestMessagesOfAStreamAreValidated(t *testing.T) {
	f := newFixture(t)
	stream, err := f.client.UploadModule(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.UploadModuleRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.CloseAndRecv()
	if got := apierror.From(err); got.Code() != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST || got.Detail("part") == "" {
		t.Errorf("got %v, want INVALID_REQUEST about part", err)
	}
}

func TestCorrelationIDIsTakenOrMadeAndAlwaysComesBack(t *testing.T) {
	f := newFixture(t)
	tests := []struct {
		name string
		sent string
		kept bool
	}{
		{name: "a valid one is kept", sent: "my-id", kept: true},
		{name: "a missing one is made"},
		{name: "an overlong one is replaced", sent: strings.Repeat("x", 129)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := t.Context()
			if tt.sent != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, correlation.Header, tt.sent)
			}
			for _, target := range []string{"ok", "conflict", ""} {
				var header metadata.MD
				_, _ = f.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: target}, grpc.Header(&header))
				got := header.Get(correlation.Header)
				if len(got) != 1 || !correlation.Valid(got[0]) || (got[0] == tt.sent) != tt.kept {
					t.Errorf("target %q: header is %v", target, got)
				}
				if target == "ok" && len(got) == 1 && correlation.ID(f.control.seen) != got[0] {
					t.Errorf("handler saw %q, client got %q", correlation.ID(f.control.seen), got[0])
				}
			}
		})
	}
}

func TestHandlerSeesTheCaller(t *testing.T) {
	f := newFixture(t)
	if _, err := f.client.StopInstance(t.Context(), &pb.StopInstanceRequest{Target: "x"}); err != nil {
		t.Fatal(err)
	}
	if got, _ := identity.Caller(f.control.seen); got.String() != "spiffe://dev/user/ann/admin" {
		t.Errorf("caller is %v", got)
	}
}

func TestStandardServicesKeepTheirCodes(t *testing.T) {
	f := newFixture(t)
	h := healthpb.NewHealthClient(f.conn)
	if got, err := h.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := h.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "x"}); status.Code(err) != codes.NotFound {
		t.Errorf("got %v, want NotFound", err)
	}
	if _, err := f.client.RestartInstance(t.Context(), &pb.RestartInstanceRequest{Target: "x"}); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v, want Unimplemented", err)
	}
}

func TestCallsAreCountedAndLogged(t *testing.T) {
	f := newFixture(t)
	for _, target := range []string{"ok", "ok", "conflict", "panic", ""} {
		_, _ = f.client.StopInstance(correlation.With(t.Context(), "cid-"+target), &pb.StopInstanceRequest{Target: target})
	}
	want := `
# HELP wasmatrix_api_requests_total Finished gRPC calls by method and result code, OK or the error code.
# TYPE wasmatrix_api_requests_total counter
wasmatrix_api_requests_total{code="CONFLICT",method="ControlPlaneService/StopInstance"} 1
wasmatrix_api_requests_total{code="INTERNAL_ERROR",method="ControlPlaneService/StopInstance"} 1
wasmatrix_api_requests_total{code="INVALID_REQUEST",method="ControlPlaneService/StopInstance"} 1
wasmatrix_api_requests_total{code="OK",method="ControlPlaneService/StopInstance"} 2
`
	if err := testutil.GatherAndCompare(f.registry, strings.NewReader(want), "wasmatrix_api_requests_total"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(f.registry, "wasmatrix_api_request_duration_seconds"); err != nil || n != 1 {
		t.Errorf("%d duration series, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(f.registry); err != nil || len(problems) > 0 {
		t.Errorf("metric names: %v, %v", problems, err)
	}
	for _, line := range []string{
		`level=DEBUG msg="api call" method=ControlPlaneService/StopInstance code=OK`,
		`level=INFO msg="api call" method=ControlPlaneService/StopInstance code=CONFLICT`,
		`level=ERROR msg="handler panicked" method=ControlPlaneService/StopInstance panic=boom correlation_id=cid-panic`,
		`correlation_id=cid-conflict caller=spiffe://dev/user/ann/admin error="stop: it is gone"`,
	} {
		if !strings.Contains(f.log.String(), line) {
			t.Errorf("no log line %q in\n%s", line, f.log)
		}
	}
}

func TestServersShareOneRegistry(t *testing.T) {
	ca, err := identity.NewCA("dev")
	if err != nil {
		t.Fatal(err)
	}
	cfg := rpc.ServerConfig{
		Identity:   issue(t, ca, identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleServer}),
		Registerer: prometheus.NewPedanticRegistry(),
	}
	rpc.ServerOptions(cfg)
	rpc.ServerOptions(cfg)
}

func BenchmarkStopInstance(b *testing.B) {
	f := newFixture(b)
	req := &pb.StopInstanceRequest{Target: "ok"}
	for b.Loop() {
		if _, err := f.client.StopInstance(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}
