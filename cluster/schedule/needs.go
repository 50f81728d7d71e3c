package schedule

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/quantity"
)

// DefaultMemoryBytes is what an instance without a memory limit of its own is
// counted with: 64 MiB, the default that the executors apply.
const DefaultMemoryBytes = 64 << 20

// needs is what something to be placed asks of a node.
type needs struct {
	// name is the workload whose replicas are spread; empty for a provider.
	name string
	// pin is the only node allowed; empty means any.
	pin string
	// home is the node that holds the data of a provider; empty means none does.
	home string
	// apart is the provider whose other replicas must be on other nodes; empty for
	// an instance.
	apart   string
	labels  map[string]string
	runtime string
	memory  uint64
	// slot is true for what takes one of the node's instance places.
	slot bool
	// class is equal for all that may run on the same nodes, room aside.
	class string
}

var errLimits = errors.New("limits.memory is not a number of bytes")

func instanceNeeds(instance *pb.Instance) (needs, error) {
	spec := instance.GetSpec()
	memory, err := memoryOf(instance)
	n := needs{
		name:    instance.GetName(),
		pin:     spec.GetPlacement().GetNode(),
		labels:  spec.GetPlacement().GetLabels(),
		runtime: spec.GetRuntime(),
		memory:  memory,
		slot:    true,
	}
	n.class = n.classKey()
	return n, err
}

func providerNeeds(provider *pb.Provider) needs {
	n := needs{
		pin:    provider.GetSpec().GetPlacement().GetNode(),
		labels: provider.GetSpec().GetPlacement().GetLabels(),
		apart:  provider.GetId(),
	}
	if n.pin == "" && fsm.KeepsState(provider.GetSpec()) {
		n.home = provider.GetPlacement().GetNodeId()
	}
	n.class = n.classKey()
	return n
}

func memoryOf(instance *pb.Instance) (uint64, error) {
	limit := instance.GetSpec().GetLimits().GetMemory()
	if limit == "" {
		return DefaultMemoryBytes, nil
	}
	bytes, err := quantity.ParseBytes(limit)
	if err != nil {
		return DefaultMemoryBytes, fmt.Errorf("%w: %q", errLimits, limit)
	}
	return bytes, nil
}

func (n *needs) classKey() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %q %q", n.pin, n.home, n.runtime)
	for _, key := range slices.Sorted(maps.Keys(n.labels)) {
		fmt.Fprintf(&b, " %q=%q", key, n.labels[key])
	}
	return b.String()
}

// alike reports whether all nodes rank the same for n and o.
func (n *needs) alike(o *needs) bool {
	return n.slot == o.slot && n.name == o.name && n.apart == o.apart && n.memory == o.memory && n.class == o.class
}

// refusal is one reason why a node cannot take something: detail speaks of this
// node, kind is the same for all nodes with the same reason and does not change
// with every placement, so that it can be recorded.
type refusal struct {
	kind   string
	detail string
}

// mismatches tells why a node cannot take n whatever its load; none means it may.
func (n *needs) mismatches(node *pb.Node) []refusal {
	var out []refusal
	if !fsm.Ready(node) {
		out = append(out, refusal{"lost", "node is lost"})
	}
	if node.GetDraining() {
		out = append(out, refusal{"draining", "node is draining"})
	}
	if n.pin != "" && n.pin != node.GetId() {
		out = append(out, refusal{"not the wanted node " + n.pin, fmt.Sprintf("node %s is wanted", n.pin)})
	}
	if n.home != "" && n.home != node.GetId() {
		out = append(out, refusal{"without its data", fmt.Sprintf("its data is on node %s", n.home)})
	}
	for _, key := range slices.Sorted(maps.Keys(n.labels)) {
		want := n.labels[key]
		have, ok := labelOf(node, key)
		switch {
		case !ok:
			out = append(out, refusal{
				fmt.Sprintf("without label %s=%s", key, want),
				fmt.Sprintf("label %s=%s is wanted, node has no label %s", key, want, key),
			})
		case have != want:
			out = append(out, refusal{
				fmt.Sprintf("without label %s=%s", key, want),
				fmt.Sprintf("label %s=%s is wanted, node has %s=%s", key, want, key, have),
			})
		}
	}
	if offered := node.GetInfo().GetRuntimes(); n.runtime != "" && !slices.Contains(offered, n.runtime) {
		has := strings.Join(offered, ", ")
		if has == "" {
			has = "none"
		}
		out = append(out, refusal{
			"without runtime " + n.runtime,
			fmt.Sprintf("runtime %s is wanted, node offers %s (wasmatrix doctor says there why)", n.runtime, has),
		})
	}
	return out
}

// matches is mismatches without the words; it runs for every node and class.
func (n *needs) matches(node *pb.Node) bool {
	if !fsm.Schedulable(node) ||
		n.pin != "" && n.pin != node.GetId() || n.home != "" && n.home != node.GetId() ||
		n.runtime != "" && !slices.Contains(node.GetInfo().GetRuntimes(), n.runtime) {
		return false
	}
	for key, want := range n.labels {
		if have, ok := labelOf(node, key); !ok || have != want {
			return false
		}
	}
	return true
}

// runtimeOn returns what a node tells of the runtime that n would run in there;
// nil when the node does not offer it, and for what needs none.
func (n *needs) runtimeOn(node *pb.Node) *pb.RuntimeInfo {
	if !n.slot {
		return nil
	}
	for _, offered := range node.GetInfo().GetRuntimeInfo() {
		if offered.GetName() == n.runtime || n.runtime == "" && offered.GetIsDefault() {
			return offered
		}
	}
	if n.runtime != "" && slices.Contains(node.GetInfo().GetRuntimes(), n.runtime) {
		return &pb.RuntimeInfo{Name: n.runtime} // an agent that does not tell more
	}
	return nil
}

// labelOf returns a node's label; one set by an operator wins over the node's own.
func labelOf(node *pb.Node, key string) (string, bool) {
	if value, ok := node.GetLabels()[key]; ok {
		return value, true
	}
	value, ok := node.GetInfo().GetLabels()[key]
	return value, ok
}
