package fsm_test

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// dice returns a number from 0 to n-1; n is at least 1.
type dice func(n int) int

func (d dice) chance(percent int) bool { return d(100) < percent }

func pick[T any](d dice, from ...T) T { return from[d(len(from))] }

// generator makes commands that a cluster might write: mostly sensible ones,
// made from what a view shows, and a share that is late, wrong or repeated.
type generator struct {
	roll dice
	seq  int
	past []*pb.Command
	// The sessions, and the numbers of their last requests.
	sessions  []string
	sequences map[string]uint64
}

// next returns the next command for a state that looks like v.
func (g *generator) next(v fsm.View) *pb.Command {
	g.seq++
	if len(g.past) > 0 && g.roll.chance(5) {
		again := proto.CloneOf(pick(g.roll, g.past...))
		if g.roll.chance(20) {
			again.RequestDigest = []byte("another")
		}
		return again
	}
	cmd := command(g.payload(v))
	cmd.CorrelationId = fmt.Sprintf("c%d", g.roll(5))
	cmd.Time = timestamppb.New(epochStart().Add(time.Duration(g.seq)*time.Minute - time.Duration(g.roll(120))*time.Second))
	if g.roll.chance(3) {
		cmd.Time = nil
	}
	if g.roll.chance(50) {
		cmd.RequestId = fmt.Sprintf("r%d", g.seq)
		cmd.RequestDigest = []byte{byte(g.seq)}
		g.past = append(g.past, cmd)
	}
	if cmd.GetRequestId() != "" && g.roll.chance(60) {
		cmd.Session = g.session()
	}
	if g.roll.chance(10) {
		cmd.Preconditions = append(cmd.Preconditions, g.precondition(v))
	}
	return cmd
}

// session places a command in a session, mostly under the next number of it.
func (g *generator) session() *pb.CommandSession {
	if len(g.sessions) == 0 || g.roll.chance(3) {
		return &pb.CommandSession{Id: "nobody's", Sequence: 1}
	}
	id := g.sessions[max(0, len(g.sessions)-1-g.roll(3))]
	if g.sequences == nil {
		g.sequences = map[string]uint64{}
	}
	if !g.roll.chance(10) {
		g.sequences[id]++
	}
	seq := g.sequences[id] + uint64(g.roll(2))*uint64(g.roll(2))
	return &pb.CommandSession{Id: id, Sequence: seq, FirstOutstanding: seq - min(seq, uint64(g.roll(3)))}
}

func (g *generator) precondition(v fsm.View) *pb.Precondition {
	in, _ := v.Instance(g.instanceID(v))
	p, _ := v.Provider(g.providerID())
	n, _ := v.Node(g.nodeID())
	a, _ := v.Assignment(in.GetId(), p.GetId())
	out := pick(
		g.roll,
		&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: in.GetId()}, ModifiedIndex: in.GetModifiedIndex()},
		&pb.Precondition{Record: &pb.Precondition_Workload{Workload: in.GetName()}},
		&pb.Precondition{Record: &pb.Precondition_ProviderId{ProviderId: p.GetId()}, ModifiedIndex: p.GetModifiedIndex()},
		&pb.Precondition{Record: &pb.Precondition_NodeId{NodeId: n.GetId()}, ModifiedIndex: n.GetModifiedIndex()},
		&pb.Precondition{Record: &pb.Precondition_Assignment{Assignment: &pb.AssignmentKey{
			InstanceId: in.GetId(), ProviderId: p.GetId(),
		}}, ModifiedIndex: a.GetModifiedIndex()},
	)
	out.ModifiedIndex = g.near(out.GetModifiedIndex())
	return out
}

func (g *generator) openSession(fsm.View) proto.Message {
	id := fmt.Sprintf("s%d", g.seq)
	if len(g.sessions) > 0 && g.roll.chance(10) {
		id = pick(g.roll, g.sessions...)
	}
	g.sessions = append(g.sessions, id)
	return &pb.OpenSessionCommand{SessionId: id, IdleTimeout: durationpb.New(time.Duration(9+g.roll(30)) * time.Minute)}
}

