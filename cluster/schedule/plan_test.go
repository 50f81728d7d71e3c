package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-memdb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func newPlanner() *planner {
	return &planner{table: &table{}, proposed: map[subject]attempt{}}
}

// rounds lets a planner work until it has nothing to decide.
func rounds(t *testing.T, p *planner, w *world) (batches int) {
	t.Helper()
	for {
		decisions, ws := p.plan(w)
		if len(decisions) == 0 {
			if len(ws) == 0 {
				t.Fatal("nothing to decide and nothing to wait for")
			}
			return batches
		}
		if len(decisions) > maxDecisions {
			t.Fatalf("%d decisions in one command", len(decisions))
		}
		if batches++; batches > 100 {
			t.Fatal("the planner does not come to rest")
		}
		w.apply(decisions)
	}
}

func TestUnplaceableIsRecordedOnceAndPlacedWhenThereIsRoom(t *testing.T) {
	w := newWorld(node("n1", capacity(1, 1<<30)))
	w.instances = []*pb.Instance{pending("a", 0), pending("a", 1), pending("a", 2)}
	p := newPlanner()
	if got := rounds(t, p, w); got != 1 {
		t.Errorf("%d commands, want 1 with one placement and two reasons", got)
	}
	if p.blocked != 2 || w.instances[1].Status.Message == "" {
		t.Fatalf("%d blocked, message %q", p.blocked, w.instances[1].Status.Message)
	}
	if decisions, _ := newPlanner().plan(w); len(decisions) != 0 {
		t.Errorf("the next leader records the same reasons again: %v", decisions)
	}
	_, ws := p.plan(w)
	if fired(ws) {
		t.Error("it would wake although nothing changed")
	}
	w.instances[0] = pending("a", 0, on("n1", pb.InstanceState_INSTANCE_STATE_COMPLETED))
	w.apply(nil)
	if !fired(ws) {
		t.Error("freed room does not wake it")
	}
	rounds(t, p, w)
	if w.instances[1].GetPlacement().GetNodeId() != "n1" || w.instances[2].GetPlacement() != nil {
		t.Error("the freed place was not given to the first in line")
	}
}

func TestVoidDecisionIsNotRepeatedUntilTheNodeChanges(t *testing.T) {
	w := newWorld(node("n1"))
	w.instances = []*pb.Instance{pending("a", 0)}
	p := newPlanner()
	if decisions, _ := p.plan(w); len(decisions) != 1 {
		t.Fatalf("%d decisions, want 1", len(decisions))
	}
	w.apply(nil)
	if decisions, _ := p.plan(w); len(decisions) != 0 {
		t.Fatal("a decision that the registry found void was made again at once")
	}
	w.nodes[0] = node("n1", func(n *pb.Node) { n.Epoch = 8 })
	w.apply(nil)
	decisions, _ := p.plan(w)
	if len(decisions) != 1 || decisions[0].NodeEpoch != 8 {
		t.Fatalf("decisions %v, want one for epoch 8", decisions)
	}
	p.forget(decisions)
	p.pending = nil
	if again, _ := p.plan(w); len(again) != 1 {
		t.Error("a decision that could not be committed is not made again")
	}
}

// What made a decision void may be over before the planner looks again: an
// instance that was stopped and started in between, a node that was drained and
// undrained. Nothing else would ever wake it.
func TestVoidDecisionIsMadeAgainWhenItsRecordsChanged(t *testing.T) {
	for name, change := range map[string]func(w *world){
		"the instance": func(w *world) {
			w.instances[0] = pending("a", 0, func(i *pb.Instance) { i.ModifiedIndex = 9 })
		},
		"the node": func(w *world) { w.nodes[0] = node("n1", func(n *pb.Node) { n.ModifiedIndex = 9 }) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(node("n1"))
			w.instances = []*pb.Instance{pending("a", 0)}
			p := newPlanner()
			first, _ := p.plan(w)
			change(w)
			w.apply(nil)
			again, _ := p.plan(w)
			if len(first) != 1 || len(again) != 1 || again[0].NodeId != "n1" {
				t.Errorf("decided %v, and after the change %v", first, again)
			}
		})
	}
}

func TestDrainMovesWhatCanRunElsewhere(t *testing.T) {
	draining := func(n *pb.Node) { n.Draining = true }
	w := newWorld(node("n1", draining), node("n2", capacity(2, 1<<30)))
	w.instances = []*pb.Instance{
		pending("a", 0, running("n1")),
		pending("a", 1, running("n1"), rules(&pb.PlacementRules{Node: "n1"})),
		pending("a", 2, running("n1"), func(i *pb.Instance) { i.DesiredRunning = false }),
		pending("a", 3, on("n1", pb.InstanceState_INSTANCE_STATE_COMPLETED)),
		pending("a", 4, running("n1")),
		pending("a", 5, running("n1")),
	}
	p := newPlanner()
	rounds(t, p, w)
	// More than there is room for elsewhere is not asked to leave, however often one looks.
	if left := w.leave(); !slices.Equal(left, []string{"a-00000", "a-00004"}) {
		t.Errorf("asked to leave: %v", left)
	}
	rounds(t, p, w)
	want := []string{"n2", "n1", "n1", "n1", "n2", "n1"}
	for k, i := range w.instances {
		if got := i.GetPlacement().GetNodeId(); got != want[k] {
			t.Errorf("%s is on %s, want %s", i.Id, got, want[k])
		}
		if i.Status.Message != "" {
			t.Errorf("%s: a running instance got the message %q", i.Id, i.Status.Message)
		}
	}
}

func TestTenThousandArePlacedInTenCommands(t *testing.T) {
	const nodes, instances = 1000, 10000
	w := newWorld()
	for k := range nodes {
		w.nodes = append(w.nodes, node(fmt.Sprintf("n%04d", k), capacity(10, 1<<40)))
	}
	for k := range instances {
		w.instances = append(w.instances, pending(fmt.Sprintf("w%02d", k/100), k))
	}
	// The fake registry searches; a real one has indexes. So only the planner is timed.
	p, byNode := newPlanner(), newIndexed(w)
	var spent time.Duration
	batches := 0
	for {
		start := time.Now()
		decisions, _ := p.plan(byNode)
		spent += time.Since(start)
		if len(decisions) == 0 {
			break
		}
		batches++
		w.apply(decisions)
		byNode = newIndexed(w)
	}
	if batches != instances/maxDecisions {
		t.Errorf("%d commands, want %d", batches, instances/maxDecisions)
	}
	for _, l := range p.table.nodes {
		if l.instances != instances/nodes {
			t.Fatalf("%s has %d instances, want %d", l.node.Id, l.instances, instances/nodes)
		}
	}
	if limit := 30 * time.Second; spent > limit {
		t.Errorf("it took %s, want less than %s", spent, limit)
	}
	t.Logf("%d instances on %d nodes: %s in %d batches", instances, nodes, spent, batches)
}

// indexed answers InstancesByNode without a search.
type indexed struct {
	*world
	byNode map[string]*world
}

func newIndexed(w *world) *indexed {
	x := &indexed{world: w, byNode: map[string]*world{}}
	for _, i := range w.instances {
		id := i.GetPlacement().GetNodeId()
		if x.byNode[id] == nil {
			x.byNode[id] = &world{changed: w.changed}
		}
		x.byNode[id].instances = append(x.byNode[id].instances, i)
	}
	return x
}

func (x *indexed) InstancesByNode(ws memdb.WatchSet, nodeID string) []*pb.Instance {
	ws.Add(x.changed)
	if on := x.byNode[nodeID]; on != nil {
		return on.instances
	}
	return nil
}
