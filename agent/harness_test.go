package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
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
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
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

// fakePeer is a control-plane peer that does what a test tells it.
type fakePeer struct {
	pb.UnimplementedAgentSessionServiceServer
	pb.UnimplementedControlPlaneServiceServer

	address  string
	server   *grpc.Server
	listener *bufconn.Listener

	mu         sync.Mutex
	cut        chan struct{} // closed while the peer cannot be reached
	follows    string        // not leading: the leader's address
	strict     bool          // a dead epoch is refused instead of replaced
	parts      int           // how many messages a full set takes; 0 for one
	mute       bool          // ReportStatus does not answer
	epoch      uint64        // of the node's live lease; 0 for none
	nextEpoch  uint64        // the last epoch given
	set        *assignments  // what is assigned
	streams    map[chan *pb.WatchAssignmentsResponse]struct{}
	calls      map[string]int // by method
	instances  map[string][]*pb.InstanceStatus
	providers  map[string][]*pb.ProviderStatus
	batches    []*pb.ReportStatusRequest
	modules    map[string][]byte
	registered *pb.RegisterNodeRequest
}

func (n *network) peer(address string) *fakePeer {
	p := &fakePeer{
		address: address, server: grpc.NewServer(), listener: bufconn.Listen(1 << 20),
		cut: make(chan struct{}), set: newAssignments(), streams: map[chan *pb.WatchAssignmentsResponse]struct{}{},
		calls: map[string]int{}, instances: map[string][]*pb.InstanceStatus{},
		providers: map[string][]*pb.ProviderStatus{}, modules: map[string][]byte{},
	}
	p.set.sequence = 100
	pb.RegisterAgentSessionServiceServer(p.server, p)
	pb.RegisterControlPlaneServiceServer(p.server, p)
	go func() { _ = p.server.Serve(p.listener) }()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.peers[address] = p
	return p
}

// enter counts a call and refuses it while the peer is cut off.
func (p *fakePeer) enter(method string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls[method]++
	select {
	case <-p.cut:
		return status.Error(codes.Unavailable, "cut off")
	default:
		return nil
	}
}

func (p *fakePeer) count(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[method]
}

// isolate cuts the peer off, ending all streams; expire also ends the lease.
func (p *fakePeer) isolate(expire bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.cut)
	if expire {
		p.epoch = 0
	}
}

func (p *fakePeer) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = make(chan struct{})
}

func (p *fakePeer) leading() error {
	if p.follows != "" {
		return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "not leading").With(leaderAddressKey, p.follows)
	}
	return nil
}

func (p *fakePeer) RegisterNode(_ context.Context, req *pb.RegisterNodeRequest) (*pb.RegisterNodeResponse, error) {
	if err := p.enter("RegisterNode"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.leading(); err != nil {
		return nil, err
	}
	p.registered = req
	if p.strict && req.GetEpoch() != 0 && req.GetEpoch() != p.epoch {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "epoch %d is not alive", req.GetEpoch())
	}
	if req.GetEpoch() == 0 || req.GetEpoch() != p.epoch {
		p.nextEpoch++
		p.epoch = p.nextEpoch
	}
	return &pb.RegisterNodeResponse{Epoch: p.epoch, LeaseTtl: durationpb.New(testTTL)}, nil
}

func (p *fakePeer) alive(epoch uint64) error {
	if epoch != p.epoch {
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "epoch %d is not alive", epoch)
	}
	return p.leading()
}