func (g *generator) initCluster(fsm.View) proto.Message {
	return &pb.InitClusterCommand{ClusterId: fmt.Sprintf("c%d", g.roll(3))}
}

func (g *generator) payload(v fsm.View) proto.Message {
	makers := []func(fsm.View) proto.Message{
		g.registerNode, g.expireNode, g.drainNode, g.peer, g.module,
		g.createInstances, g.createInstances, g.changeInstances, g.changeInstances,
		g.place, g.place, g.place, g.place, g.report, g.report, g.report, g.report, g.report,
		g.capability, g.capability, g.provider, g.provider, g.provider, g.subscribe, g.subscribe,
		g.openSession, g.initCluster,
	}
	return pick(g.roll, makers...)(v)
}

func (g *generator) nodeID() string { return fmt.Sprintf("n%d", g.roll(4)) }

func (g *generator) providerID() string { return pick(g.roll, "kv0", "kv1", "kv2", busID, busID) }

// busID is the messaging provider, the only one that may have replicas.
const busID = "bus"

func (g *generator) providerSpec() *pb.ProviderSpec {
	id := g.providerID()
	if id == busID {
		return bus(busID, uint32(g.roll(4)))
	}
	return kv(id)
}

func (g *generator) instanceID(v fsm.View) string {
	if ins := v.Instances(nil); len(ins) > 0 && !g.roll.chance(3) {
		return pick(g.roll, ins...).GetId()
	}
	return "nobody"
}

func (g *generator) instanceIDs(v fsm.View) []string {
	var out []string
	for range g.roll(3) + 1 {
		out = append(out, g.instanceID(v))
	}
	return out
}

// near returns n, or sometimes a neighbour.
func (g *generator) near(n uint64) uint64 {
	if g.roll.chance(10) {
		return n + uint64(g.roll(2))*2 - 1
	}
	return n
}

func (g *generator) registerNode(v fsm.View) proto.Message {
	c := &pb.RegisterNodeCommand{Info: nodeInfo(g.nodeID())}
	if g.roll.chance(40) {
		spec := g.providerSpec()
		if !g.roll.chance(10) {
			spec.Replicas = 0
		}
		c.Providers = append(c.Providers, spec)
	}
	if n, ok := v.Node(c.GetInfo().GetId()); ok && g.roll.chance(60) {
		c.Epoch = g.near(n.GetEpoch())
	}
	return c
}

func (g *generator) expireNode(v fsm.View) proto.Message {
	id := g.nodeID()
	n, _ := v.Node(id)
	return &pb.ExpireNodeCommand{NodeId: id, Epoch: g.near(n.GetEpoch())}
}

func (g *generator) drainNode(fsm.View) proto.Message {
	return &pb.DrainNodeCommand{NodeId: g.nodeID(), Draining: g.roll.chance(50)}
}

func (g *generator) peer(fsm.View) proto.Message {
	id := fmt.Sprintf("p%d", g.roll(3))
	if g.roll.chance(30) {
		return &pb.RemovePeerCommand{PeerId: id}
	}
	return &pb.PutPeerCommand{Peer: &pb.Peer{Id: id, RaftAddress: fmt.Sprintf("10.0.0.%d:7402", g.roll(3))}}
}

func (g *generator) module(fsm.View) proto.Message {
	return &pb.PutModuleCommand{Module: &pb.Module{Digest: digest, Name: fmt.Sprintf("m%d", g.roll(3))}}
}

func (g *generator) grant() *pb.CapabilityGrant {
	out := &pb.CapabilityGrant{Provider: g.providerID(), Bucket: pick(g.roll, "", "", "shared")}
	for range g.roll(3) {
		out.Permissions = append(out.Permissions, g.permission())
	}
	return out
}

func (g *generator) permission() string {
	return pick(g.roll, "kv:read", "kv:write", "kv:delete", "kv:read:a/")
}

