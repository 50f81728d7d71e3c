package sim

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// oracle is the state as it must be: a state machine of its own that applies each
// command as soon as any peer has applied it, at that moment of virtual time.
// Every other peer is compared with it (I10), every acknowledged write is looked
// up in it (I9), and the invariants on generations and epochs are judged by it.
type oracle struct {
	world *World

	mu      sync.Mutex
	state   *fsm.State
	index   uint64
	entries map[uint64]entrySum
	hashes  map[uint64]string
	// views are the states at the last indexes.
	views map[uint64]fsm.View
	// acked are acknowledged writes that the oracle has not come to yet.
	acked map[uint64]string
	// requests are the indexes at which requests were done, by their ids.
	requests map[string]uint64
	// changed is closed and replaced when the index grows.
	changed chan struct{}
	// registry is what the log said of nodes and instances.
	registry registry
}

// entrySum tells log entries apart.
type entrySum struct {
	term uint64
	kind raft.LogType
	data string
	// id is the request id of a command.
	id string
}

func newOracle(w *World) *oracle {
	return &oracle{
		world: w, state: fsm.New(), entries: map[uint64]entrySum{}, hashes: map[uint64]string{}, views: map[uint64]fsm.View{},
		acked: map[uint64]string{}, requests: map[string]uint64{}, changed: make(chan struct{}), registry: newRegistry(),
	}
}

// follow compares one process with the oracle after each step of its, for as
// long as it lives.
func (o *oracle) follow(p *peerProcess) {
	var seen uint64
	for {
		view := p.peer.State().View()
		if !p.killed.Load() && view.Index() > seen {
			o.see(p.machine, view, seen)
		}
		seen = view.Index()
		select {
		case <-p.done:
			return
		case <-p.peer.Changed(seen):
		}
	}
}

// see takes in that a peer has applied everything up to the index of view.
func (o *oracle) see(m *peerMachine, view fsm.View, seen uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	grew := false
	for o.index < view.Index() {
		if !o.advanceLocked(m, o.index+1) {
			return
		}
		grew = true
	}
	if grew {
		close(o.changed)
		o.changed = make(chan struct{})
	}
	if want, ok := o.hashes[view.Index()]; ok && want != view.Hash() {
		o.world.violate("I10", "peer %s has state %.12s at index %d, the log gives %.12s\n%s", m.id, view.Hash(), view.Index(), want, o.differencesLocked(m, view, seen))
	}
	if e, ok := m.disk.entry(view.Index()); ok {
		if known, ok := o.entries[view.Index()]; ok && e.Term != known.term {
			o.world.violate("I10", "peer %s applied index %d of term %d, others had term %d there", m.id, view.Index(), e.Term, known.term)
		}
	}
}

// advanceLocked applies the next entry; m has applied it.
func (o *oracle) advanceLocked(m *peerMachine, index uint64) bool {
	e, ok := o.find(m, index)
	if !ok {
		o.world.violate("I9", "index %d was applied by peer %s and is on no disk", index, m.id)
		return false
	}
	if last, ok := o.entries[index-1]; ok && e.Term < last.term {
		o.world.violate("I9", "the term goes back from %d to %d at index %d", last.term, e.Term, index)
		return false
	}
	o.index = index
	sum := entrySum{term: e.Term, kind: e.Type, data: string(e.Data)}
	if e.Type == raft.LogCommand {
		cmd, err := fsm.DecodeCommand(e.Data)
		if err != nil {
			o.world.violate("I10", "peer %s applied index %d, which cannot be read: %v", m.id, index, err)
			return false
		}
		sum.id = cmd.GetRequestId()
		before := o.state.View()
		kind := cmd.GetPayload()
		// Apply takes the command over.
		result := o.state.Apply(index, cmd)
		o.world.counts.Commands.Add(1)
		o.judgeOnceLocked(index, sum.id, result)
		o.registry.take(o.world, before, o.state.View(), kind, result)
	}
	o.entries[index] = sum
	view := o.state.View()
	if view.Index() == index {
		o.hashes[index] = view.Hash()
		o.views[index] = view
	}
	delete(o.views, index-viewHorizon)
	delete(o.entries, index-horizon)
	delete(o.hashes, index-horizon)
	if id, ok := o.acked[index]; ok {
		delete(o.acked, index)
		o.judgeAckLocked(index, id)
	}
	return true
}

