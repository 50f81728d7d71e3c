package control

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cluster/modules"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	alice  = identity.Subject{Cluster: "test", Kind: identity.User, Name: "alice", Role: identity.RoleAdmin}
	worker = identity.Subject{Cluster: "test", Kind: identity.Node, Name: "w1", Role: identity.RoleWorker}
	server = identity.Subject{Cluster: "test", Kind: identity.Node, Name: "p2", Role: identity.RoleServer}
)

// callerKey is the metadata key by which a test names the caller of a call.
const callerKey = "x-test-caller"

// testPeer is a peer with the service on it: the real state, a log that commits
// at once, and connections in memory.
type testPeer struct {
	t       *testing.T
	service *Service
	client  pb.ControlPlaneServiceClient
	conn    *grpc.ClientConn
	audit   *lockedBuffer

	mu    sync.Mutex
	state *fsm.State
	index uint64
	// leader is nil on the peer that leads, and the leader elsewhere.
	leader *testPeer
	// followers get every command that is committed here, unless they are held back.
	followers []*testPeer
	heldBack  bool
	backlog   []*pb.Command
	// noLeader makes the peer answer as one without a leader.
	noLeader bool
	proposed []*pb.Command
	// linearized counts the linearizable reads.
	linearized int
	agents     map[string]grpc.ClientConnInterface
}

// newPeer makes a peer that leads. Its nodes are added with addNode.
func newPeer(t *testing.T) *testPeer {
	t.Helper()
	p := &testPeer{t: t, state: fsm.New(), audit: &lockedBuffer{}, agents: map[string]grpc.ClientConnInterface{}}
	store, err := modules.NewStore(modules.StoreConfig{Dir: t.TempDir(), Reserve: -1})
	if err != nil {
		t.Fatal(err)
	}
	replicator, err := modules.NewReplicator(modules.Config{
		Self: "p1", Store: store, Registry: p, Logger: slog.New(slog.DiscardHandler),
		Peers: func(context.Context) []modules.PeerRef { return []modules.PeerRef{{ID: "p1", Voter: true}} },
		Conn:  func(string) (grpc.ClientConnInterface, error) { return nil, io.ErrUnexpectedEOF },
	})
	if err != nil {
		t.Fatal(err)
	}
	p.service, err = New(Config{
		Proposer: p, Viewer: p, LeaderConn: p.leaderConn, Modules: replicator, AgentConn: p.agentConn,
		Explain: func(v fsm.View, _ *pb.Instance) []*pb.NodeVerdict {
			var out []*pb.NodeVerdict
			for _, n := range v.Nodes(nil) {
				out = append(out, &pb.NodeVerdict{NodeId: n.GetId(), Eligible: true})
			}
			return out
		},
		Logger: slog.New(slog.NewTextHandler(p.audit, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	p.conn = serve(t, p.service.Register)
	p.client = pb.NewControlPlaneServiceClient(p.conn)
	return p
}

// newFollower makes a peer that follows leader.
func newFollower(t *testing.T, leader *testPeer) *testPeer {
	t.Helper()
	p := newPeer(t)
	p.leader = leader
	leader.followers = append(leader.followers, p)
	return p
}

// Propose implements Proposer.
func (p *testPeer) Propose(_ context.Context, cmd *pb.Command) (*pb.CommandResult, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leader != nil || p.noLeader {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "not the leader")
	}
	// The log holds its own copy, as the real one does.
	cmd = proto.CloneOf(cmd)
	cmd.Time = timestamppb.Now()
	p.proposed = append(p.proposed, cmd)
	res := p.applyLocked(proto.CloneOf(cmd))
	for _, f := range p.followers {
		f.deliver(proto.CloneOf(cmd))
	}
	if res.GetError() != nil {
		return nil, apierror.FromProto(res.GetError())
	}
	return res, nil
}

func (p *testPeer) applyLocked(cmd *pb.Command) *pb.CommandResult {
	p.index++
	return p.state.Apply(p.index, cmd)
}

func (p *testPeer) deliver(cmd *pb.Command) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heldBack {
		p.backlog = append(p.backlog, cmd)
		return
	}
	p.applyLocked(cmd)
}

// holdBack keeps the peer from applying anything until catchUp.
func (p *testPeer) holdBack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heldBack = true
}

func (p *testPeer) catchUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heldBack = false
	for _, cmd := range p.backlog {
		p.applyLocked(cmd)
	}
	p.backlog = nil
}