func (g *generator) createInstances(fsm.View) proto.Message {
	spec := workload(fmt.Sprintf("w%d", g.roll(6)), pick(g.roll, "", "never", "always", "on-failure"))
	spec.Replicas = uint32(g.roll(3))
	for range g.roll(3) {
		spec.Capabilities = append(spec.Capabilities, g.grant())
	}
	c := &pb.CreateInstancesCommand{Spec: spec}
	for range g.roll(6) / 4 {
		subject := g.subject()
		spec.Capabilities = append(spec.Capabilities, grant(busID, "msg:subscribe"))
		spec.Triggers = append(spec.Triggers, &pb.Trigger{Trigger: &pb.Trigger_Subscribe{Subscribe: subject}})
		c.Triggers = append(c.Triggers, &pb.TriggerTarget{Subject: subject, ProviderId: pick(g.roll, busID, busID, "kv0")})
	}
	for i := range max(1, spec.GetReplicas()) {
		c.InstanceIds = append(c.InstanceIds, fmt.Sprintf("%s-%d-%d", spec.GetName(), g.seq, i))
	}
	return c
}

func (g *generator) changeInstances(v fsm.View) proto.Message {
	targets := g.instanceIDs(v)
	switch g.roll(4) {
	case 0:
		return &pb.StopInstancesCommand{InstanceIds: targets}
	case 1:
		return &pb.RestartInstancesCommand{InstanceIds: targets}
	default:
		return &pb.RemoveInstancesCommand{InstanceIds: targets[:1], Force: g.roll.chance(20)}
	}
}

func (g *generator) place(v fsm.View) proto.Message {
	c := &pb.PlaceCommand{}
	for _, in := range v.UnplacedInstances(nil) {
		d := &pb.PlaceDecision{InstanceId: in.GetId(), SeenGeneration: g.near(in.GetPlacement().GetGeneration())}
		g.choose(v, d)
		c.Decisions = append(c.Decisions, d)
	}
	for _, p := range v.UnplacedProviders(nil) {
		d := &pb.PlaceDecision{ProviderId: p.GetId(), Replica: p.GetReplica(), SeenGeneration: g.near(p.GetPlacement().GetGeneration())}
		g.choose(v, d)
		c.Decisions = append(c.Decisions, d)
	}
	if g.roll.chance(20) {
		d := &pb.PlaceDecision{InstanceId: g.instanceID(v), SeenGeneration: uint64(g.roll(3))}
		g.choose(v, d)
		c.Decisions = append(c.Decisions, d)
	}
	return c
}

func (g *generator) choose(v fsm.View, d *pb.PlaceDecision) {
	if g.roll.chance(20) {
		d.Message = fmt.Sprintf("no room %d", g.roll(3))
		return
	}
	d.NodeId = g.nodeID()
	n, _ := v.Node(d.GetNodeId())
	d.NodeEpoch = g.near(n.GetEpoch())
}

func (g *generator) report(v fsm.View) proto.Message {
	id := g.nodeID()
	n, _ := v.Node(id)
	c := &pb.ReportStatusRequest{NodeId: id, Epoch: g.near(n.GetEpoch())}
	for _, in := range v.InstancesByNode(nil, id) {
		c.Instances = append(c.Instances, g.instanceReport(in))
	}
	if g.roll.chance(10) {
		in, _ := v.Instance(g.instanceID(v))
		c.Instances = append(c.Instances, g.instanceReport(in))
	}
	for _, p := range v.ProvidersByNode(nil, id) {
		c.Providers = append(c.Providers, &pb.ProviderReport{ProviderId: p.GetId(), Replica: uint32(g.near(uint64(p.GetReplica()))), Status: &pb.ProviderStatus{
			CallsInFlight: uint32(g.roll(2)), SpecVersion: g.near(p.GetSpecVersion()),
			State: pick(g.roll, pb.ProviderState_PROVIDER_STATE_STARTING, pb.ProviderState_PROVIDER_STATE_RUNNING,
				pb.ProviderState_PROVIDER_STATE_DRAINING, pb.ProviderState_PROVIDER_STATE_STOPPED,
				pb.ProviderState_PROVIDER_STATE_FAILED, pb.ProviderState_PROVIDER_STATE_LOST),
			Generation: g.near(p.GetPlacement().GetGeneration()),
		}})
	}
	for range g.roll(4) {
		c.Denials = append(c.Denials, &pb.DenialReport{
			InstanceId: g.instanceID(v), ProviderId: g.providerID(), Need: g.permission(), Count: uint64(g.roll(3)),
		})
	}
	return c
}

