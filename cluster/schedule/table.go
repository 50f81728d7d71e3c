package schedule

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/hashicorp/go-memdb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// State is what a placement is computed from; fsm.View satisfies it.
type State interface {
	// Nodes returns all nodes in the order of their ids.
	Nodes(ws memdb.WatchSet) []*pb.Node
	// InstancesByNode returns the instances placed on a node.
	InstancesByNode(ws memdb.WatchSet, nodeID string) []*pb.Instance
	// ProvidersByNode returns the providers placed on a node.
	ProvidersByNode(ws memdb.WatchSet, nodeID string) []*pb.Provider
}

// nodeLoad is a node with what is placed on it, decisions of this batch included.
type nodeLoad struct {
	node      *pb.Node
	instances uint64
	memory    uint64
	providers uint64
	replicas  map[string]int
	// hosts counts the replicas of each provider, stopped ones too: they stay.
	hosts map[string]int
	// watch fires when what is placed on the node changes.
	watch memdb.WatchSet
	// charged is true once a decision was added that the registry may not hold.
	charged bool
}

// table is the load of all nodes. It outlives a batch: refresh reads again only
// the nodes that changed, so that a start costs what changed and not what runs.
type table struct {
	nodes []*nodeLoad
	byID  map[string]*nodeLoad
	// candidates holds the nodes that match a class of needs, by class.
	candidates map[string][]*nodeLoad
}

func newTable(state State) *table {
	t := &table{}
	t.refresh(state, nil)
	return t
}

// refresh brings t up to date and reports whether anything may be possible now
// that was not before: a node is new, another one than before, or has more room.
func (t *table) refresh(state State, ws memdb.WatchSet) bool {
	records := state.Nodes(ws)
	next := make([]*nodeLoad, len(records))
	byID := make(map[string]*nodeLoad, len(records))
	better := len(records) != len(t.nodes)
	for i, record := range records {
		had := t.byID[record.GetId()]
		switch {
		case had == nil:
			next[i], better = loadOf(state, record), true
		case had.charged || fired(had.watch):
			next[i] = loadOf(state, record)
			better = better || had.node != record || next[i].roomier(had)
		default:
			better = better || had.node != record
			had.node = record
			next[i] = had
		}
		byID[record.GetId()] = next[i]
	}
	t.nodes, t.byID, t.candidates = next, byID, map[string][]*nodeLoad{}
	return better
}

func loadOf(state State, record *pb.Node) *nodeLoad {
	l := &nodeLoad{node: record, replicas: map[string]int{}, hosts: map[string]int{}, watch: memdb.NewWatchSet()}
	for _, instance := range state.InstancesByNode(l.watch, record.GetId()) {
		if fsm.Occupies(instance) {
			l.add(instance)
		}
	}
	for _, provider := range state.ProvidersByNode(l.watch, record.GetId()) {
		l.hosts[provider.GetId()]++
		if provider.GetDesiredRunning() {
			l.providers++
		}
	}
	return l
}

// modified returns the modified index of a node's record; 0 for none.
func (t *table) modified(node string) uint64 {
	if l := t.byID[node]; l != nil {
		return l.node.GetModifiedIndex()
	}
	return 0
}

// watchRoom makes ws fire when what is placed on any node changes.
func (t *table) watchRoom(ws memdb.WatchSet) {
	for _, l := range t.nodes {
		for channel := range l.watch {
			ws.Add(channel)
		}
	}
}

// release takes an instance off the node that it occupies, for a question about
// where it could go.
func (t *table) release(instance *pb.Instance) {
	l := t.byID[instance.GetPlacement().GetNodeId()]
	if l == nil || !fsm.Occupies(instance) || l.instances == 0 {
		return
	}
	memory, _ := memoryOf(instance)
	l.instances--
	l.memory -= min(memory, l.memory)
	l.replicas[instance.GetName()]--
	l.charged = true
}

// releaseProvider is release for a replica of a provider.
func (t *table) releaseProvider(provider *pb.Provider) {
	l := t.byID[provider.GetPlacement().GetNodeId()]
	if l == nil || l.hosts[provider.GetId()] == 0 {
		return
	}
	l.hosts[provider.GetId()]--
	if provider.GetDesiredRunning() {
		l.providers--
	}
	l.charged = true
}

// charge adds a decision of this batch.
func (l *nodeLoad) charge(n *needs) {
	l.charged = true
	if !n.slot {
		l.providers++
		l.hosts[n.apart]++
		return
	}
	l.instances++
	l.memory += n.memory
	l.replicas[n.name]++
}

func (l *nodeLoad) add(instance *pb.Instance) {
	memory, _ := memoryOf(instance)
	l.instances++
	l.memory += memory
	l.replicas[instance.GetName()]++
}

