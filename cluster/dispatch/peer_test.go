package dispatch

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// registry is the replicated state without replication; several peers share it.
type registry struct {
	state *fsm.State

	mu    sync.Mutex
	index uint64
}

func newRegistry(t testing.TB) *registry {
	r := &registry{state: fsm.New()}
	r.do(t, &pb.Command{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: &pb.Module{Digest: digest}}}})
	r.do(t, &pb.Command{Payload: &pb.Command_PutPeer{PutPeer: &pb.PutPeerCommand{
		Peer: &pb.Peer{Id: "p1", RaftAddress: "p1:7402", ApiAddress: "p1:7400"},
	}}})
	return r
}

func (r *registry) apply(cmd *pb.Command) (*pb.CommandResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index++
	result := r.state.Apply(r.index, cmd)
	if result.GetError() != nil {
		return nil, apierror.FromProto(result.GetError())
	}
	return result, nil
}

func (r *registry) do(t testing.TB, cmd *pb.Command) *pb.CommandResult {
	t.Helper()
	result, err := r.apply(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func (r *registry) node(id string) *pb.Node {
	n, _ := r.state.View().Node(id)
	return n
}

func nodeInfo(id string) *pb.NodeInfo {
	return &pb.NodeInfo{
		Id: id, AgentAddress: id + ":7400", Runtimes: []string{"wasm"},
		Capacity: &pb.NodeCapacity{Instances: 1000, MemoryBytes: 1 << 40},
	}
}

func (r *registry) addNode(t testing.TB, id string) uint64 {
	t.Helper()
	return r.do(t, &pb.Command{Payload: &pb.Command_RegisterNode{
		RegisterNode: &pb.RegisterNodeCommand{Info: nodeInfo(id)},
	}}).GetEpoch()
}

func (r *registry) create(t testing.TB, spec *pb.WorkloadSpec, ids ...string) {
	t.Helper()
	spec.Module, spec.Replicas = digest, uint32(len(ids))
	r.do(t, &pb.Command{Payload: &pb.Command_CreateInstances{
		CreateInstances: &pb.CreateInstancesCommand{Spec: spec, InstanceIds: ids},
	}})
}

func (r *registry) place(t testing.TB, instanceID, nodeID string) {
	t.Helper()
	in, _ := r.state.View().Instance(instanceID)
	r.do(t, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		InstanceId: instanceID, SeenGeneration: in.GetPlacement().GetGeneration(), NodeId: nodeID, NodeEpoch: r.node(nodeID).GetEpoch(),
	}}}}})
}

func (r *registry) addProvider(t testing.TB, id, nodeID string, config map[string]string) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{
		Spec: &pb.ProviderSpec{Id: id, Type: "kv", Config: config},
	}}})
	p, _ := r.state.View().Provider(id)
	r.do(t, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		ProviderId: id, SeenGeneration: p.GetPlacement().GetGeneration(), NodeId: nodeID, NodeEpoch: r.node(nodeID).GetEpoch(),
	}}}}})
}

// addBus registers a messaging provider with one replica on each node.
func (r *registry) addBus(t testing.TB, id string, nodes ...string) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{
		Spec: &pb.ProviderSpec{Id: id, Type: "messaging", Driver: "nats", Replicas: uint32(len(nodes))},
	}}})
	for i, nodeID := range nodes {
		r.placeReplica(t, id, uint32(i), nodeID)
	}
}

func (r *registry) placeReplica(t testing.TB, id string, replica uint32, nodeID string) {
	t.Helper()
	p := r.state.View().ProviderReplicas(id)[replica]
	r.do(t, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		ProviderId: id, Replica: replica, SeenGeneration: p.GetPlacement().GetGeneration(),
		NodeId: nodeID, NodeEpoch: r.node(nodeID).GetEpoch(),
	}}}}})
}

// subscription is what a node asks for an instance in its present generation.
func (r *registry) subscription(nodeID, instanceID, providerID, subject string, subscribed bool) *pb.RecordSubscriptionRequest {
	in, _ := r.state.View().Instance(instanceID)
	return &pb.RecordSubscriptionRequest{
		NodeId: nodeID, Epoch: r.node(nodeID).GetEpoch(), InstanceId: instanceID, ProviderId: providerID,
		Generation: in.GetPlacement().GetGeneration(), Subject: subject, Subscribed: subscribed,
	}
}

