package identity_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// callers is a health service that tells who called.
type callers struct {
	healthpb.UnimplementedHealthServer
	seen chan identity.Subject
}

func (c *callers) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	s, _ := identity.Caller(ctx)
	c.seen <- s
	return &healthpb.HealthCheckResponse{}, nil
}

func (c *callers) Watch(_ *healthpb.HealthCheckRequest, stream grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	s, _ := identity.Caller(stream.Context())
	c.seen <- s
	return nil
}

func serve(t *testing.T, id *identity.Identity) (address string, seen chan identity.Subject) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(id.ServerOption(),
		grpc.ChainUnaryInterceptor(identity.UnaryServerInterceptor),
		grpc.ChainStreamInterceptor(identity.StreamServerInterceptor))
	c := &callers{seen: make(chan identity.Subject, 1)}
	healthpb.RegisterHealthServer(srv, c)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String(), c.seen
}

func TestCallerIsTheOneOfTheCertificateUnlessAPeerForwards(t *testing.T) {
	ca := newCA(t, "dev")
	address, seen := serve(t, issue(t, ca, identity.Node, "n1", identity.RoleServer))
	ann := "spiffe://dev/user/ann/admin"

	tests := []struct {
		name      string
		client    *identity.Identity
		forwarded []string
		want      string
	}{
		{name: "a user", client: issue(t, ca, identity.User, "ann", identity.RoleAdmin), want: ann},
		{name: "a peer itself", client: issue(t, ca, identity.Node, "n2", identity.RoleBoth), want: "spiffe://dev/node/n2/both"},
		{name: "a peer for a user", client: issue(t, ca, identity.Node, "n2", identity.RoleServer), forwarded: []string{ann}, want: ann},
		{name: "a worker for a user", client: issue(t, ca, identity.Node, "w1", identity.RoleWorker), forwarded: []string{ann}},
		{name: "a user for another user", client: issue(t, ca, identity.User, "bob", identity.RoleAdmin), forwarded: []string{ann}},
		{name: "a peer for a subject of another cluster", client: issue(t, ca, identity.Node, "n2", identity.RoleServer), forwarded: []string{"spiffe://prod/user/ann/admin"}},
		{name: "a peer for nonsense", client: issue(t, ca, identity.Node, "n2", identity.RoleServer), forwarded: []string{"ann"}},
		{name: "a peer for a node, at a service that nodes call themselves", client: issue(t, ca, identity.Node, "n2", identity.RoleBoth), forwarded: []string{"spiffe://dev/node/n3/both"}},
		{name: "a peer for two at once", client: issue(t, ca, identity.Node, "n2", identity.RoleServer), forwarded: []string{ann, ann}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pool := tt.client.NewPool(identity.Subject.IsPeer)
			defer func() { _ = pool.Close() }()
			conn, err := pool.Conn(address)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			for _, f := range tt.forwarded {
				ctx = metadata.AppendToOutgoingContext(ctx, identity.ForwardedCallerKey, f)
			}
			_, unaryErr := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			if tt.want == "" {
				if got := apierror.CodeOf(unaryErr); got != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
					t.Errorf("unary call: got %v, want PERMISSION_DENIED", unaryErr)
				}
				stream, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				if got := apierror.CodeOf(err); got != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
					t.Errorf("stream: got %v, want PERMISSION_DENIED", err)
				}
				return
			}
			if unaryErr != nil {
				t.Fatal(unaryErr)
			}
			if got := (<-seen).String(); got != tt.want {
				t.Errorf("unary call: caller is %s, want %s", got, tt.want)
			}
			if _, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{}); err != nil {
				t.Fatal(err)
			}
			if got := (<-seen).String(); got != tt.want {
				t.Errorf("stream: caller is %s, want %s", got, tt.want)
			}
		})
	}
}

func TestForwardCallerNamesTheCaller(t *testing.T) {
	ann := identity.Subject{Cluster: "dev", Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}
	md, _ := metadata.FromOutgoingContext(identity.ForwardCaller(identity.WithCaller(t.Context(), ann)))
	if got := md.Get(identity.ForwardedCallerKey); len(got) != 1 || got[0] != ann.String() {
		t.Errorf("outgoing metadata is %v", md)
	}
	if md, ok := metadata.FromOutgoingContext(identity.ForwardCaller(t.Context())); ok {
		t.Errorf("without a caller there is metadata %v", md)
	}
}

func TestCallWithoutAConnectionHasNoCaller(t *testing.T) {
	if _, err := identity.Authenticate(t.Context()); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("got %v, want PERMISSION_DENIED", err)
	}
}

func TestPoolSharesConnectionsUntilItIsClosed(t *testing.T) {
	ca := newCA(t, "dev")
	pool := issue(t, ca, identity.Node, "n1", identity.RoleServer).NewPool(nil)
	a, err := pool.Conn("127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := pool.Conn("127.0.0.1:1")
	if err != nil || a != b {
		t.Errorf("second connection to one address is another one (%v)", err)
	}
	c, err := pool.Conn("127.0.0.1:2")
	if err != nil || a == c {
		t.Errorf("two addresses share a connection (%v)", err)
	}
	if err := pool.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Conn("127.0.0.1:1"); err == nil {
		t.Error("a closed pool gave a connection")
	}
}