func (l *nodeLoad) roomier(than *nodeLoad) bool {
	if l.instances < than.instances || l.memory < than.memory || l.providers < than.providers {
		return true
	}
	for id := range than.hosts {
		if l.hosts[id] < than.hosts[id] {
			return true
		}
	}
	return false
}

// candidatesFor returns the nodes that n may run on, room aside.
func (t *table) candidatesFor(n *needs) []*nodeLoad {
	candidates, known := t.candidates[n.class]
	if !known {
		for _, l := range t.nodes {
			if n.matches(l.node) {
				candidates = append(candidates, l)
			}
		}
		t.candidates[n.class] = candidates
	}
	return candidates
}

func (l *nodeLoad) fits(n *needs) bool {
	if !n.slot {
		return l.hosts[n.apart] == 0
	}
	capacity := l.node.GetInfo().GetCapacity()
	return l.instances < uint64(capacity.GetInstances()) &&
		n.memory <= capacity.GetMemoryBytes() && l.memory <= capacity.GetMemoryBytes()-n.memory
}

// load is the node's dominant share: the larger of the shares taken of its
// instance places and of its memory. For a provider each provider counts as an
// instance, so that providers spread over idle nodes too.
func (l *nodeLoad) load(n *needs) float64 {
	capacity := l.node.GetInfo().GetCapacity()
	taken := l.instances
	if !n.slot {
		taken += l.providers
	}
	return max(share(taken, uint64(capacity.GetInstances())), share(l.memory, capacity.GetMemoryBytes()))
}

func share(taken, capacity uint64) float64 {
	if capacity == 0 {
		return 1
	}
	return float64(taken) / float64(capacity)
}

// refusals tells why l cannot take n; none means it can.
func (l *nodeLoad) refusals(n *needs) []refusal {
	out := n.mismatches(l.node)
	if !n.slot {
		if l.hosts[n.apart] > 0 {
			out = append(out, refusal{
				"with another replica of it",
				fmt.Sprintf("another replica of provider %s is here, each needs a node of its own", n.apart),
			})
		}
		return out
	}
	capacity := l.node.GetInfo().GetCapacity()
	if l.instances >= uint64(capacity.GetInstances()) {
		out = append(out, refusal{
			"without room for one more instance",
			fmt.Sprintf("instances: %d of %d are taken", l.instances, capacity.GetInstances()),
		})
	}
	if total := capacity.GetMemoryBytes(); n.memory > total || l.memory > total-n.memory {
		want := humanBytes(n.memory)
		out = append(out, refusal{
			"without " + want + " of memory",
			fmt.Sprintf("memory: %s of %s are taken, %s are wanted",
				humanBytes(l.memory), humanBytes(total), want),
		})
	}
	return out
}

// describe tells the load of a node that can take n.
func (l *nodeLoad) describe(n *needs) []string {
	capacity := l.node.GetInfo().GetCapacity()
	out := []string{fmt.Sprintf("load %.0f %%: %d of %d instances, %s of %s of memory",
		100*l.load(n), l.instances, capacity.GetInstances(),
		humanBytes(l.memory), humanBytes(capacity.GetMemoryBytes()))}
	switch replicas := l.replicas[n.name]; {
	case !n.slot:
		out = append(out, fmt.Sprintf("it hosts %d providers", l.providers))
	case replicas == 1:
		out = append(out, "it runs 1 replica of "+n.name)
	case replicas > 1:
		out = append(out, fmt.Sprintf("it runs %d replicas of %s", replicas, n.name))
	}
	return out
}

// whyNone sums up, in words that stay the same while loads move, why no node
// takes n: each node counts with its first reason.
func (t *table) whyNone(n *needs) string {
	if len(t.nodes) == 0 {
		return "no node can take it: no node has registered"
	}
	counts := map[string]int{}
	var kinds []string
	for _, l := range t.nodes {
		refusals := l.refusals(n)
		if len(refusals) == 0 {
			continue
		}
		kind := refusals[0].kind
		if counts[kind] == 0 {
			kinds = append(kinds, kind)
		}
		counts[kind]++
	}
	parts := make([]string, len(kinds))
	for i, kind := range kinds {
		parts[i] = fmt.Sprintf("%d %s", counts[kind], kind)
	}
	return fmt.Sprintf("none of %d nodes can take it: %s", len(t.nodes), strings.Join(parts, ", "))
}

// humanBytes writes an amount of memory with one decimal at most: "3.9 GiB".
func humanBytes(n uint64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	value, unit := float64(n)/1024, 0
	for value >= 1024 && unit < len(units)-1 {
		value, unit = value/1024, unit+1
	}
	return strings.TrimSuffix(strconv.FormatFloat(value, 'f', 1, 64), ".0") + " " + units[unit]
}

func fired(ws memdb.WatchSet) bool {
	for channel := range ws {
		select {
		case <-channel:
			return true
		default:
		}
	}
	return false
}
