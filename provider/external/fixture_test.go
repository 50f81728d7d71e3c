package external_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/external"
)

const patience = 20 * time.Second

// within waits until a condition holds.
func within(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("after %s it does not hold that %s", patience, what)
		}
		<-tick.C
	}
}

// server is a provider's server that does what a test tells it.
type server struct {
	pb.UnimplementedProviderServiceServer
	operations []*pb.ProviderOperation
	describe   func() error
	invoke     func(context.Context, *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error)
	grpc       *grpc.Server
	health     *health.Server // nil: without one
	address    string
}

func newServer() *server {
	return &server{
		operations: []*pb.ProviderOperation{{Name: "read", Idempotent: true}, {Name: "write"}},
		health:     health.NewServer(),
	}
}

func (s *server) Describe(context.Context, *pb.ProviderServiceDescribeRequest) (*pb.ProviderServiceDescribeResponse, error) {
	if s.describe != nil {
		if err := s.describe(); err != nil {
			return nil, err
		}
	}
	return &pb.ProviderServiceDescribeResponse{Operations: s.operations, Version: "test"}, nil
}

func (s *server) Invoke(ctx context.Context, req *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
	if s.invoke != nil {
		return s.invoke(ctx, req)
	}
	return &pb.ProviderServiceInvokeResponse{Payload: append([]byte("did "), req.GetPayload()...)}, nil
}

// start serves at an address; "" is a socket of its own.
func (s *server) start(t testing.TB, address string, options ...grpc.ServerOption) {
	t.Helper()
	network := "unix"
	if address == "" {
		address = filepath.Join(t.TempDir(), "s")
	} else if strings.Contains(address, ":") {
		network = "tcp"
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	if network == "unix" {
		s.address = "unix:" + address
	}
	options = append(options, grpc.MaxRecvMsgSize(8<<20), grpc.MaxSendMsgSize(8<<20))
	s.grpc = grpc.NewServer(options...)
	pb.RegisterProviderServiceServer(s.grpc, s)
	if s.health != nil {
		healthpb.RegisterHealthServer(s.grpc, s.health)
		s.set(healthpb.HealthCheckResponse_SERVING)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.grpc.Serve(l) // ends with Stop
	}()
	t.Cleanup(func() {
		s.grpc.Stop()
		<-done
	})
}

func (s *server) set(state healthpb.HealthCheckResponse_ServingStatus) {
	s.health.SetServingStatus(pb.ProviderService_ServiceDesc.ServiceName, state)
}

// node is a node with the provider "shop" on it, and instances that may use it:
// "all" every operation, "reader" one, "stranger" none.
type node struct {
	dir    *provider.Directory
	host   *provider.Host
	router *provider.Router
}

func newNode(t testing.TB) *node {
	t.Helper()
	kind := external.New(external.Options{})
	n := &node{dir: provider.NewDirectory("n1"), host: provider.NewHost(slog.New(slog.DiscardHandler), kind)}
	var err error
	n.router, err = provider.NewRouter(provider.RouterConfig{Directory: n.dir, Host: n.host, Kinds: []provider.Kind{kind}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.host.Close(context.Background()); err != nil {
			t.Errorf("close the host: %v", err)
		}
	})
	records := provider.Records{Providers: []provider.ProviderRecord{{ID: "shop", Type: "external", Node: "n1", Running: true}}}
	for id, texts := range map[string][]string{
		"all": {"provider:shop:*"}, "reader": {"provider:shop:read", "provider:shop:stock"}, "stranger": {"provider:other:*"},
	} {
		set, err := permission.ParseSet(texts)
		if err != nil {
			t.Fatal(err)
		}
		records.Instances = append(records.Instances, provider.InstanceRecord{ID: id, Name: id, Node: "n1", Generation: 3, Created: 7})
		records.Assignments = append(records.Assignments, provider.Assignment{Instance: id, Provider: "shop", Permissions: set, Bucket: id})
	}
	n.dir.Replace(records)
	return n
}

func (n *node) open(t testing.TB, address string, settings ...string) {
	t.Helper()
	all := map[string]string{"address": address}
	for i := 0; i < len(settings); i += 2 {
		all[settings[i]] = settings[i+1]
	}
	if err := n.host.Start(t.Context(), "external", provider.Config{ID: "shop", Driver: "grpc", Settings: all}); err != nil {
		t.Fatal(err)
	}
}

// call makes one call as an instance.
func (n *node) call(ctx context.Context, instance, operation, payload string) (string, error) {
	req, err := proto.Marshal(&pb.ProviderCallRequest{Provider: "shop", Operation: operation, Payload: []byte(payload)})
	if err != nil {
		return "", err
	}
	answer, err := n.router.Port(instance, 3, 0).Call(ctx, "provider", "call", req)
	if err != nil {
		return "", err
	}
	var resp pb.ProviderCallResponse
	if err := proto.Unmarshal(answer, &resp); err != nil {
		return "", err
	}
	return string(resp.GetPayload()), nil
}

func outcome(err error) string {
	if e, own := errors.AsType[*provider.Error](err); own {
		return e.Details[provider.DetailOutcome]
	}
	return ""
}