func (p *testPeer) loseLeader() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noLeader = true
}

// View implements Viewer.
func (p *testPeer) View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error) {
	p.mu.Lock()
	leads := p.leader == nil && !p.noLeader
	if !read.GetStale() {
		p.linearized++
	}
	p.mu.Unlock()
	if !read.GetStale() && !leads {
		return fsm.View{}, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "not the leader")
	}
	for {
		view := p.state.View()
		if view.Index() >= read.GetMinIndex() {
			return view, nil
		}
		select {
		case <-ctx.Done():
			return fsm.View{}, ctx.Err()
		case <-p.Changed(view.Index()):
		}
	}
}

func (p *testPeer) linearizedReads() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.linearized
}

// Changed implements Viewer.
func (p *testPeer) Changed(after uint64) <-chan struct{} { return p.state.Changed(after) }

func (p *testPeer) leaderConn(context.Context) (grpc.ClientConnInterface, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.noLeader:
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "no leader")
	case p.leader == nil:
		return nil, nil //nolint:nilnil // that is the contract
	default:
		return p.leader.conn, nil
	}
}

func (p *testPeer) agentConn(address string) (grpc.ClientConnInterface, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if conn, ok := p.agents[address]; ok {
		return conn, nil
	}
	return nil, fmt.Errorf("no such address %s", address)
}

// apply commits a command that is not asked for by a client.
func (p *testPeer) apply(cmd *pb.Command) *pb.CommandResult {
	p.t.Helper()
	res, err := p.Propose(context.Background(), cmd)
	if err != nil {
		p.t.Fatalf("apply %T: %v", cmd.GetPayload(), err)
	}
	return res
}

// addNode registers a node whose agent is served by agent.
func (p *testPeer) addNode(id string, agent *fakeAgent) {
	p.t.Helper()
	agent.node = id
	conn := serve(p.t, func(to grpc.ServiceRegistrar) { pb.RegisterNodeAgentServiceServer(to, agent) })
	p.connect(id, conn)
	p.register(id)
}

// connect makes the agent of a node reachable from this peer.
func (p *testPeer) connect(id string, conn grpc.ClientConnInterface) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.agents[id+":7400"] = conn
}

func (p *testPeer) register(id string) {
	p.t.Helper()
	p.apply(&pb.Command{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{Info: &pb.NodeInfo{
		Id: id, AgentAddress: id + ":7400", Capacity: &pb.NodeCapacity{Instances: 100, MemoryBytes: 1 << 30},
	}}}})
}

// addModule registers a module and returns its digest.
func (p *testPeer) addModule(wasm []byte) string {
	p.t.Helper()
	m, err := guestabi.Inspect(bytes.NewReader(wasm))
	if err != nil {
		p.t.Fatal(err)
	}
	m.Digest, m.SizeBytes, m.Name = modulestest.Digest(wasm), uint64(len(wasm)), "guest.wasm"
	p.apply(&pb.Command{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: m}}})
	return m.GetDigest()
}

// addProvider registers a provider.
func (p *testPeer) addProvider(id, kind string) {
	p.t.Helper()
	p.apply(&pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{
		Spec: &pb.ProviderSpec{Id: id, Type: kind},
	}}})
}

// start starts a workload of a plain reactor and returns the ids of its instances.
func (p *testPeer) start(name string, replicas uint32) []string {
	p.t.Helper()
	resp, err := p.client.StartInstance(asAlice(p.t.Context()), &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: name, Module: p.addModule(modulestest.Reactor()), Replicas: replicas,
	}})
	if err != nil {
		p.t.Fatal(err)
	}
	return ids(resp.GetInstances())
}

// place puts an instance on a node in its next generation.
func (p *testPeer) place(id, node string) {
	p.t.Helper()
	view := p.state.View()
	inst, _ := view.Instance(id)
	n, _ := view.Node(node)
	p.apply(&pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		InstanceId: id, SeenGeneration: inst.GetPlacement().GetGeneration(), NodeId: node, NodeEpoch: n.GetEpoch(),
	}}}}})
}

// report says what an agent observes of an instance of its node.
func (p *testPeer) report(id string, state pb.InstanceState) {
	p.t.Helper()
	view := p.state.View()
	inst, _ := view.Instance(id)
	n, _ := view.Node(inst.GetPlacement().GetNodeId())
	p.apply(&pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: &pb.ReportStatusRequest{
		NodeId: n.GetId(), Epoch: n.GetEpoch(),
		Instances: []*pb.InstanceReport{{InstanceId: id, Status: &pb.InstanceStatus{
			State: state, Generation: inst.GetPlacement().GetGeneration(), Attempt: 1,
		}}},
	}}})
}

