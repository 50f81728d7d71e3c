package schedule

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/hashicorp/go-memdb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// world is a registry small enough to be drawn by a property test.
type world struct {
	nodes     []*pb.Node
	instances []*pb.Instance
	providers []*pb.Provider
	// changed fires when anything changes; it is all that a reader can watch here.
	changed chan struct{}
}

func newWorld(nodes ...*pb.Node) *world {
	return &world{nodes: nodes, changed: make(chan struct{})}
}

func (w *world) Nodes(ws memdb.WatchSet) []*pb.Node {
	ws.Add(w.changed)
	return slices.SortedFunc(slices.Values(w.nodes), func(a, b *pb.Node) int { return cmp.Compare(a.Id, b.Id) })
}

func (w *world) InstancesByNode(ws memdb.WatchSet, nodeID string) []*pb.Instance {
	ws.Add(w.changed)
	return keep(w.instances, func(i *pb.Instance) bool { return i.GetPlacement().GetNodeId() == nodeID })
}

func (w *world) ProvidersByNode(ws memdb.WatchSet, nodeID string) []*pb.Provider {
	ws.Add(w.changed)
	return keep(w.providers, func(p *pb.Provider) bool { return p.GetPlacement().GetNodeId() == nodeID })
}

func (w *world) UnplacedInstances(ws memdb.WatchSet) []*pb.Instance {
	ws.Add(w.changed)
	return keep(w.instances, func(i *pb.Instance) bool {
		return fsm.Unplaced(i) || slices.ContainsFunc(w.nodes, func(n *pb.Node) bool { return fsm.Leaving(i, n) })
	})
}

func (w *world) UnplacedProviders(ws memdb.WatchSet) []*pb.Provider {
	ws.Add(w.changed)
	return keep(w.providers, fsm.ProviderUnplaced)
}

// apply does to the world what the registry does with a PlaceCommand.
func (w *world) apply(decisions []*pb.PlaceDecision) {
	byID := make(map[string]*pb.PlaceDecision, len(decisions))
	for _, d := range decisions {
		byID[d.InstanceId] = d
	}
	for k, i := range w.instances {
		if d := byID[i.Id]; d != nil && i.GetPlacement().GetGeneration() == d.SeenGeneration {
			w.instances[k] = decided(i, d)
		}
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

func decided(i *pb.Instance, d *pb.PlaceDecision) *pb.Instance {
	out := &pb.Instance{Id: i.Id, Name: i.Name, Spec: i.Spec, DesiredRunning: i.DesiredRunning, Placement: i.Placement, Status: i.Status}
	if d.NodeId != "" && fsm.Placed(i) {
		out.Leaving = true
		return out
	}
	if d.NodeId == "" {
		out.Status = &pb.InstanceStatus{State: i.Status.State, Message: d.Message}
		return out
	}
	out.Placement = &pb.Placement{NodeId: d.NodeId, NodeEpoch: d.NodeEpoch, Generation: d.SeenGeneration + 1}
	out.Status = &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_ASSIGNED, Generation: d.SeenGeneration + 1}
	return out
}

// leave ends, as their agents do, the instances that were asked to leave, and
// returns their ids.
func (w *world) leave() []string {
	var left []string
	for k, i := range w.instances {
		if !i.Leaving {
			continue
		}
		left = append(left, i.Id)
		w.instances[k] = &pb.Instance{
			Id: i.Id, Name: i.Name, Spec: i.Spec, DesiredRunning: i.DesiredRunning,
			Placement: &pb.Placement{Generation: i.Placement.Generation},
			Status:    &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_PENDING},
		}
	}
	close(w.changed)
	w.changed = make(chan struct{})
	return left
}

func keep[T any](in []T, want func(T) bool) []T {
	return slices.DeleteFunc(slices.Clone(in), func(v T) bool { return !want(v) })
}

func node(id string, change ...func(*pb.Node)) *pb.Node {
	n := &pb.Node{
		Id: id, Epoch: 7, State: pb.NodeState_NODE_STATE_READY,
		Info: &pb.NodeInfo{
			Id: id, AgentAddress: id + ":7400", Runtimes: []string{"wasm"},
			Capacity: &pb.NodeCapacity{Instances: 100, MemoryBytes: 4 << 30},
		},
	}
	for _, c := range change {
		c(n)
	}
	return n
}

func capacity(instances uint32, memory uint64) func(*pb.Node) {
	return func(n *pb.Node) { n.Info.Capacity = &pb.NodeCapacity{Instances: instances, MemoryBytes: memory} }
}

func labelled(key, value string) func(*pb.Node) {
	return func(n *pb.Node) { n.Info.Labels = map[string]string{key: value} }
}

func pending(name string, k int, change ...func(*pb.Instance)) *pb.Instance {
	i := &pb.Instance{
		Id: fmt.Sprintf("%s-%05d", name, k), Name: name, DesiredRunning: true,
		Spec:   &pb.WorkloadSpec{Name: name},
		Status: &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_PENDING},
	}
	for _, c := range change {
		c(i)
	}
	return i
}

func on(nodeID string, state pb.InstanceState) func(*pb.Instance) {
	return func(i *pb.Instance) {
		i.Placement = &pb.Placement{NodeId: nodeID, NodeEpoch: 7, Generation: 1}
		i.Status.State = state
	}
}

func running(nodeID string) func(*pb.Instance) {
	return on(nodeID, pb.InstanceState_INSTANCE_STATE_RUNNING)
}

func memory(limit string) func(*pb.Instance) {
	return func(i *pb.Instance) { i.Spec.Limits = &pb.InstanceLimits{Memory: limit} }
}

func rules(r *pb.PlacementRules) func(*pb.Instance) {
	return func(i *pb.Instance) { i.Spec.Placement = r }
}