func (p *fakePeer) Heartbeat(_ context.Context, req *pb.HeartbeatRequest) (*pb.HeartbeatResponse, error) {
	if err := p.enter("Heartbeat"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.alive(req.GetEpoch()); err != nil {
		return nil, err
	}
	return &pb.HeartbeatResponse{LeaseTtl: durationpb.New(testTTL)}, nil
}

func (p *fakePeer) WatchAssignments(req *pb.WatchAssignmentsRequest, stream grpc.ServerStreamingServer[pb.WatchAssignmentsResponse]) error {
	if err := p.enter("WatchAssignments"); err != nil {
		return err
	}
	news := make(chan *pb.WatchAssignmentsResponse, 16)
	p.mu.Lock()
	err := p.alive(req.GetEpoch())
	full, cut := p.set.full(func(string) *pb.InstanceStatus { return nil }), p.cut
	p.streams[news] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.streams, news)
	}()
	if err != nil {
		return err
	}
	for msg := full; ; {
		for _, part := range split(msg, p.parts) {
			if err := stream.Send(part); err != nil {
				return err
			}
		}
		select {
		case msg = <-news:
		case <-cut:
			return status.Error(codes.Unavailable, "cut off")
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// split gives a full set in n messages, as a leader does with a large one.
func split(msg *pb.WatchAssignmentsResponse, n int) []*pb.WatchAssignmentsResponse {
	if !msg.GetComplete() || n < 2 {
		return []*pb.WatchAssignmentsResponse{msg}
	}
	var out []*pb.WatchAssignmentsResponse
	first := msg.GetResultsIn() - uint64(n)
	for i := range n {
		a, b := i*len(msg.GetChanges())/n, (i+1)*len(msg.GetChanges())/n
		out = append(out, &pb.WatchAssignmentsResponse{
			Complete: true, More: i < n-1, Changes: msg.GetChanges()[a:b],
			AppliesTo: first + uint64(i), ResultsIn: first + uint64(i) + 1,
		})
	}
	return out
}

func (p *fakePeer) ReportStatus(ctx context.Context, req *pb.ReportStatusRequest) (*pb.ReportStatusResponse, error) {
	if err := p.enter("ReportStatus"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	if p.mute {
		p.mu.Unlock()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	defer p.mu.Unlock()
	if err := p.alive(req.GetEpoch()); err != nil {
		return nil, err
	}
	p.batches = append(p.batches, req)
	for _, r := range req.GetInstances() {
		p.instances[r.GetInstanceId()] = append(p.instances[r.GetInstanceId()], r.GetStatus())
	}
	for _, r := range req.GetProviders() {
		p.providers[r.GetProviderId()] = append(p.providers[r.GetProviderId()], r.GetStatus())
	}
	return &pb.ReportStatusResponse{}, nil
}

func (p *fakePeer) FetchModule(req *pb.FetchModuleRequest, stream grpc.ServerStreamingServer[pb.FetchModuleResponse]) error {
	if err := p.enter("FetchModule"); err != nil {
		return err
	}
	p.mu.Lock()
	data, ok := p.modules[req.GetDigest()]
	p.mu.Unlock()
	if !ok {
		return apierror.New(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "no module %s", req.GetDigest())
	}
	for part := range slices.Chunk(data, 64) {
		if err := stream.Send(&pb.FetchModuleResponse{Chunk: part}); err != nil {
			return err
		}
	}
	return nil
}

// put changes what is assigned and tells the agent.
func (p *fakePeer) put(changes ...*pb.AssignmentChange) {
	p.mu.Lock()
	defer p.mu.Unlock()
	msg := &pb.WatchAssignmentsResponse{AppliesTo: p.set.sequence, ResultsIn: p.set.sequence + 1, Changes: changes}
	if err := p.set.apply(msg); err != nil {
		panic(err)
	}
	for s := range p.streams {
		s <- msg
	}
}

// lose sends a difference whose predecessor the agent never gets.
func (p *fakePeer) lose(changes ...*pb.AssignmentChange) {
	p.mu.Lock()
	p.set.sequence += 5
	p.mu.Unlock()
	p.put(changes...)
}

// reported returns what was last reported of an instance.
func (p *fakePeer) reported(id string) *pb.InstanceStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if all := p.instances[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return &pb.InstanceStatus{}
}

func (p *fakePeer) reportedProvider(id string) *pb.ProviderStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if all := p.providers[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return &pb.ProviderStatus{}
}

// add stores a module and returns its digest.
func (p *fakePeer) add(data []byte) string {
	sum := sha256.Sum256(data)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	p.mu.Lock()
	defer p.mu.Unlock()
	p.modules[digest] = data
	return digest
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

var testModule = wasmModule(nil, []string{"wasmatrix_on_invoke"})

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
