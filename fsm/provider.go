package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

func checkProviderSpec(spec *pb.ProviderSpec) *refusal {
	if r := checkID("the provider's id", spec.GetId()); r != nil {
		return r
	}
	if spec.GetType() == "" {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the provider's type is empty").
			with("provider", spec.GetId())
	}
	return nil
}

// registerProvider creates a provider that the scheduler is to place.
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
	p := t.newProvider(spec)
	t.putProvider(p)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED, p, spec.GetType())
	return []string{p.GetId()}, nil
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
	p := t.assignProvider(t.newProvider(pinned), node)
	t.putProvider(p)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED, p, spec.GetType())
}

// newProvider returns a provider that is not placed. Its generations begin above
// the Raft index: people choose the ids of providers and register one again after
// they removed it, and no report or agent may take the new one for the old.
func (t *tx) newProvider(spec *pb.ProviderSpec) *pb.Provider {
	return &pb.Provider{
		Placement:      &pb.Placement{Generation: t.index},
		Id:             spec.GetId(),
		Spec:           spec,
		DesiredRunning: true,
		Status:         &pb.ProviderStatus{State: pb.ProviderState_PROVIDER_STATE_PENDING, ChangedAt: t.now},
		CreatedAt:      t.now,
		CreatedIndex:   t.index,
		SpecVersion:    1,
	}
}

// setProviderRunning starts or stops a provider. Each start of a placed provider
// has its own generation, so that no late report of the run before is taken for
// one of the new run. While its node is lost a provider that is started waits
// as LOST for the node to return.
func (t *tx) setProviderRunning(c *pb.SetProviderRunningCommand) ([]string, *refusal) {
	old, ok := t.provider(c.GetProviderId())
	if !ok {
		return nil, providerNotFound(c.GetProviderId())
	}
	ids := []string{old.GetId()}
	if old.GetDesiredRunning() == c.GetRunning() {
		return ids, nil
	}
	p := shallow(old)
	p.DesiredRunning = c.GetRunning()
	node, _ := t.node(p.GetPlacement().GetNodeId())
	switch {
	case c.GetRunning() && !ProviderPlaced(p):
		p = t.withStatus(p, pb.ProviderState_PROVIDER_STATE_PENDING, "")
	case c.GetRunning() && Ready(node):
		p = t.assignProvider(p, node)
	case c.GetRunning():
		p = t.withStatus(p, pb.ProviderState_PROVIDER_STATE_LOST, "node "+p.GetPlacement().GetNodeId()+" is lost")
	case !ProviderPlaced(p) || !Ready(node):
		t.providerStopped(p, "")
		return ids, nil
	default:
	}
	t.putProvider(p)
	return ids, nil
}

// updateProvider gives a provider a new spec; its agent opens the driver anew
// because spec_version grows. Pinned to another node than it is placed on, it
// leaves that node and is placed again; its data stays behind.
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
	p := shallow(old)
	p.Spec = spec
	p.SpecVersion++
	if pin := spec.GetPlacement().GetNode(); pin != "" && ProviderPlaced(p) && pin != p.GetPlacement().GetNodeId() {
		p.Placement = &pb.Placement{Generation: p.GetPlacement().GetGeneration()}
		state := pb.ProviderState_PROVIDER_STATE_PENDING
		if !p.GetDesiredRunning() {
			state = pb.ProviderState_PROVIDER_STATE_STOPPED
		}
		p = t.withStatus(p, state, "")
	}
	t.putProvider(p)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_UPDATED, p, spec.GetDriver())
	return []string{p.GetId()}, nil
}

// deregisterProvider forgets a provider that is stopped or was never placed and
// that no instance which may still run is assigned to. Assignments of ended
// instances go with it: a later provider of the same id must not inherit them.
func (t *tx) deregisterProvider(c *pb.DeregisterProviderCommand) ([]string, *refusal) {
	p, ok := t.provider(c.GetProviderId())
	if !ok {
		return nil, providerNotFound(c.GetProviderId())
	}
	if ProviderPlaced(p) && p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "provider %q is not stopped", p.GetId()).
			with("provider", p.GetId()).
			with("state", p.GetStatus().GetState().String()).
			with("node", p.GetPlacement().GetNodeId()).
			next("wasmatrix provider stop %s", p.GetId())
	}
	assignments := list[*pb.CapabilityAssignment](t.txn, nil, tableAssignments, indexProvider, p.GetId())
	var users []string
	for _, a := range assignments {
		if in, ok := t.instance(a.GetInstanceId()); ok && !Ended(in) {
			users = append(users, in.GetId())
		}
	}
	if len(users) > 0 {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"provider %q is assigned to %d instances that have not ended", p.GetId(), len(users)).
			with("provider", p.GetId()).
			with("instances", named(users)).
			next("stop the instances, or wasmatrix revoke their permissions")
	}
	for _, a := range assignments {
		t.deleteAssignment(a)
	}
	t.deleteProvider(p)
	t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_DEREGISTERED, p, "")
	return []string{p.GetId()}, nil
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

// providerLost records that a provider's node is gone. It stays with the node
// and returns with it.
func (t *tx) providerLost(p *pb.Provider, message string) {
	switch {
	case p.GetDesiredRunning():
		out := t.withStatus(p, pb.ProviderState_PROVIDER_STATE_LOST, message)
		t.putProvider(out)
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_LOST, out, message)
	case p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED:
		t.providerStopped(p, message)
	default:
	}
}
