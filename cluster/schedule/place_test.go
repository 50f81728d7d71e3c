package schedule

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestPlaceChooses(t *testing.T) {
	const gib = 1 << 30
	tests := []struct {
		name      string
		nodes     []*pb.Node
		instances []*pb.Instance
		place     *pb.Instance
		want      string
	}{
		{
			name: "the smallest id of idle nodes", nodes: []*pb.Node{node("n2"), node("n1")},
			place: pending("a", 0), want: "n1",
		},
		{
			name: "the node with fewer instances", nodes: []*pb.Node{node("n1"), node("n2")},
			instances: []*pb.Instance{pending("b", 0, running("n1"))},
			place:     pending("a", 0), want: "n2",
		},
		{
			name:      "the lower share, not the lower number",
			nodes:     []*pb.Node{node("n1", capacity(10, gib)), node("n2", capacity(1000, 100*gib))},
			instances: []*pb.Instance{pending("b", 0, running("n1")), pending("b", 1, running("n2")), pending("b", 2, running("n2"))},
			place:     pending("a", 0), want: "n2",
		},
		{
			name:  "memory counts as load",
			nodes: []*pb.Node{node("n1"), node("n2")},
			instances: []*pb.Instance{
				pending("b", 0, running("n1"), memory("2GiB")), pending("b", 1, running("n2")), pending("b", 2, running("n2")),
			},
			place: pending("a", 0), want: "n2",
		},
		{
			name:  "spread of replicas before load",
			nodes: []*pb.Node{node("n1"), node("n2")},
			instances: []*pb.Instance{
				pending("a", 1, running("n1")), pending("b", 0, running("n2")), pending("b", 1, running("n2")),
			},
			place: pending("a", 0), want: "n2",
		},
		{
			name:      "spread is only a preference",
			nodes:     []*pb.Node{node("n1"), node("n2", capacity(1, gib))},
			instances: []*pb.Instance{pending("a", 1, running("n1")), pending("b", 0, running("n2"))},
			place:     pending("a", 0), want: "n1",
		},
		{
			name:  "what has ended takes no room",
			nodes: []*pb.Node{node("n1", capacity(1, gib))},
			instances: []*pb.Instance{
				pending("b", 0, on("n1", pb.InstanceState_INSTANCE_STATE_STOPPED), func(i *pb.Instance) { i.DesiredRunning = false }), pending("b", 1, on("n1", pb.InstanceState_INSTANCE_STATE_LOST)),
				pending("b", 2, on("n1", pb.InstanceState_INSTANCE_STATE_FAILED)), pending("b", 3, on("n1", pb.InstanceState_INSTANCE_STATE_COMPLETED)),
			},
			place: pending("a", 0), want: "n1",
		},
		{
			name:      "what crashed and will be restarted takes room",
			nodes:     []*pb.Node{node("n1", capacity(1, gib))},
			instances: []*pb.Instance{pending("b", 0, on("n1", pb.InstanceState_INSTANCE_STATE_CRASHED))},
			place:     pending("a", 0), want: "",
		},
		{
			name: "an operator's label wins", place: pending("a", 0, rules(&pb.PlacementRules{Labels: map[string]string{"zone": "b"}})),
			nodes: []*pb.Node{node("n1", labelled("zone", "b"), func(n *pb.Node) { n.Labels = map[string]string{"zone": "a"} }), node("n2", labelled("zone", "b"))},
			want:  "n2",
		},
		{
			name: "the pinned node", nodes: []*pb.Node{node("n1"), node("n2")},
			instances: []*pb.Instance{pending("a", 1, running("n2"))},
			place:     pending("a", 0, rules(&pb.PlacementRules{Node: "n2"})), want: "n2",
		},
		{
			name:  "a node with the runtime",
			nodes: []*pb.Node{node("n1"), node("n2", func(n *pb.Node) { n.Info.Runtimes = []string{"wasm", "microvm"} })},
			place: pending("a", 0, func(i *pb.Instance) { i.Spec.Runtime = "microvm" }), want: "n2",
		},
		{
			name: "the exact fit", nodes: []*pb.Node{node("n1", capacity(10, gib))},
			instances: []*pb.Instance{pending("b", 0, running("n1"), memory("960MiB"))},
			place:     pending("a", 0), want: "n1",
		},
		{
			name: "not its own room", nodes: []*pb.Node{node("n1", capacity(1, gib))},
			instances: []*pb.Instance{pending("a", 0, running("n1"))},
			place:     pending("a", 0, running("n1")), want: "n1",
		},
		{
			name: "no node with a limit that cannot be read", nodes: []*pb.Node{node("n1")},
			place: pending("a", 0, memory("much")), want: "",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(tt.nodes...)
			w.instances = tt.instances
			got, verdicts := Place(w, tt.place)
			if got.NodeID != tt.want {
				t.Errorf("placed on %q, want %q; verdicts %v", got.NodeID, tt.want, verdicts)
			}
			if tt.want != "" && got.Epoch != 7 {
				t.Errorf("epoch %d, want the node's epoch 7", got.Epoch)
			}
		})
	}
}