// judgeOnceLocked holds a request to having its effect once: whoever repeats it
// must get the answer, and with it the index, of the first.
func (o *oracle) judgeOnceLocked(index uint64, id string, result *pb.CommandResult) {
	if id == "" || result.GetError() != nil {
		return
	}
	first, repeated := o.requests[id]
	if repeated && result.GetIndex() != first {
		o.world.violate("I9", "the request %s was applied at index %d and again at index %d", id, first, index)
	}
	o.requests[id] = result.GetIndex()
}

// viewHorizon is how many states the oracle remembers.
const viewHorizon = 512

// differencesLocked says in which records a peer differs from the oracle, and
// which commands it has applied since it was compared last.
func (o *oracle) differencesLocked(m *peerMachine, view fsm.View, seen uint64) string {
	var text strings.Builder
	want, ok := o.views[view.Index()]
	p := m.proc.Load()
	if !ok || p == nil {
		return "no longer known in which records"
	}
	have, wanted := records(p.peer.State(), view), records(o.state, want)
	for _, line := range slices.Sorted(maps.Keys(have)) {
		if !wanted[line] {
			fmt.Fprintf(&text, "the peer has:    %s\n", line)
		}
	}
	for _, line := range slices.Sorted(maps.Keys(wanted)) {
		if !have[line] {
			fmt.Fprintf(&text, "the log gives:   %s\n", line)
		}
	}
	for i := max(seen, view.Index()-min(view.Index(), 20)); i <= view.Index(); i++ {
		e, known := o.entries[i]
		if !known || e.kind != raft.LogCommand {
			continue
		}
		if cmd, err := fsm.DecodeCommand([]byte(e.data)); err == nil {
			fmt.Fprintf(&text, "index %d, term %d: %.600s\n", i, e.term, prototext.Format(cmd))
		}
	}
	return text.String()
}

// records returns the records of a state as text.
func records(s *fsm.State, v fsm.View) map[string]bool {
	var snapshot bytes.Buffer
	if err := s.WriteSnapshot(v, &snapshot); err != nil {
		return map[string]bool{err.Error(): true}
	}
	out := map[string]bool{}
	in := bufio.NewReader(&snapshot)
	for {
		record := &pb.SnapshotRecord{}
		if err := protodelim.UnmarshalFrom(in, record); err != nil {
			return out
		}
		out[prototext.MarshalOptions{}.Format(record)] = true
	}
}

// horizon is how many entries the oracle remembers in full.
const horizon = 4096

// find looks for a committed entry: on the disk of the peer that applied it, or,
// while it is in that peer's memory or compacted there, on another's. What is
// committed has the highest term.
func (o *oracle) find(m *peerMachine, index uint64) (*raft.Log, bool) {
	var best *raft.Log
	for _, id := range slices.Sorted(maps.Keys(o.world.peers)) {
		e, ok := o.world.peers[id].disk.entry(index)
		if !ok {
			continue
		}
		if o.world.peers[id] == m {
			return e, true
		}
		if best == nil || e.Term > best.Term {
			best = e
		}
	}
	return best, best != nil
}

// ack takes in that a client was told that its write is committed at index.
func (o *oracle) ack(index uint64, requestID string) {
	if index == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if index > o.index {
		o.acked[index] = requestID
		return
	}
	o.judgeAckLocked(index, requestID)
}

func (o *oracle) judgeAckLocked(index uint64, requestID string) {
	e, ok := o.entries[index]
	if ok && e.id != requestID {
		o.world.violate("I9", "the write %s was acknowledged at index %d, where %q is committed", requestID, index, e.id)
	}
}

// lost returns the acknowledged writes beyond the end of the log.
func (o *oracle) lost() map[uint64]string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.acked)
}

// view returns the oracle's state.
func (o *oracle) view() fsm.View { return o.state.View() }

// at returns the index that the oracle has come to.
func (o *oracle) at() (index uint64, changed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.index, o.changed
}

// with runs f with what the log said of nodes and instances.
func (o *oracle) with(f func(*registry)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(&o.registry)
}

// registry is what the oracle keeps besides the present state: the past of nodes
// and generations.
type registry struct {
	// ended is when the end of a node's epoch was committed.
	ended map[epoch]time.Time
	// placed is when a generation of an instance was committed, and where.
	placed map[generation]placed
	// told are generations whose end their agent has reported.
	told map[generation]time.Time
	// started is when a guest of a generation was last started.
	started map[generation]time.Time
	// drainChanged is when a node was last drained, or not any more.
	drainChanged time.Time
}