// leave says that an instance has left its node, which drains.
func (p *testPeer) leave(id string) {
	p.t.Helper()
	view := p.state.View()
	inst, _ := view.Instance(id)
	n, _ := view.Node(inst.GetPlacement().GetNodeId())
	p.apply(&pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: &pb.ReportStatusRequest{
		NodeId: n.GetId(), Epoch: n.GetEpoch(),
		Instances: []*pb.InstanceReport{{InstanceId: id, Left: true, Status: &pb.InstanceStatus{
			State: pb.InstanceState_INSTANCE_STATE_STOPPED, Generation: inst.GetPlacement().GetGeneration(), Attempt: 1,
		}}},
	}}})
}

// run places an instance and reports that it runs.
func (p *testPeer) run(id, node string) {
	p.t.Helper()
	p.place(id, node)
	p.report(id, pb.InstanceState_INSTANCE_STATE_RUNNING)
}

// runProvider places a provider and reports its state.
func (p *testPeer) runProvider(id, node string, state pb.ProviderState) {
	p.t.Helper()
	p.runReplica(id, 0, node, state)
}

func (p *testPeer) runReplica(id string, replica uint32, node string, state pb.ProviderState) {
	p.t.Helper()
	view := p.state.View()
	n, _ := view.Node(node)
	rec := view.ProviderReplicas(id)[replica]
	p.apply(&pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		ProviderId: id, Replica: replica, SeenGeneration: rec.GetPlacement().GetGeneration(), NodeId: node, NodeEpoch: n.GetEpoch(),
	}}}}})
	rec = p.state.View().ProviderReplicas(id)[replica]
	p.apply(&pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: &pb.ReportStatusRequest{
		NodeId: node, Epoch: n.GetEpoch(),
		Providers: []*pb.ProviderReport{{ProviderId: id, Replica: replica, Status: &pb.ProviderStatus{
			State: state, Generation: rec.GetPlacement().GetGeneration(),
		}}},
	}}})
}

func (p *testPeer) instance(id string) *pb.Instance {
	inst, _ := p.state.View().Instance(id)
	return inst
}

// serve runs a gRPC server in memory whose interceptors stand for those of
// package rpc: they put the caller and the correlation id into the context.
func serve(t *testing.T, register func(grpc.ServiceRegistrar)) *grpc.ClientConn {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(incoming(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, &contextStream{ServerStream: stream, ctx: incoming(stream.Context())})
		}),
	)
	register(s)
	go func() { _ = s.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:test",
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return listener.Dial() }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		s.Stop()
	})
	return conn
}

type contextStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a gRPC stream hands out its context by a method
}

func (s *contextStream) Context() context.Context { return s.ctx }

func incoming(ctx context.Context) context.Context {
	for _, key := range []string{callerKey, identity.ForwardedCallerKey} {
		for _, uri := range metadata.ValueFromIncomingContext(ctx, key) {
			if s, err := identity.ParseSubject(uri); err == nil {
				ctx = identity.WithCaller(ctx, s)
			}
		}
	}
	for _, id := range metadata.ValueFromIncomingContext(ctx, correlation.Header) {
		ctx = correlation.With(ctx, id)
	}
	return ctx
}

// as makes a call that of s.
func as(ctx context.Context, s identity.Subject) context.Context {
	return metadata.AppendToOutgoingContext(ctx, callerKey, s.String())
}

func asAlice(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(as(ctx, alice), correlation.Header, "corr-1")
}

// lockedBuffer is a buffer that a logger and a test may use at once.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) lines() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Split(strings.TrimSpace(b.buf.String()), "\n")
}

func ids(instances []*pb.Instance) []string {
	out := make([]string, len(instances))
	for i, inst := range instances {
		out[i] = inst.GetId()
	}
	return out
}

// wantCode ends the test unless err has the code.
func wantCode(t *testing.T, err error, code pb.ErrorCode) {
	t.Helper()
	if apierror.CodeOf(err) != code {
		t.Fatalf("error is %v (%v), want %v", err, apierror.CodeOf(err), code)
	}
}

// eventually waits until is holds.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited 10s in vain for: %s", what)
		}
	}
}
