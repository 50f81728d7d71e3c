package agent

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

const (
	testNode = "n1"
	testTTL  = 3 * time.Second
)

// network is a set of fake peers that are reached over memory.
type network struct {
	t     *testing.T
	mu    sync.Mutex
	peers map[string]*fakePeer
	conns map[string]*grpc.ClientConn
}

func newNetwork(t *testing.T) *network {
	n := &network{t: t, peers: map[string]*fakePeer{}, conns: map[string]*grpc.ClientConn{}}
	t.Cleanup(n.close)
	return n
}

func (n *network) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		_ = c.Close()
	}
	for _, p := range n.peers {
		p.server.Stop()
		_ = p.listener.Close()
	}
}

// dial is Config.Conn.
func (n *network) dial(address string) (grpc.ClientConnInterface, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c, ok := n.conns[address]; ok {
		return c, nil
	}
	p, ok := n.peers[address]
	if !ok {
		return nil, status.Error(codes.Unavailable, "no such peer "+address)
	}
	c, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.listener.DialContext(ctx) }),
	)
	if err == nil {
		n.conns[address] = c
	}
	return c, err
}

// addresses returns all peers, in the order of their addresses.
func (n *network) addresses() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.peers))
}

func putInstance(inst *pb.Instance) *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutInstance{PutInstance: inst}}
}

func removeInstance(id string) *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveInstance{RemoveInstance: id}}
}

// node is an agent under test with a fake executor.
type node struct {
	*Agent
	t    *testing.T
	fake *runtimetest.Fake
	cfg  Config
	end  func()
}

// testConfig is the configuration of a node of the network.
func testConfig(t *testing.T, n *network, change ...func(*Config)) Config {
	t.Helper()
	began := time.Now()
	cfg := Config{
		Node: &pb.NodeInfo{
			Id: testNode, AgentAddress: "127.0.0.1:1", Capacity: &pb.NodeCapacity{Instances: 100, MemoryBytes: 1 << 30},
		},
		DataDir: t.TempDir(), Peers: n.addresses(), Conn: n.dial, DefaultRuntime: "wasm",
		Kinds: map[string]provider.Kind{}, Logger: slog.New(slog.DiscardHandler),
		Registerer: prometheus.NewPedanticRegistry(),
		Clock:      func() time.Duration { return time.Since(began) },
	}
	for _, c := range change {
		c(&cfg)
	}
	return cfg
}

// start runs an agent until the test ends or end is called.
func start(t *testing.T, cfg Config) *node {
	t.Helper()
	n := &node{t: t, fake: runtimetest.NewFake(), cfg: cfg}
	cfg.Runtimes = map[string]runtime.Runtime{"wasm": n.fake}
	a, err := New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	n.Agent = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	n.end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if left := n.fake.Unclosed(); len(left) > 0 {
			t.Errorf("guests not closed: %v", left)
		}
	})
	t.Cleanup(n.end)
	return n
}

// again runs another agent process on the same disk.
func (n *node) again(change ...func(*Config)) *node {
	n.t.Helper()
	n.end()
	cfg := n.cfg
	cfg.Registerer = prometheus.NewPedanticRegistry()
	for _, c := range change {
		c(&cfg)
	}
	return start(n.t, cfg)
}

// within waits until cond holds, for at most limit of the bubble's time.
func within(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		synctest.Wait()
		if cond() {
			return
		}
		if !time.Now().Before(deadline) {
			t.Fatalf("after %s it does not hold that %s", limit, what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// still checks that cond holds for all of the bubble's next d.
func still(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	pause := max(50*time.Millisecond, d/200)
	for until := time.Now().Add(d); time.Now().Before(until); <-time.After(pause) {
		synctest.Wait()
		if !cond() {
			t.Fatalf("it does not hold any more that %s", what)
		}
	}
}

func (n *node) state(id string) pb.InstanceState { return n.worker.status(id).GetState() }

func (n *node) running(ids ...string) func() bool {
	slices.Sort(ids)
	return func() bool { return slices.Equal(n.fake.Running(), ids) }
}

// serve puts the agent's service behind a server that believes in the caller
// that a client names, and returns a connection to it.
func (n *node) serve(t *testing.T) pb.NodeAgentServiceClient {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(believe(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, &believingStream{ServerStream: s})
		}),
	)
	n.Register(server)
	go func() { _ = server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		_ = listener.Close()
	})
	return pb.NewNodeAgentServiceClient(conn)
}

const callerKey = "test-caller"

// believe takes the caller from the metadata.
func believe(ctx context.Context) context.Context {
	if id := metadata.ValueFromIncomingContext(ctx, correlation.Header); len(id) > 0 {
		ctx = correlation.With(ctx, id[0])
	}
	named := metadata.ValueFromIncomingContext(ctx, callerKey)
	if len(named) == 0 {
		return ctx
	}
	subject, err := identity.ParseSubject(named[0])
	if err != nil {
		panic(err)
	}
	return identity.WithCaller(ctx, subject)
}

type believingStream struct{ grpc.ServerStream }

func (s *believingStream) Context() context.Context { return believe(s.ServerStream.Context()) }

// as returns a context of a call by a subject such as "user/ann/admin".
func as(ctx context.Context, subject string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, callerKey, "spiffe://test/"+subject)
}

const (
	asAdmin  = "user/ann/admin"
	asPeer   = "node/p1/server"
	asWorker = "node/n2/worker"
)

func (n *node) component(name string) Component {
	for _, c := range n.Ready() {
		if c.Name == name {
			return c
		}
	}
	return Component{}
}

// bubble runs a test with one leader in a bubble of its own time.
func bubble(t *testing.T, f func(t *testing.T, n *network, leader *fakePeer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		f(t, n, n.peer("p1"))
	})
}

var testModule = modulestest.Reactor()

// instance is a workload's instance as the registry assigns it to the node.
func instance(leader *fakePeer, id string, change ...func(*pb.Instance)) *pb.Instance {
	inst := &pb.Instance{
		Id: id, Name: "web", DesiredRunning: true, CorrelationId: "start-of-" + id,
		Spec:      &pb.WorkloadSpec{Name: "web", Module: leader.add(testModule)},
		Placement: &pb.Placement{NodeId: testNode, NodeEpoch: 1, Generation: 1},
	}
	for _, c := range change {
		c(inst)
	}
	return inst
}

func generation(g uint64) func(*pb.Instance) {
	return func(inst *pb.Instance) { inst.Placement.Generation = g }
}

func restart(p *pb.RestartPolicy) func(*pb.Instance) {
	return func(inst *pb.Instance) { inst.Spec.Restart = p }
}

func stopOnDisconnect(inst *pb.Instance) { inst.Spec.OnDisconnect = onDisconnectStop }

func stopped(inst *pb.Instance) { inst.DesiredRunning = false }

var trap = runtime.Exit{Reason: runtime.Trap, Message: "unreachable"}

var completed = runtime.Exit{Reason: runtime.Completed}

// slowStop is a drain that takes d.
func slowStop(d time.Duration) func(context.Context, runtime.Spec) error {
	return func(ctx context.Context, _ runtime.Spec) error {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		return nil
	}
}

// logTo sends the agent's own log to w.
func logTo(w io.Writer) func(*Config) {
	return func(cfg *Config) { cfg.Logger = slog.New(slog.NewTextHandler(w, nil)) }
}

// sharedText collects what several goroutines write.
type sharedText struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *sharedText) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *sharedText) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}