func (g *generator) subject() string { return pick(g.roll, "orders", "orders.*", "a.>", "no subject") }

// subscribe asks for a subscription as a node of the messaging provider would,
// mostly for an instance that was granted it.
func (g *generator) subscribe(v fsm.View) proto.Message {
	c := &pb.RecordSubscriptionRequest{
		NodeId: g.nodeID(), ProviderId: busID, InstanceId: g.instanceID(v),
		Subject: g.subject(), Subscribed: g.roll.chance(70),
	}
	if hosts := v.ProviderReplicas(busID); len(hosts) > 0 && !g.roll.chance(10) {
		c.NodeId = pick(g.roll, hosts...).GetPlacement().GetNodeId()
	}
	if users := v.AssignmentsByProvider(nil, busID); len(users) > 0 && !g.roll.chance(10) {
		c.InstanceId = pick(g.roll, users...).GetInstanceId()
	}
	n, _ := v.Node(c.GetNodeId())
	in, _ := v.Instance(c.GetInstanceId())
	c.Epoch, c.Generation = g.near(n.GetEpoch()), g.near(in.GetPlacement().GetGeneration())
	return c
}

func (g *generator) instanceReport(in *pb.Instance) *pb.InstanceReport {
	s := pick(g.roll, "PREPARING", "STARTING", "RUNNING", "RUNNING", "STOPPING", "COMPLETED", "STOPPED", "CRASHED", "FAILED", "LOST")
	left, restarts := g.roll.chance(50), in.GetRestartEpoch()-min(in.GetRestartEpoch(), uint64(g.roll(2)))
	return &pb.InstanceReport{InstanceId: in.GetId(), Left: left, RestartEpoch: restarts, Status: &pb.InstanceStatus{
		State: state(s), Generation: g.near(in.GetPlacement().GetGeneration()),
		Attempt:    in.GetStatus().GetAttempt() + uint32(g.roll(2)),
		CrashCount: uint32(g.roll(5)), Message: pick(g.roll, "", "trap"),
		StartedAt: &timestamppb.Timestamp{Seconds: int64(g.roll(3))},
		Usage:     &pb.ResourceUsage{Invocations: 1},
	}}
}

func (g *generator) capability(v fsm.View) proto.Message {
	if g.roll.chance(60) {
		return &pb.AssignCapabilityCommand{InstanceIds: g.instanceIDs(v), Grant: g.grant()}
	}
	c := &pb.RevokeCapabilityCommand{InstanceIds: g.instanceIDs(v), ProviderId: g.providerID()}
	for range g.roll(3) {
		c.Permissions = append(c.Permissions, g.permission())
	}
	return c
}

func (g *generator) provider(fsm.View) proto.Message {
	spec := g.providerSpec()
	if g.roll.chance(20) {
		spec.Placement = &pb.PlacementRules{Node: g.nodeID()}
	}
	switch g.roll(6) {
	case 0, 1:
		return &pb.RegisterProviderCommand{Spec: spec}
	case 2, 3:
		return &pb.SetProviderRunningCommand{
			ProviderId: spec.GetId(), Running: g.roll.chance(50), Grace: durationpb.New(time.Duration(g.roll(3)) * time.Second),
		}
	case 4:
		return &pb.UpdateProviderCommand{Spec: spec}
	default:
		return &pb.DeregisterProviderCommand{ProviderId: spec.GetId()}
	}
}
