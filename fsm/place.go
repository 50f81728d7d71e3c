package fsm

import (
	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// place carries out the scheduler's decisions. Each stands alone and is void
// when what the scheduler saw has changed since; the answer names those that
// had an effect.
func (t *tx) place(c *pb.PlaceCommand) []string {
	var done []string
	if plant.On(plant.MapOrder) {
		c.Decisions = plant.Unordered(c.GetDecisions())
	}
	for _, d := range c.GetDecisions() {
		switch instance, provider := d.GetInstanceId(), d.GetProviderId(); {
		case instance != "" && provider == "" && t.placeInstance(d):
			done = append(done, instance)
		case provider != "" && instance == "" && t.placeProvider(d):
			done = append(done, ReplicaName(provider, d.GetReplica()))
		}
	}
	return done
}

// target returns the node a decision chose, if it may still take something.
func (t *tx) target(d *pb.PlaceDecision) (*pb.Node, bool) {
	node, ok := t.node(d.GetNodeId())
	return node, ok && Schedulable(node) && node.GetEpoch() == d.GetNodeEpoch()
}

// placeInstance places an instance that has no node, or asks one to leave a node
// that drains: that another node has room for it lets it leave, and it is placed
// there, in the next generation, once its agent has reported the end of this one.
// Nothing else is ever moved, so a decision that comes late cannot run a finished
// command again.
func (t *tx) placeInstance(d *pb.PlaceDecision) bool {
	in, ok := t.instance(d.GetInstanceId())
	if !ok || in.GetPlacement().GetGeneration() != d.GetSeenGeneration() {
		return false
	}
	unplaced := Unplaced(in)
	if !unplaced {
		if from, ok := t.node(in.GetPlacement().GetNodeId()); !ok || !Leaving(in, from) {
			return false
		}
	}
	if d.GetNodeId() == "" {
		// What runs on a draining node has a status of its agent's, not ours.
		return unplaced && t.unplaceable(in, line(d.GetMessage()))
	}
	node, ok := t.target(d)
	if !ok {
		return false
	}
	if !unplaced && !plant.On(plant.GenerationWithoutStop) {
		return t.leave(in)
	}
	placed := t.assign(in, node)
	t.putInstance(in, placed)
	if from := in.GetPlacement().GetNodeId(); from != "" && from != node.GetId() {
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_MOVED, placed, "from "+from)
	} else {
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_PLACED, placed, "")
	}
	return true
}

// leave asks an instance to leave its node.
func (t *tx) leave(in *pb.Instance) bool {
	if in.GetLeaving() {
		return false
	}
	asked := shallow(in)
	asked.Leaving = true
	t.putInstance(in, asked)
	return true
}

// unplaceable records why no node can take an instance; the same reason again
// is no news.
func (t *tx) unplaceable(in *pb.Instance, message string) bool {
	if in.GetStatus().GetMessage() == message {
		return false
	}
	told := shallow(in)
	told.Status = shallow(in.GetStatus())
	told.Status.Message = message
	t.putInstance(in, told)
	t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_UNPLACEABLE, told, message)
	return true
}

// placeProvider places a replica that has no node. No node ever hosts two
// replicas of one provider.
func (t *tx) placeProvider(d *pb.PlaceDecision) bool {
	p, ok := t.replica(d.GetProviderId(), d.GetReplica())
	if !ok || !ProviderUnplaced(p) || p.GetPlacement().GetGeneration() != d.GetSeenGeneration() {
		return false
	}
	if d.GetNodeId() == "" {
		message := line(d.GetMessage())
		if p.GetStatus().GetMessage() == message {
			return false
		}
		t.putProvider(t.withStatus(p, p.GetStatus().GetState(), message))
		return true
	}
	node, ok := t.target(d)
	if !ok {
		return false
	}
	for _, other := range t.replicas(p.GetId()) {
		if other.GetPlacement().GetNodeId() == node.GetId() {
			return false
		}
	}
	t.putProvider(t.assignProvider(p, node))
	return true
}