func TestRefusalsSayWhy(t *testing.T) {
	w := newWorld(
		node("n1", capacity(100, 4<<30), labelled("zone", "a")),
		node("n2", labelled("zone", "b")),
		node("n3", func(n *pb.Node) { n.State = pb.NodeState_NODE_STATE_LOST }),
		node("n4", labelled("zone", "a"), func(n *pb.Node) { n.Draining = true }),
		node("n5", labelled("zone", "a"), capacity(1, 4<<30)),
		node("n6", labelled("zone", "a")),
	)
	w.instances = []*pb.Instance{
		pending("big", 0, running("n1"), memory("4080MiB")),
		pending("x", 0, running("n5")),
		pending("a", 1, running("n6")),
	}
	place := pending("a", 0, rules(&pb.PlacementRules{Labels: map[string]string{"zone": "a"}}))
	want := []*pb.NodeVerdict{
		{NodeId: "n1", Reasons: []string{"memory: 4 GiB of 4 GiB are taken, 64 MiB are wanted"}},
		{NodeId: "n2", Reasons: []string{"label zone=a is wanted, node has zone=b"}},
		{NodeId: "n3", Reasons: []string{"node is lost", "label zone=a is wanted, node has no label zone"}},
		{NodeId: "n4", Reasons: []string{"node is draining"}},
		{NodeId: "n5", Reasons: []string{"instances: 1 of 1 are taken"}},
		{NodeId: "n6", Eligible: true, Chosen: true, Reasons: []string{
			"load 2 %: 1 of 100 instances, 64 MiB of 4 GiB of memory", "it runs 1 replica of a",
		}},
	}
	if diff := cmp.Diff(want, Explain(w, place), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// A verdict says in which runtime an instance would run on a node, and what would
// keep it apart there.
func TestVerdictsNameTheRuntime(t *testing.T) {
	offering := func(infos ...*pb.RuntimeInfo) func(*pb.Node) {
		return func(n *pb.Node) {
			n.Info.Runtimes, n.Info.RuntimeInfo = nil, infos
			for _, r := range infos {
				n.Info.Runtimes = append(n.Info.Runtimes, r.GetName())
			}
		}
	}
	microvm := func(isolation string, standard bool) *pb.RuntimeInfo {
		return &pb.RuntimeInfo{Name: "microvm", Isolation: isolation, IsDefault: standard}
	}
	wasm := func(standard bool) *pb.RuntimeInfo {
		return &pb.RuntimeInfo{Name: "wasm", Isolation: "sandbox", IsDefault: standard}
	}
	w := newWorld(
		node("n1", offering(wasm(true))),
		node("n2", offering(microvm("emulated", false), wasm(true))),
		node("n3", offering(microvm("hardware", true), wasm(false))),
		node("n4"), // an agent that tells names only
	)
	for _, tt := range []struct {
		runtime string
		want    map[string]string
		refuses map[string]string
	}{
		{"", map[string]string{"n1": "wasm sandbox", "n2": "wasm sandbox", "n3": "microvm hardware", "n4": " "}, nil},
		{"wasm", map[string]string{"n1": "wasm sandbox", "n2": "wasm sandbox", "n3": "wasm sandbox", "n4": "wasm "}, nil},
		{
			"microvm",
			map[string]string{"n1": " ", "n2": "microvm emulated", "n3": "microvm hardware", "n4": " "},
			map[string]string{"n1": "runtime microvm is wanted, node offers wasm", "n4": "runtime microvm is wanted, node offers wasm"},
		},
	} {
		for _, v := range Explain(w, pending("a", 0, func(i *pb.Instance) { i.Spec.Runtime = tt.runtime })) {
			if got := v.GetRuntime() + " " + v.GetIsolation(); got != tt.want[v.GetNodeId()] {
				t.Errorf("runtime %q on %s: %q, want %q", tt.runtime, v.GetNodeId(), got, tt.want[v.GetNodeId()])
			}
			why := tt.refuses[v.GetNodeId()]
			if v.GetEligible() != (why == "") || !strings.HasPrefix(v.GetReasons()[0], why) {
				t.Errorf("runtime %q on %s: eligible %t, %q, want %q", tt.runtime, v.GetNodeId(), v.GetEligible(), v.GetReasons(), why)
			}
		}
	}
	if _, verdicts := PlaceProvider(w, &pb.Provider{Spec: &pb.ProviderSpec{Type: "kv"}}); verdicts[2].GetRuntime() != "" {
		t.Errorf("a provider would run in %q", verdicts[2].GetRuntime())
	}
}

func TestPlaceProvider(t *testing.T) {
	lost := func(n *pb.Node) { n.State = pb.NodeState_NODE_STATE_LOST }
	placed := &pb.Placement{NodeId: "n1", NodeEpoch: 7, Generation: 1}
	tests := []struct {
		name     string
		provider *pb.Provider
		nodes    []*pb.Node
		hosted   []*pb.Provider
		want     string
	}{
		{"on the pinned node", &pb.Provider{Spec: &pb.ProviderSpec{Type: "kv", Placement: &pb.PlacementRules{Node: "n2"}}}, []*pb.Node{node("n1"), node("n2")}, nil, "n2"},
		{"where its data is", &pb.Provider{Spec: &pb.ProviderSpec{Type: "kv"}, Placement: placed}, []*pb.Node{node("n1", lost), node("n2")}, nil, ""},
		{"anywhere with a driver that keeps data elsewhere", &pb.Provider{Spec: &pb.ProviderSpec{Type: "kv", Driver: "redis"}, Placement: placed}, []*pb.Node{node("n1", lost), node("n2")}, nil, "n2"},
		{"an operator's pin wins over the data", &pb.Provider{Spec: &pb.ProviderSpec{Type: "kv", Placement: &pb.PlacementRules{Node: "n2"}}, Placement: placed}, []*pb.Node{node("n1"), node("n2")}, nil, "n2"},
		{
			"apart from other providers", &pb.Provider{Spec: &pb.ProviderSpec{Type: "http"}},
			[]*pb.Node{node("n1"), node("n2")},
			[]*pb.Provider{{Id: "kv", DesiredRunning: true, Placement: placed}},
			"n2",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(tt.nodes...)
			w.providers = tt.hosted
			if got, verdicts := PlaceProvider(w, tt.provider); got.NodeID != tt.want {
				t.Errorf("placed on %q, want %q; verdicts %v", got.NodeID, tt.want, verdicts)
			}
		})
	}
}

func drawWorld(t *rapid.T) *world {
	w := newWorld()
	zones := []string{"a", "b"}
	for k := range rapid.IntRange(0, 6).Draw(t, "nodes") {
		w.nodes = append(w.nodes, node(fmt.Sprintf("n%d", k),
			capacity(rapid.Uint32Range(1, 6).Draw(t, "instances"), rapid.Uint64Range(1, 8).Draw(t, "memory")*64<<20),
			labelled("zone", rapid.SampledFrom(zones).Draw(t, "zone")),
			func(n *pb.Node) {
				n.Draining = rapid.IntRange(0, 4).Draw(t, "draining") == 0
				if rapid.IntRange(0, 4).Draw(t, "lost") == 0 {
					n.State = pb.NodeState_NODE_STATE_LOST
				}
				if rapid.Bool().Draw(t, "microvm") {
					n.Info.Runtimes = append(n.Info.Runtimes, "microvm")
				}
			}))
	}
	for k := range rapid.IntRange(0, 20).Draw(t, "pending") {
		w.instances = append(w.instances, pending(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name"), k, func(i *pb.Instance) {
			i.Spec.Limits = &pb.InstanceLimits{Memory: rapid.SampledFrom([]string{"", "64MiB", "128MiB"}).Draw(t, "limit")}
			i.Spec.Runtime = rapid.SampledFrom([]string{"", "", "wasm", "microvm"}).Draw(t, "runtime")
			if rapid.Bool().Draw(t, "zoned") {
				i.Spec.Placement = &pb.PlacementRules{Labels: map[string]string{"zone": rapid.SampledFrom(zones).Draw(t, "want")}}
			}
		}))
	}
	return w
}