func (r *registry) grant(t testing.TB, instanceID, providerID string) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_AssignCapability{AssignCapability: &pb.AssignCapabilityCommand{
		InstanceIds: []string{instanceID}, Grant: &pb.CapabilityGrant{Provider: providerID, Permissions: []string{"kv:read"}},
	}}})
}

func (r *registry) stop(t testing.TB, ids ...string) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_StopInstances{StopInstances: &pb.StopInstancesCommand{InstanceIds: ids}}})
}

func (r *registry) instanceReport(nodeID, id string, state pb.InstanceState) *pb.ReportStatusRequest {
	in, _ := r.state.View().Instance(id)
	return &pb.ReportStatusRequest{
		NodeId: nodeID, Epoch: r.node(nodeID).GetEpoch(),
		Instances: []*pb.InstanceReport{{InstanceId: id, Status: &pb.InstanceStatus{
			State: state, Generation: in.GetPlacement().GetGeneration(), Attempt: 1, Message: "observed",
		}}},
	}
}

func (r *registry) providerReport(nodeID, id string, state pb.ProviderState) *pb.ReportStatusRequest {
	p, _ := r.state.View().Provider(id)
	return &pb.ReportStatusRequest{
		NodeId: nodeID, Epoch: r.node(nodeID).GetEpoch(),
		Providers: []*pb.ProviderReport{{ProviderId: id, Status: &pb.ProviderStatus{
			State: state, Generation: p.GetPlacement().GetGeneration(),
		}}},
	}
}

func (r *registry) report(t testing.TB, req *pb.ReportStatusRequest) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: req}})
}

// fakePeer is a peer that says of itself whether it leads.
type fakePeer struct {
	*registry
	id string

	mu       sync.Mutex
	leader   string
	proofs   int
	proof    time.Duration // how long a linearizable read takes
	failures []error       // of the next proposals
}

func (p *fakePeer) View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error) {
	if read.GetStale() {
		return p.state.View(), nil
	}
	p.mu.Lock()
	p.proofs++
	wait := p.proof
	p.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return fsm.View{}, ctx.Err()
	}
	if id, _ := p.Leader(); id != p.id {
		return fsm.View{}, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "%s leads", id)
	}
	return p.state.View(), nil
}

func (p *fakePeer) Propose(_ context.Context, cmd *pb.Command) (*pb.CommandResult, error) {
	if id, _ := p.Leader(); id != p.id {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "%s leads", id)
	}
	p.mu.Lock()
	if len(p.failures) > 0 {
		err := p.failures[0]
		p.failures = p.failures[1:]
		p.mu.Unlock()
		return nil, err
	}
	p.mu.Unlock()
	return p.apply(cmd)
}

func (p *fakePeer) Leader() (id, apiAddress string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leader == "" {
		return "", ""
	}
	return p.leader, p.leader + ":7400"
}

func (p *fakePeer) setLeader(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leader = id
}

func (p *fakePeer) proofCount() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proofs
}

// lead is a dispatcher at work; stop ends its term.
type lead struct {
	*Dispatcher
	peer    *fakePeer
	metrics *prometheus.Registry
	ended   chan error
	stop    context.CancelFunc
}

