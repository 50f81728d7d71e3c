package schedule

import (
	"github.com/hashicorp/go-memdb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Unplaced is what a planner reads; fsm.View satisfies it.
type Unplaced interface {
	State
	// UnplacedInstances returns the instances that wait for a node, and those that
	// are to leave one that drains.
	UnplacedInstances(ws memdb.WatchSet) []*pb.Instance
	// UnplacedProviders returns the replicas of providers that wait for a node.
	UnplacedProviders(ws memdb.WatchSet) []*pb.Provider
}

// subject is one instance or one replica of a provider, which fsm.ReplicaName names.
type subject struct {
	provider bool
	id       string
}

// attempt is a decision that was proposed. What it meant depends on whether the
// instance was placed then: such a one was asked to leave, another one placed.
type attempt struct {
	generation uint64
	placed     bool
	outcome    outcome
	// subject and node are the modified indexes of the records that it was made
	// from. A decision that was void because one of them was another for a moment
	// may be right now, though it is the same.
	subject, node uint64
}

// planner is what Run remembers from one batch to the next.
type planner struct {
	table *table
	// pending fires when the set of what is to be placed changes.
	pending memdb.WatchSet
	// proposed holds the last decision on what is still to be placed. The same one,
	// made from the same records, is not proposed twice: the registry found it void,
	// and would again.
	proposed map[subject]attempt
	// blocked counts what no node can take.
	blocked int
}

// plan returns the next decisions. When there are none the WatchSet fires as
// soon as there may be some.
func (p *planner) plan(view Unplaced) ([]*pb.PlaceDecision, memdb.WatchSet) {
	nodes := memdb.NewWatchSet()
	better := p.table.refresh(view, nodes)
	var decisions []*pb.PlaceDecision
	if better || p.pending == nil || fired(p.pending) {
		decisions = p.decide(view)
	}
	if len(decisions) > 0 {
		p.pending = nil
		return decisions, nil
	}
	for channel := range p.pending {
		nodes.Add(channel)
	}
	if p.blocked > 0 {
		p.table.watchRoom(nodes)
	}
	return nil, nodes
}

func (p *planner) decide(view Unplaced) []*pb.PlaceDecision {
	p.pending, p.blocked = memdb.NewWatchSet(), 0
	b := newBatch(p.table)
	pass := &pass{proposed: p.proposed, next: make(map[subject]attempt, len(p.proposed))}
	// Providers first: instances are of little use without them.
	for _, provider := range view.UnplacedProviders(p.pending) {
		pass.provider(b, provider)
	}
	instances := view.UnplacedInstances(p.pending)
	for _, instance := range instances {
		if instance.GetLeaving() {
			// It was asked to leave because there is room for it; that is not given away.
			b.instance(instance)
		}
	}
	for _, instance := range instances {
		if !instance.GetLeaving() {
			pass.instance(b, instance)
		}
	}
	p.proposed, p.blocked = pass.next, pass.blocked
	return pass.decisions
}

// forget lets decisions be proposed again.
func (p *planner) forget(decisions []*pb.PlaceDecision) {
	for _, d := range decisions {
		delete(p.proposed, subject{id: d.GetInstanceId()})
		delete(p.proposed, subject{provider: true, id: fsm.ReplicaName(d.GetProviderId(), d.GetReplica())})
	}
}

// pass collects the decisions of one walk over what is to be placed.
type pass struct {
	proposed, next map[subject]attempt
	decisions      []*pb.PlaceDecision
	blocked        int
}

func (p *pass) full() bool { return len(p.decisions) >= maxDecisions }

func (p *pass) instance(b *batch, instance *pb.Instance) {
	if p.full() {
		return
	}
	key := subject{id: instance.GetId()}
	o := b.instance(instance)
	a := attempt{
		generation: instance.GetPlacement().GetGeneration(), placed: fsm.Placed(instance), outcome: o,
		subject: instance.GetModifiedIndex(), node: b.table.modified(o.NodeID),
	}
	if o.NodeID == "" && a.placed {
		// It is to leave a draining node and goes on there: a drain ends nothing that
		// has no successor.
		p.blocked++
		return
	}
	if p.record(key, a, instance.GetStatus().GetMessage()) {
		p.decisions = append(p.decisions, &pb.PlaceDecision{
			InstanceId: key.id, SeenGeneration: a.generation,
			NodeId: o.NodeID, NodeEpoch: o.Epoch, Message: o.message,
		})
	}
}

func (p *pass) provider(b *batch, provider *pb.Provider) {
	if p.full() {
		return
	}
	key := subject{provider: true, id: fsm.ReplicaName(provider.GetId(), provider.GetReplica())}
	o := b.provider(provider)
	a := attempt{
		generation: provider.GetPlacement().GetGeneration(), outcome: o,
		subject: provider.GetModifiedIndex(), node: b.table.modified(o.NodeID),
	}
	if p.record(key, a, provider.GetStatus().GetMessage()) {
		p.decisions = append(p.decisions, &pb.PlaceDecision{
			ProviderId: provider.GetId(), Replica: provider.GetReplica(), SeenGeneration: a.generation,
			NodeId: o.NodeID, NodeEpoch: o.Epoch, Message: o.message,
		})
	}
}

// record remembers an attempt and reports whether it is to be proposed; recorded
// is the reason that the registry holds already.
func (p *pass) record(key subject, a attempt, recorded string) bool {
	if a.outcome.NodeID == "" {
		p.blocked++
		if a.outcome.message == recorded {
			return false
		}
	}
	p.next[key] = a
	return p.proposed[key] != a
}