// A batch places each instance exactly where Place would after the decisions
// before it, so nothing it does can break a rule that Place keeps.
func TestBatchEqualsPlacingOneByOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		b := newBatch(newTable(w))
		one := newWorld(w.nodes...)
		for _, i := range w.instances {
			want, _ := Place(one, i)
			got := b.instance(i)
			if got.Decision != want {
				t.Fatalf("%s: batch says %+v, Place says %+v", i.Id, got, want)
			}
			if (got.NodeID == "") == (got.message == "") {
				t.Fatalf("%s: a node and a reason exclude each other: %+v", i.Id, got)
			}
			if want.NodeID != "" {
				one.instances = append(one.instances, decided(i, &pb.PlaceDecision{NodeId: want.NodeID, NodeEpoch: want.Epoch}))
			}
		}
	})
}

func TestPlaceKeepsTheRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		taken, bytes := map[string]uint32{}, map[string]uint64{}
		b := newBatch(newTable(w))
		for _, i := range w.instances {
			o := b.instance(i)
			if o.NodeID == "" {
				continue
			}
			var n *pb.Node
			for _, candidate := range w.nodes {
				if candidate.Id == o.NodeID {
					n = candidate
				}
			}
			limit, _ := memoryOf(i)
			taken[n.Id]++
			bytes[n.Id] += limit
			switch {
			case n.State != pb.NodeState_NODE_STATE_READY, n.Draining:
				t.Fatalf("%s is on %s, which takes nothing", i.Id, n.Id)
			case taken[n.Id] > n.Info.Capacity.Instances, bytes[n.Id] > n.Info.Capacity.MemoryBytes:
				t.Fatalf("%s is too full: %d instances, %d bytes", n.Id, taken[n.Id], bytes[n.Id])
			case i.Spec.GetPlacement().GetLabels()["zone"] != "" && i.Spec.Placement.Labels["zone"] != n.Info.Labels["zone"]:
				t.Fatalf("%s is in the wrong zone", i.Id)
			case i.Spec.Runtime == "microvm" && len(n.Info.Runtimes) == 1:
				t.Fatalf("%s has no runtime on %s", i.Id, n.Id)
			}
		}
	})
}

