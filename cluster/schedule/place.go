package schedule

import (
	"fmt"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Decision is where something is to run. The zero Decision means nowhere.
type Decision struct {
	// NodeID is the chosen node.
	NodeID string
	// Epoch is the node's epoch that the decision was made for; with another one it is void.
	Epoch uint64
}

// Place chooses the node for an instance: of the nodes that are ready, not
// draining, match its rules and have room, the one with the fewest replicas of
// the same workload, then the lowest load, then the smallest id. What the
// instance itself takes at present is not counted. The verdicts say of every
// node, in the order of the ids, whether it can take the instance and why not.
// The Decision is zero when no node can. It is pure and changes nothing.
func Place(state State, instance *pb.Instance) (Decision, []*pb.NodeVerdict) {
	t := newTable(state)
	t.release(instance)
	n, err := instanceNeeds(instance)
	if err != nil {
		return Decision{}, t.refuseAll(err)
	}
	return t.decide(&n)
}

// PlaceProvider chooses the node for a replica of a provider, like Place. It goes
// to the node that its rules name, one whose data lies on a node stays there, any
// other goes to the least loaded node. No node takes two replicas of one provider.
func PlaceProvider(state State, provider *pb.Provider) (Decision, []*pb.NodeVerdict) {
	t := newTable(state)
	t.releaseProvider(provider)
	n := providerNeeds(provider)
	return t.decide(&n)
}

// Explain returns the verdicts of Place: where an instance could run now and
// why not elsewhere, whether or not it runs.
func Explain(state State, instance *pb.Instance) []*pb.NodeVerdict {
	_, verdicts := Place(state, instance)
	return verdicts
}

func (t *table) decide(n *needs) (Decision, []*pb.NodeVerdict) {
	chosen := newQueue(t, n).first()
	verdicts := make([]*pb.NodeVerdict, len(t.nodes))
	for i, l := range t.nodes {
		in := n.runtimeOn(l.node)
		v := &pb.NodeVerdict{
			NodeId: l.node.GetId(), Chosen: l == chosen, Runtime: in.GetName(), Isolation: in.GetIsolation(),
		}
		for _, r := range l.refusals(n) {
			v.Reasons = append(v.Reasons, r.detail)
		}
		if v.Eligible = len(v.Reasons) == 0; v.Eligible {
			v.Reasons = l.describe(n)
		}
		verdicts[i] = v
	}
	return chosen.decision(), verdicts
}

func (t *table) refuseAll(err error) []*pb.NodeVerdict {
	verdicts := make([]*pb.NodeVerdict, len(t.nodes))
	for i, l := range t.nodes {
		verdicts[i] = &pb.NodeVerdict{NodeId: l.node.GetId(), Reasons: []string{err.Error()}}
	}
	return verdicts
}

func (l *nodeLoad) decision() Decision {
	if l == nil {
		return Decision{}
	}
	return Decision{NodeID: l.node.GetId(), Epoch: l.node.GetEpoch()}
}

// outcome is what a batch decides on one instance or one replica of a provider.
type outcome struct {
	Decision
	// message says why there is no node.
	message string
}

// batch places many against one view and what it has decided already.
type batch struct {
	table *table
	// full remembers for which class and amount of memory no room is left, and
	// the words for it: room only shrinks within a batch.
	full map[string]string
	// queue ranks the nodes for what was placed last.
	queue *queue
}

func newBatch(t *table) *batch {
	return &batch{table: t, full: map[string]string{}}
}

func (b *batch) instance(instance *pb.Instance) outcome {
	n, err := instanceNeeds(instance)
	if err != nil {
		return outcome{message: err.Error()}
	}
	return b.place(&n)
}

func (b *batch) provider(provider *pb.Provider) outcome {
	n := providerNeeds(provider)
	return b.place(&n)
}

func (b *batch) place(n *needs) outcome {
	key := fmt.Sprintf("%t %d %q %s", n.slot, n.memory, n.apart, n.class)
	if message, known := b.full[key]; known {
		return outcome{message: message}
	}
	if b.queue == nil || !b.queue.needs.alike(n) {
		b.queue = newQueue(b.table, n)
	}
	chosen := b.queue.first()
	if chosen == nil {
		message := b.table.whyNone(n)
		b.full[key] = message
		return outcome{message: message}
	}
	b.queue.charge()
	return outcome{Decision: chosen.decision()}
}
