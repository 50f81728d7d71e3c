package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// registerNode opens an agent's session. The epoch is kept when the agent holds
// the live one, which means that the same process only lost its connection.
// Otherwise the node gets the next epoch, and whatever was placed there under
// the old one is dealt with: a new process shares no generation with an old one.
func (t *tx) registerNode(c *pb.RegisterNodeCommand) *pb.CommandResult {
	id := c.GetInfo().GetId()
	if r := checkID("the node's id", id); r != nil {
		return t.result(nil, r)
	}
	for _, spec := range c.GetProviders() {
		if r := checkDeclared(id, spec); r != nil {
			return t.result(nil, r)
		}
	}
	old, known := t.node(id)
	kept := known && Ready(old) && c.GetEpoch() == old.GetEpoch()
	node := t.openSession(old, c.GetInfo(), kept)
	if known && !kept {
		t.resumeInstances(node)
		t.resumeProviders(node)
	}
	for _, spec := range c.GetProviders() {
		t.declareProvider(node, spec)
	}
	res := t.result([]string{id}, nil)
	res.Epoch = node.GetEpoch()
	return res
}

// openSession writes the node's record and the fact; old is nil for a new node.
func (t *tx) openSession(old *pb.Node, info *pb.NodeInfo, kept bool) *pb.Node {
	if old == nil {
		node := &pb.Node{
			Id:             info.GetId(),
			Info:           info,
			Epoch:          1,
			State:          pb.NodeState_NODE_STATE_READY,
			RegisteredAt:   t.now,
			StateChangedAt: t.now,
			CreatedIndex:   t.index,
		}
		t.putNode(node)
		t.nodeEvent(pb.EventKind_EVENT_KIND_NODE_JOINED, node, "")
		return node
	}
	node := shallow(old)
	node.Info = info
	if kept {
		t.putNode(node)
		return node
	}
	node.Epoch++
	node.RegisteredAt = t.now
	message := "agent restarted"
	if !Ready(old) {
		node.State = pb.NodeState_NODE_STATE_READY
		node.StateChangedAt = t.now
		message = "back after it was lost"
	}
	t.putNode(node)
	t.nodeEvent(pb.EventKind_EVENT_KIND_NODE_RECOVERED, node, message)
	return node
}

// resumeInstances deals with what the node's former agent process ran. Only
// instances that are still placed are met here: those of an expired epoch are
// LOST and belong to no node.
func (t *tx) resumeInstances(node *pb.Node) {
	const message = "agent restarted"
	for _, in := range t.onNode(node.GetId()) {
		switch {
		case Ended(in):
		case !in.GetDesiredRunning():
			t.stopped(in, message)
		case Policy(in.GetSpec()) == PolicyNever:
			t.lost(in, message)
		default:
			again := t.assign(in, node)
			again.Status.Reason = pb.ExitReason_EXIT_REASON_NODE_LOST
			again.Status.Message = message
			t.putInstance(in, again)
			t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_RESTARTED, again, message)
		}
	}
}

// resumeProviders gives the node's providers to its new agent process.
func (t *tx) resumeProviders(node *pb.Node) {
	for _, p := range t.providersOn(node.GetId()) {
		switch {
		case p.GetDesiredRunning():
			t.putProvider(t.assignProvider(p, node))
		case p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED:
			t.providerStopped(p, "agent restarted")
		}
	}
}

// expireNode ends a node's epoch. It is ignored when the node has another epoch
// or is lost already: the lease that ran out is not the one that lives.
func (t *tx) expireNode(c *pb.ExpireNodeCommand) *pb.CommandResult {
	old, ok := t.node(c.GetNodeId())
	if !ok {
		return t.result(nil, nodeNotFound(c.GetNodeId()))
	}
	if old.GetEpoch() != c.GetEpoch() || !Ready(old) {
		res := t.result(nil, nil)
		res.Epoch = old.GetEpoch()
		return res
	}
	node := shallow(old)
	node.State = pb.NodeState_NODE_STATE_LOST
	node.StateChangedAt = t.now
	t.putNode(node)
	t.nodeEvent(pb.EventKind_EVENT_KIND_NODE_LOST, node, "lease expired")
	message := "node " + node.GetId() + " was lost"
	for _, in := range t.onNode(node.GetId()) {
		switch {
		case Ended(in):
		case !in.GetDesiredRunning():
			t.stopped(in, message)
		default:
			t.lost(in, message)
		}
	}
	for _, p := range t.providersOn(node.GetId()) {
		t.providerLost(p, message)
	}
	res := t.result([]string{node.GetId()}, nil)
	res.Epoch = node.GetEpoch()
	return res
}

// drainNode begins or ends a drain. The scheduler asks the instances to leave.
// Those that were asked go even if the drain ends meanwhile.
func (t *tx) drainNode(c *pb.DrainNodeCommand) ([]string, *refusal) {
	old, ok := t.node(c.GetNodeId())
	if !ok {
		return nil, nodeNotFound(c.GetNodeId())
	}
	ids := []string{old.GetId()}
	if old.GetDraining() == c.GetDraining() {
		return ids, nil
	}
	node := shallow(old)
	node.Draining = c.GetDraining()
	t.putNode(node)
	kind := pb.EventKind_EVENT_KIND_NODE_UNDRAINED
	if node.GetDraining() {
		kind = pb.EventKind_EVENT_KIND_NODE_DRAINED
	}
	t.nodeEvent(kind, node, "")
	return ids, nil
}

// onNode returns the instances placed on a node, ended ones too.
func (t *tx) onNode(nodeID string) []*pb.Instance {
	return list[*pb.Instance](t.txn, nil, tableInstances, indexNode, nodeID)
}

func (t *tx) providersOn(nodeID string) []*pb.Provider {
	return list[*pb.Provider](t.txn, nil, tableProviders, indexNode, nodeID)
}
