package remote_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// network joins the agents of a test: addresses are "<node>:1".
type network struct {
	ca *identity.CA
	// dial is how a connection is made; tests break it.
	mu        sync.Mutex
	listeners map[string]*bufconn.Listener
}

func newNetwork(t testing.TB) *network {
	t.Helper()
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	return &network{ca: ca, listeners: map[string]*bufconn.Listener{}}
}

func (n *network) dial(ctx context.Context, address string) (net.Conn, error) {
	n.mu.Lock()
	l, ok := n.listeners[address]
	n.mu.Unlock()
	if !ok {
		return nil, errors.New("connection refused")
	}
	return l.DialContext(ctx)
}

func (n *network) listen(address string) *bufconn.Listener {
	l := bufconn.Listen(1 << 20)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[address] = l
	return l
}

func (n *network) issue(t testing.TB, kind identity.Kind, name string, role identity.Role) *identity.Identity {
	t.Helper()
	bundle, err := n.ca.Issue(identity.Subject{Cluster: "test", Kind: kind, Name: name, Role: role}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(bundle)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// pool returns connections that are made as a subject.
func (n *network) pool(t testing.TB, id *identity.Identity) *identity.Pool {
	t.Helper()
	pool := id.NewPool(identity.Subject.IsWorker, grpc.WithContextDialer(n.dial),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	t.Cleanup(func() { _ = pool.Close() })
	return pool
}

func (n *network) client(t testing.TB, pool *identity.Pool) *remote.Client {
	t.Helper()
	return remote.NewClient(func(address string) (grpc.ClientConnInterface, error) { return pool.Conn("passthrough:///" + address) }, clock())
}

// began is when the clocks of the agents in these tests began.
var began = time.Now()

// clock is the clock of an agent; all have the same in these tests.
func clock() provider.Clock { return func() time.Duration { return time.Since(began) } }

// agentServer is the part of the agent's gRPC server that these tests need.
type agentServer struct {
	pb.UnimplementedNodeAgentServiceServer
	invoke func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error)
	// read is nil where the limits of calls do not matter.
	read func(context.Context, *pb.ReadClockRequest) (*pb.ReadClockResponse, error)
}

// served is what s serves of an agent.
func served(s *remote.Server) *agentServer {
	return &agentServer{invoke: s.InvokeCapability, read: s.ReadClock}
}

func (s *agentServer) ReadClock(ctx context.Context, req *pb.ReadClockRequest) (*pb.ReadClockResponse, error) {
	if s.read == nil {
		return &pb.ReadClockResponse{Clock: &pb.AgentClock{Id: 1, Now: int64(clock()())}}, nil
	}
	return s.read(ctx, req)
}

func (s *agentServer) InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	return s.invoke(ctx, req)
}

func (n *network) serve(t testing.TB, l net.Listener, id *identity.Identity, s *agentServer) *grpc.Server {
	t.Helper()
	server := grpc.NewServer(id.ServerOption(), grpc.ChainUnaryInterceptor(identity.UnaryServerInterceptor, takeCorrelation),
		grpc.MaxRecvMsgSize(16<<20))
	pb.RegisterNodeAgentServiceServer(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // ends with Stop
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return server
}

func takeCorrelation(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if ids := metadata.ValueFromIncomingContext(ctx, correlation.Header); len(ids) == 1 {
		ctx = correlation.With(ctx, ids[0])
	}
	return next(ctx, req)
}

// agent is one node with its directory, providers and server.
type agent struct {
	id     string
	dir    *provider.Directory
	host   *provider.Host
	router *provider.Router
	server *grpc.Server
	client *remote.Client
}

func (n *network) agent(t testing.TB, id string, settle time.Duration) *agent {
	t.Helper()
	self := n.issue(t, identity.Node, id, identity.RoleWorker)
	kind := kv.New(kv.Options{})
	a := &agent{id: id, dir: provider.NewDirectory(id), host: provider.NewHost(slog.New(slog.DiscardHandler), kind), client: n.client(t, n.pool(t, self))}
	var err error
	a.router, err = provider.NewRouter(provider.RouterConfig{
		Directory: a.dir, Host: a.host, Kinds: []provider.Kind{kind}, Remote: a.client, SettleWithin: settle, Clock: clock(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.host.Close(context.Background()); err != nil {
			t.Errorf("close host %s: %v", id, err)
		}
	})
	a.server = n.serve(t, n.listen(id+":1"), self, served(remote.NewServer(a.router)))
	return a
}

// pair is node a with instance i (generation 3), which may read and write
// orders/ at provider kv on node b.
type pair struct {
	*network
	a, b *agent
	port *provider.Port
}

func newPair(t testing.TB) *pair {
	t.Helper()
	n := newNetwork(t)
	p := &pair{network: n, a: n.agent(t, "a", -1), b: n.agent(t, "b", -1)}
	for _, x := range []*agent{p.a, p.b} {
		x.dir.Replace(records(t))
	}
	p.startKV(t)
	p.port = p.a.router.Port("i", 3, 5)
	return p
}

func (p *pair) startKV(t testing.TB) {
	t.Helper()
	if err := p.b.host.Start(t.Context(), "kv", provider.Config{ID: "kv", Driver: "memory"}); err != nil {
		t.Fatal(err)
	}
}

func records(t testing.TB) provider.Records {
	return provider.Records{
		Instances: []provider.InstanceRecord{{ID: "i", Name: "hello", Node: "a", NodeEpoch: 5, Generation: 3}},
		Providers: []provider.ProviderRecord{{ID: "kv", Type: "kv", Node: "b", Running: true, State: "running"}},
		Assignments: []provider.Assignment{
			{Instance: "i", Provider: "kv", Permissions: permissions(t, "kv:read:orders/", "kv:write:orders/"), Bucket: "hello"},
		},
		Nodes: []provider.NodeRecord{{ID: "a", AgentAddress: "a:1"}, {ID: "b", AgentAddress: "b:1"}},
	}
}

func permissions(t testing.TB, texts ...string) permission.Set {
	t.Helper()
	s, err := permission.ParseSet(texts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func getRequest(t testing.TB, key string) []byte {
	return encode(t, &pb.KvGetRequest{Provider: "kv", Key: []byte(key)})
}

func setRequest(t testing.TB, key, value string) []byte {
	return encode(t, &pb.KvSetRequest{Provider: "kv", Key: []byte(key), Value: []byte(value)})
}

func (p *pair) set(t testing.TB, key, value string) error {
	_, err := p.port.Call(t.Context(), "kv", "set", setRequest(t, key, value))
	return err
}

func (p *pair) get(t testing.TB, key string) (string, error) {
	answer, err := p.port.Call(t.Context(), "kv", "get", getRequest(t, key))
	if err != nil {
		return "", err
	}
	var got pb.KvGetResponse
	if err := proto.Unmarshal(answer, &got); err != nil {
		return "", err
	}
	if !got.GetFound() {
		return "", fmt.Errorf("%s not found", key)
	}
	return string(got.GetValue()), nil
}
