package fsm

import (
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func checkProviderSpec(spec *pb.ProviderSpec) *refusal {
	if r := checkID("the provider's id", spec.GetId()); r != nil {
		return r
	}
	if spec.GetType() == "" {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the provider's type is empty").
			with("provider", spec.GetId())
	}
	return checkReplicas(spec)
}

// registerProvider creates a provider that the scheduler is to place, with one
// record a replica.
func (t *tx) registerProvider(c *pb.RegisterProviderCommand) ([]string, *refusal) {
	spec := c.GetSpec()
	if r := checkProviderSpec(spec); r != nil {
		return nil, r
	}
	if old, taken := t.provider(spec.GetId()); taken {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the provider id %q is taken", spec.GetId()).
			with("provider", spec.GetId()).
			with("type", old.GetSpec().GetType()).
			next("wasmatrix provider update %s, or choose another id", spec.GetId())
	}
	for replica := range Replicas(spec) {
		t.putProvider(t.newProvider(spec, replica))
	}
	first, _ := t.provider(spec.GetId())
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED, first, spec.GetType())
	return []string{spec.GetId()}, nil
}

// checkDeclared checks a provider that a node's configuration names: it is to run
// on that node, so it has one replica.
func checkDeclared(nodeID string, spec *pb.ProviderSpec) *refusal {
	if r := checkProviderSpec(spec); r != nil {
		return r
	}
	if n := Replicas(spec); n > 1 {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"node %q declares provider %q with %d replicas, and a provider that a node declares runs there alone", nodeID, spec.GetId(), n).
			with("provider", spec.GetId()).
			with("node", nodeID).
			next("leave the number of replicas out, or register it for the cluster: wasmatrix provider register")
	}
	return nil
}

// declareProvider registers a provider that a node's configuration names and
// places it there. One that exists stays as it is, wherever it is.
func (t *tx) declareProvider(node *pb.Node, spec *pb.ProviderSpec) {
	if _, known := t.provider(spec.GetId()); known {
		return
	}
	pinned := shallow(spec)
	pinned.Placement = &pb.PlacementRules{
		Node:   node.GetId(),
		Labels: spec.GetPlacement().GetLabels(),
	}
	p := t.assignProvider(t.newProvider(pinned, 0), node)
	t.putProvider(p)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED, p, spec.GetType())
}

// newProvider returns a replica that is not placed. Its generations begin above
// the Raft index: people choose the ids of providers and register one again after
// they removed it, or take a replica away and add it again, and no report or agent
// may take the new one for the old.
func (t *tx) newProvider(spec *pb.ProviderSpec, replica uint32) *pb.Provider {
	return &pb.Provider{
		Placement:      &pb.Placement{Generation: t.index},
		Id:             spec.GetId(),
		Replica:        replica,
		Spec:           spec,
		DesiredRunning: true,
		Status:         &pb.ProviderStatus{State: pb.ProviderState_PROVIDER_STATE_PENDING, ChangedAt: t.now},
		CreatedAt:      t.now,
		CreatedIndex:   t.index,
		SpecVersion:    1,
	}
}

// setProviderRunning starts or stops all replicas of a provider. Each start of a
// placed one has its own generation, so that no late report of the run before is
// taken for one of the new run. While its node is lost a replica that is started
// waits as LOST for the node to return, unless it can run elsewhere.
func (t *tx) setProviderRunning(c *pb.SetProviderRunningCommand) ([]string, *refusal) {
	replicas := t.replicas(c.GetProviderId())
	if len(replicas) == 0 {
		return nil, providerNotFound(c.GetProviderId())
	}
	for _, old := range replicas {
		switch {
		case old.GetDesiredRunning() != c.GetRunning():
			t.setReplicaRunning(old, c)
		case !c.GetRunning() && draining(old) && !sameGrace(old.GetStopGrace(), c.GetGrace()):
			// Whoever asks again wants the drain to end sooner, or to be given more time.
			p := shallow(old)
			p.StopGrace = c.GetGrace()
			t.putProvider(p)
		default:
		}
	}
	return []string{c.GetProviderId()}, nil
}