// newLead starts a dispatcher that leads. In a bubble it is settled on return.
func newLead(t *testing.T, r *registry, id string, change ...func(*Config)) *lead {
	t.Helper()
	l := &lead{
		peer:    &fakePeer{registry: r, id: id, leader: id},
		metrics: prometheus.NewPedanticRegistry(), ended: make(chan error, 1),
	}
	cfg := Config{Peer: l.peer, Registerer: l.metrics}
	for _, c := range change {
		c(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Dispatcher = d
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	go func() { l.ended <- d.Run(ctx) }()
	return l
}

func (l *lead) settle(t *testing.T) *lead {
	t.Helper()
	synctest.Wait()
	t.Cleanup(func() {
		l.stop()
		synctest.Wait()
	})
	return l
}

func (l *lead) metric(t testing.TB, name string) float64 {
	t.Helper()
	families, err := l.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// as returns a context with the caller that a node's certificate stands for.
func as(ctx context.Context, nodeID string) context.Context {
	return identity.WithCaller(ctx, identity.Subject{Cluster: "c", Kind: identity.Node, Name: nodeID, Role: identity.RoleWorker})
}

func (l *lead) register(t testing.TB, nodeID string, epoch uint64) *pb.RegisterNodeResponse {
	t.Helper()
	resp, err := l.RegisterNode(as(t.Context(), nodeID), &pb.RegisterNodeRequest{Info: nodeInfo(nodeID), Epoch: epoch})
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func (l *lead) renew(t testing.TB, nodeID string, epoch uint64) (*pb.HeartbeatResponse, error) {
	t.Helper()
	return l.Heartbeat(as(t.Context(), nodeID), &pb.HeartbeatRequest{NodeId: nodeID, Epoch: epoch})
}

// agentStream is the agent's end of WatchAssignments. Send blocks until the
// agent takes the message.
type agentStream struct {
	grpc.ServerStream
	context  func() context.Context
	messages chan *pb.WatchAssignmentsResponse
	ended    chan error
	// known is what the agent has put together.
	known agentSet
	seq   uint64
}

func (s *agentStream) Context() context.Context { return s.context() }

func (s *agentStream) Send(m *pb.WatchAssignmentsResponse) error {
	select {
	case s.messages <- m:
		return nil
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

// watch opens a stream and takes nothing from it yet.
func (l *lead) watch(t *testing.T, nodeID string, epoch uint64) *agentStream {
	t.Helper()
	ctx, cancel := context.WithCancel(as(context.Background(), nodeID))
	s := &agentStream{context: func() context.Context { return ctx }, messages: make(chan *pb.WatchAssignmentsResponse), ended: make(chan error, 1), known: agentSet{}}
	go func() {
		s.ended <- l.WatchAssignments(&pb.WatchAssignmentsRequest{NodeId: nodeID, Epoch: epoch}, s)
		close(s.messages)
	}()
	t.Cleanup(func() {
		cancel()
		for range s.messages {
			continue
		}
	})
	return s
}

// streamOf is a stream on which nothing can be sent.
func streamOf(ctx context.Context) *agentStream {
	return &agentStream{context: func() context.Context { return ctx }}
}

// take returns the message that is on its way, nil when there is none once
// everything is at rest.
func (s *agentStream) take(t *testing.T) *pb.WatchAssignmentsResponse {
	t.Helper()
	synctest.Wait()
	select {
	case m := <-s.messages:
		if m != nil {
			if err := s.known.apply(m, &s.seq); err != nil {
				t.Fatal(err)
			}
		}
		return m
	default:
		return nil
	}
}

// agentSet is what an agent knows: the changes that put each thing, by its key.
type agentSet map[string]*pb.AssignmentChange

func (k agentSet) apply(m *pb.WatchAssignmentsResponse, seq *uint64) error {
	if m.GetComplete() && m.GetAppliesTo() == 0 {
		clear(k)
	} else if m.GetAppliesTo() != *seq {
		return fmt.Errorf("message applies to %d, the agent has %d", m.GetAppliesTo(), *seq)
	}
	*seq = m.GetResultsIn()
	for _, c := range m.GetChanges() {
		name, put := describe(c)
		if !put {
			if k[name] == nil {
				return fmt.Errorf("%s is removed and not known", name)
			}
			delete(k, name)
			continue
		}
		k[name] = c
	}
	return nil
}

func describe(c *pb.AssignmentChange) (name string, put bool) {
	switch c := c.GetChange().(type) {
	case *pb.AssignmentChange_PutInstance:
		return "instance " + c.PutInstance.GetId(), true
	case *pb.AssignmentChange_RemoveInstance:
		return "instance " + c.RemoveInstance, false
	case *pb.AssignmentChange_PutProvider:
		return "provider " + fsm.ReplicaName(c.PutProvider.GetId(), c.PutProvider.GetReplica()), true
	case *pb.AssignmentChange_RemoveProvider:
		return "provider " + c.RemoveProvider, false
	case *pb.AssignmentChange_PutAssignment:
		return "assignment " + c.PutAssignment.GetInstanceId() + " " + c.PutAssignment.GetProviderId(), true
	case *pb.AssignmentChange_RemoveAssignment:
		return "assignment " + c.RemoveAssignment.GetInstanceId() + " " + c.RemoveAssignment.GetProviderId(), false
	case *pb.AssignmentChange_PutRemoteInstance:
		return "remote " + c.PutRemoteInstance.GetInstanceId(), true
	case *pb.AssignmentChange_RemoveRemoteInstance:
		return "remote " + c.RemoveRemoteInstance, false
	case *pb.AssignmentChange_PutNode:
		return "node " + c.PutNode.GetNodeId(), true
	case *pb.AssignmentChange_RemoveNode:
		return "node " + c.RemoveNode, false
	}
	return "nothing", false
}