type epoch struct {
	node  string
	epoch uint64
}

type generation struct {
	instance string
	created  uint64
	number   uint64
}

type placed struct {
	at    time.Time
	where epoch
}

func newRegistry() registry {
	return registry{ended: map[epoch]time.Time{}, placed: map[generation]placed{}, told: map[generation]time.Time{}, started: map[generation]time.Time{}}
}

func (g generation) String() string { return fmt.Sprintf("generation %d of %s", g.number, g.instance) }

// take judges one command by what it changed.
func (r *registry) take(w *World, before, after fsm.View, payload any, result *pb.CommandResult) {
	now := time.Now()
	switch c := payload.(type) {
	case *pb.Command_DrainNode:
		r.drainChanged = now
	case *pb.Command_ExpireNode:
		r.nodeChanged(w, now, before, after, c.ExpireNode.GetNodeId(), true)
	case *pb.Command_RegisterNode:
		r.nodeChanged(w, now, before, after, c.RegisterNode.GetInfo().GetId(), false)
	case *pb.Command_ReportStatus:
		if result.GetError() != nil {
			return
		}
		for _, report := range c.ReportStatus.GetInstances() {
			r.reported(now, before, report)
		}
	}
	r.placements(w, now, after, payload)
}

// nodeChanged notes the end of an epoch.
func (r *registry) nodeChanged(w *World, now time.Time, before, after fsm.View, id string, expired bool) {
	was, ok := before.Node(id)
	if !ok {
		return
	}
	is, _ := after.Node(id)
	e := epoch{id, was.GetEpoch()}
	if _, over := r.ended[e]; over || fsm.Ready(is) && is.GetEpoch() == was.GetEpoch() {
		return
	}
	r.ended[e] = now
	w.note("epoch %d of node %s ends, expired=%t", e.epoch, id, expired)
	if expired {
		w.counts.Expiries.Add(1)
		w.judgeExpiry(e, now)
	}
}

// reported notes that a generation has ended by the word of its agent.
func (r *registry) reported(now time.Time, before fsm.View, report *pb.InstanceReport) {
	in, ok := before.Instance(report.GetInstanceId())
	if ok && fsm.Final(report.GetStatus().GetState()) {
		r.told[generation{in.GetId(), in.GetCreatedIndex(), report.GetStatus().GetGeneration()}] = now
	}
}

// placements judges new generations (I3): each must come after the end of the
// epoch in which the one before it was placed, or after the word of its agent.
func (r *registry) placements(w *World, now time.Time, after fsm.View, payload any) {
	var ids []string
	switch c := payload.(type) {
	case *pb.Command_Place:
		for _, d := range c.Place.GetDecisions() {
			ids = append(ids, d.GetInstanceId())
		}
	case *pb.Command_RegisterNode:
		for _, in := range after.InstancesByNode(nil, c.RegisterNode.GetInfo().GetId()) {
			ids = append(ids, in.GetId())
		}
	case *pb.Command_RestartInstances:
		ids = c.RestartInstances.GetInstanceIds()
	}
	for _, id := range ids {
		is, ok := after.Instance(id)
		if id == "" || !ok || is.GetPlacement().GetGeneration() == 0 {
			continue
		}
		g := generation{id, is.GetCreatedIndex(), is.GetPlacement().GetGeneration()}
		if _, known := r.placed[g]; known || !fsm.Placed(is) {
			continue
		}
		r.placed[g] = placed{at: now, where: epoch{is.GetPlacement().GetNodeId(), is.GetPlacement().GetNodeEpoch()}}
		last := g
		for last.number--; last.number > 0; last.number-- {
			if p, ok := r.placed[last]; ok {
				r.judgeReplacement(w, g, last, p)
				break
			}
		}
	}
}

func (r *registry) judgeReplacement(w *World, next, last generation, p placed) {
	_, told := r.told[last]
	_, over := r.ended[p.where]
	if !told && !over {
		w.violate("I3", "%s was committed while generation %d may run on node %s: neither its end nor that of epoch %d is committed",
			next, last.number, p.where.node, p.where.epoch)
	}
}
