package remote_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

var benchValue = strings.Repeat("x", 128)

// local returns a port of an instance on the provider's own node.
func local(b *testing.B, driver string) *provider.Port {
	b.Helper()
	n := newNetwork(b)
	a := n.agent(b, "b", -1)
	r := records(b)
	r.Instances[0].Node = "b"
	a.dir.Replace(r)
	cfg := provider.Config{ID: "kv", Driver: driver, Dir: b.TempDir()}
	if driver == "bbolt" {
		cfg.Settings = map[string]string{"fsync": "false"}
	}
	if err := a.host.Start(b.Context(), "kv", cfg); err != nil {
		b.Fatal(err)
	}
	port := a.router.Port("i", 3, 5)
	for i := range 10000 {
		if _, err := port.Call(b.Context(), "kv", "set", setRequest(b, fmt.Sprintf("orders/%05d", i), benchValue)); err != nil {
			b.Fatal(err)
		}
	}
	return port
}

func benchmarkPort(b *testing.B, port *provider.Port, operation string, payload []byte) {
	b.Helper()
	ctx := b.Context()
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := port.Call(ctx, "kv", operation, payload); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(16)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := port.Call(ctx, "kv", operation, payload); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func BenchmarkLocalGet(b *testing.B) {
	for _, driver := range []string{"memory", "bbolt"} {
		b.Run(driver, func(b *testing.B) { benchmarkPort(b, local(b, driver), "get", getRequest(b, "orders/00500")) })
	}
}

func BenchmarkLocalSet(b *testing.B) {
	for _, driver := range []string{"memory", "bbolt"} {
		b.Run(driver, func(b *testing.B) {
			benchmarkPort(b, local(b, driver), "set", setRequest(b, "orders/00500", benchValue))
		})
	}
}

// loopback is node b behind a real socket.
func loopback(b *testing.B, n *network, s *agentServer) (address string) {
	b.Helper()
	l, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	n.serve(b, l, n.issue(b, identity.Node, "b", identity.RoleWorker), s)
	return l.Addr().String()
}

func tcpPool(b *testing.B, n *network) *identity.Pool {
	b.Helper()
	pool := n.issue(b, identity.Node, "a", identity.RoleWorker).NewPool(identity.Subject.IsWorker)
	b.Cleanup(func() { _ = pool.Close() })
	return pool
}

// BenchmarkRemoteGet is a guest's get over the whole way: port, client, mutual
// TLS over loopback TCP, server, decision, memory driver. BenchmarkBareGRPC is
// the same messages over the same connection with nothing around them.
func BenchmarkRemoteGet(b *testing.B) {
	n := newNetwork(b)
	kind := kv.New(kv.Options{})
	serving := n.agent(b, "b", -1)
	address := loopback(b, n, served(remote.NewServer(serving.router)))
	if err := serving.host.Start(b.Context(), "kv", provider.Config{ID: "kv", Driver: "memory"}); err != nil {
		b.Fatal(err)
	}
	pool := tcpPool(b, n)
	dir := provider.NewDirectory("a")
	router, err := provider.NewRouter(provider.RouterConfig{
		Directory: dir, Host: serving.host, Kinds: []provider.Kind{kind},
		Remote: remote.NewClient(func(a string) (grpc.ClientConnInterface, error) { return pool.Conn(a) }, clock()),
		Clock:  clock(),
	})
	if err != nil {
		b.Fatal(err)
	}
	r := records(b)
	r.Nodes = []provider.NodeRecord{{ID: "b", AgentAddress: address}}
	dir.Replace(r)
	serving.dir.Replace(records(b))
	port := router.Port("i", 3, 5)
	if _, err := port.Call(b.Context(), "kv", "set", setRequest(b, "orders/1", benchValue)); err != nil {
		b.Fatal(err)
	}
	benchmarkPort(b, port, "get", getRequest(b, "orders/1"))
}

func BenchmarkBareGRPC(b *testing.B) {
	n := newNetwork(b)
	answer := encode(b, &pb.KvGetResponse{Found: true, Value: []byte(benchValue), Version: 1})
	address := loopback(b, n, &agentServer{invoke: func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
		return &pb.InvokeCapabilityResponse{Payload: answer}, nil
	}})
	conn, err := tcpPool(b, n).Conn(address)
	if err != nil {
		b.Fatal(err)
	}
	agent := pb.NewNodeAgentServiceClient(conn)
	ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
	defer cancel()
	req := &pb.InvokeCapabilityRequest{
		Caller: instanceCaller("i", 3, 5), ProviderId: "kv", Capability: "kv", Operation: "get", Payload: getRequest(b, "orders/1"),
	}
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := agent.InvokeCapability(ctx, req); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(16)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := agent.InvokeCapability(ctx, req); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}