func (t *tx) setReplicaRunning(old *pb.Provider, c *pb.SetProviderRunningCommand) {
	p := shallow(old)
	p.DesiredRunning = c.GetRunning()
	p.StopGrace = nil
	if !c.GetRunning() {
		p.StopGrace = c.GetGrace()
	}
	node, _ := t.node(p.GetPlacement().GetNodeId())
	switch {
	case c.GetRunning() && !ProviderPlaced(p):
		p = t.withStatus(p, pb.ProviderState_PROVIDER_STATE_PENDING, "")
	case c.GetRunning() && Ready(node):
		p = t.assignProvider(p, node)
	case c.GetRunning():
		t.lostOrMoved(p, "node "+p.GetPlacement().GetNodeId()+" is lost")
		return
	case !ProviderPlaced(p) || !Ready(node):
		t.providerStopped(p, "")
		return
	default:
	}
	t.putProvider(p)
}

// draining reports whether an agent may still be at work on a stop.
func draining(p *pb.Provider) bool {
	return !p.GetDesiredRunning() && p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED
}

func sameGrace(a, b *durationpb.Duration) bool {
	return (a == nil) == (b == nil) && a.AsDuration() == b.AsDuration()
}

// updateProvider gives a provider a new spec; its agents open the driver anew
// because spec_version grows. Another number of replicas adds the next ones or
// takes the highest ones away.
func (t *tx) updateProvider(c *pb.UpdateProviderCommand) ([]string, *refusal) {
	spec := c.GetSpec()
	if r := checkProviderSpec(spec); r != nil {
		return nil, r
	}
	old, ok := t.provider(spec.GetId())
	if !ok {
		return nil, providerNotFound(spec.GetId())
	}
	if old.GetSpec().GetType() != spec.GetType() {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"the type of provider %q cannot change", spec.GetId()).
			with("provider", spec.GetId()).
			with("type", old.GetSpec().GetType()).
			next("register another provider of type %s", spec.GetType())
	}
	version := old.GetSpecVersion() + 1
	for _, p := range t.replicas(spec.GetId()) {
		if p.GetReplica() < Replicas(spec) {
			t.updateReplica(p, spec, version)
			continue
		}
		t.deleteProvider(p)
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_STOPPED, p, "taken away")
	}
	for replica := range Replicas(spec) {
		if _, known := t.replica(spec.GetId(), replica); !known {
			t.addReplica(old, spec, replica, version)
		}
	}
	first, _ := t.provider(spec.GetId())
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_UPDATED, first, spec.GetDriver())
	return []string{spec.GetId()}, nil
}

// updateReplica gives one replica a new spec. Pinned to another node than it is
// placed on, it leaves that node and is placed again; its data stays behind.
func (t *tx) updateReplica(old *pb.Provider, spec *pb.ProviderSpec, version uint64) {
	p := shallow(old)
	p.Spec = spec
	p.SpecVersion = version
	pin := spec.GetPlacement().GetNode()
	switch {
	case pin != "" && ProviderPlaced(p) && pin != p.GetPlacement().GetNodeId():
		p = t.unplacedProvider(p, "")
	case p.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_LOST && movable(p):
		p = t.unplacedProvider(p, p.GetStatus().GetMessage())
	default:
	}
	t.putProvider(p)
}