func TestVerdictsAgreeWithTheDecision(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		i := pending("a", 999, rules(&pb.PlacementRules{Labels: map[string]string{"zone": "a"}}))
		got, verdicts := Place(w, i)
		again, _ := Place(w, i)
		if got != again {
			t.Fatalf("placed on %v, then on %v", got, again)
		}
		eligible, chosen := 0, ""
		for _, v := range verdicts {
			if v.Eligible {
				eligible++
			}
			if v.Chosen {
				chosen += v.NodeId
			}
			if len(v.Reasons) == 0 {
				t.Fatalf("%s: a verdict without a reason", v.NodeId)
			}
		}
		if chosen != got.NodeID || (eligible > 0) != (chosen != "") || len(verdicts) != len(w.nodes) {
			t.Fatalf("chosen %q of %d eligible, decision %+v", chosen, eligible, got)
		}
	})
}

func TestReplicasSpread(t *testing.T) {
	w := newWorld(node("n1"), node("n2"), node("n3"))
	w.instances = []*pb.Instance{pending("x", 0, running("n1")), pending("x", 1, running("n1"))}
	b := newBatch(newTable(w))
	count := map[string]int{}
	for k := range 9 {
		count[b.instance(pending("a", k)).NodeID]++
	}
	if diff := cmp.Diff(map[string]int{"n1": 3, "n2": 3, "n3": 3}, count); diff != "" {
		t.Error(diff)
	}
}

func TestReasonInTheRegistryIsSteadyAndShort(t *testing.T) {
	w := newWorld(node("n1", capacity(1, 1<<30)), node("n2", func(n *pb.Node) { n.Draining = true }))
	w.instances = []*pb.Instance{pending("x", 0, running("n1"), memory("1GiB"))}
	o := newBatch(newTable(w)).instance(pending("a", 0))
	const want = "none of 2 nodes can take it: 1 without room for one more instance, 1 draining"
	if o.message != want {
		t.Errorf("message %q, want %q", o.message, want)
	}
	if got := newBatch(newTable(newWorld())).instance(pending("a", 0)).message; !strings.Contains(got, "no node has registered") {
		t.Errorf("message without nodes: %q", got)
	}
}