// addReplica adds a replica beside first, in the state that was asked for.
func (t *tx) addReplica(first *pb.Provider, spec *pb.ProviderSpec, replica uint32, version uint64) {
	p := t.newProvider(spec, replica)
	p.SpecVersion = version
	if p.DesiredRunning = first.GetDesiredRunning(); !p.DesiredRunning {
		p = t.withStatus(p, pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	}
	t.putProvider(p)
}

// deregisterProvider forgets a provider that is stopped or was never placed, all
// its replicas, and that no instance which may still run is assigned to.
// Assignments of ended instances go with it: a later provider of the same id must
// not inherit them.
func (t *tx) deregisterProvider(c *pb.DeregisterProviderCommand) ([]string, *refusal) {
	replicas := t.replicas(c.GetProviderId())
	if len(replicas) == 0 {
		return nil, providerNotFound(c.GetProviderId())
	}
	for _, p := range replicas {
		if ProviderPlaced(p) && p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED {
			return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "provider %q is not stopped", p.GetId()).
				with("provider", ReplicaName(p.GetId(), p.GetReplica())).
				with("state", p.GetStatus().GetState().String()).
				with("node", p.GetPlacement().GetNodeId()).
				next("wasmatrix provider stop %s", p.GetId())
		}
	}
	assignments := list[*pb.CapabilityAssignment](t.txn, nil, tableAssignments, indexProvider, c.GetProviderId())
	var users []string
	for _, a := range assignments {
		if in, ok := t.instance(a.GetInstanceId()); ok && !Ended(in) {
			users = append(users, in.GetId())
		}
	}
	if len(users) > 0 {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"provider %q is assigned to %d instances that have not ended", c.GetProviderId(), len(users)).
			with("provider", c.GetProviderId()).
			with("instances", named(users)).
			next("stop the instances, or wasmatrix revoke their permissions")
	}
	for _, a := range assignments {
		t.deleteAssignment(a)
	}
	for _, p := range replicas {
		t.deleteProvider(p)
	}
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_DEREGISTERED, replicas[0], "")
	return []string{c.GetProviderId()}, nil
}

// assignProvider returns a copy of p that is placed on node in the next generation.
func (t *tx) assignProvider(p *pb.Provider, node *pb.Node) *pb.Provider {
	generation := p.GetPlacement().GetGeneration() + 1
	out := shallow(p)
	out.Placement = &pb.Placement{NodeId: node.GetId(), NodeEpoch: node.GetEpoch(), Generation: generation}
	out.Status = &pb.ProviderStatus{
		State:      pb.ProviderState_PROVIDER_STATE_ASSIGNED,
		Generation: generation,
		ChangedAt:  t.now,
	}
	return out
}

// withStatus returns a copy of p in a state. Its time changes with the state only.
func (t *tx) withStatus(p *pb.Provider, state pb.ProviderState, message string) *pb.Provider {
	out := shallow(p)
	out.Status = shallow(p.GetStatus())
	if out.Status.State != state {
		out.Status.ChangedAt = t.now
	}
	out.Status.State = state
	out.Status.Message = message
	return out
}

// providerStopped records that a provider which was asked to stop serves no more.
func (t *tx) providerStopped(p *pb.Provider, message string) {
	out := t.withStatus(p, pb.ProviderState_PROVIDER_STATE_STOPPED, message)
	t.putProvider(out)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_STOPPED, out, message)
}

// providerLost records that a provider's node is gone.
func (t *tx) providerLost(p *pb.Provider, message string) {
	switch {
	case p.GetDesiredRunning():
		gone := t.lostOrMoved(p, message)
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_LOST, gone, message)
	case p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED:
		t.providerStopped(p, message)
	default:
	}
}

// lostOrMoved writes a replica whose node is gone and returns it as it was lost.
// One that keeps state there, or is pinned to it, stays with the node and returns
// with it; any other waits for another node.
func (t *tx) lostOrMoved(p *pb.Provider, message string) *pb.Provider {
	lost := t.withStatus(p, pb.ProviderState_PROVIDER_STATE_LOST, message)
	if movable(p) {
		t.putProvider(t.unplacedProvider(p, message))
	} else {
		t.putProvider(lost)
	}
	return lost
}

// unplacedProvider returns a copy of p that has no node. It keeps its generation,
// so that the next placement is one higher.
func (t *tx) unplacedProvider(p *pb.Provider, message string) *pb.Provider {
	state := pb.ProviderState_PROVIDER_STATE_PENDING
	if !p.GetDesiredRunning() {
		state = pb.ProviderState_PROVIDER_STATE_STOPPED
	}
	out := t.withStatus(p, state, message)
	out.Placement = &pb.Placement{Generation: p.GetPlacement().GetGeneration()}
	return out
}
