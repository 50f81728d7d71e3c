package sim

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// effect is one write that a provider accepted from a guest.
type effect struct {
	who generation
	// store is the provider and, when its data does not outlive its process, which
	// process; version orders the writes of one store.
	store   string
	version uint64
	at      time.Time
}

// span is what is known of the effects of one generation.
type span struct {
	firstVersion, lastVersion uint64
	first, last               time.Time
}

func (s *span) add(e effect) {
	if s.first.IsZero() {
		*s = span{e.version, e.version, e.at, e.at}
		return
	}
	s.firstVersion, s.lastVersion = min(s.firstVersion, e.version), max(s.lastVersion, e.version)
	s.last = e.at
}

// incarnation is one instance, told from a later one of the same id.
type incarnation struct {
	instance string
	created  uint64
}

// effects are all accepted effects, by who and where.
type effects struct {
	mu sync.Mutex
	// byStore are the spans of generations in one store, everywhere those in all.
	byStore    map[string]map[incarnation]map[uint64]*span
	everywhere map[incarnation]map[uint64]*span
}

func newEffects() *effects {
	return &effects{byStore: map[string]map[incarnation]map[uint64]*span{}, everywhere: map[incarnation]map[uint64]*span{}}
}

// effect records an accepted write and judges it.
func (w *World) effect(e effect) {
	w.counts.Effects.Add(1)
	w.effects.mu.Lock()
	who := incarnation{e.who.instance, e.who.created}
	if w.effects.byStore[e.store] == nil {
		w.effects.byStore[e.store] = map[incarnation]map[uint64]*span{}
	}
	here := spanOf(w.effects.byStore[e.store], who, e)
	anywhere := spanOf(w.effects.everywhere, who, e)
	w.effects.mu.Unlock()
	w.judgeOrder(e, here)
	w.judgeOwner(e, anywhere)
}

// spanOf adds e to the spans of its instance and returns them all.
func spanOf(all map[incarnation]map[uint64]*span, who incarnation, e effect) map[uint64]span {
	if all[who] == nil {
		all[who] = map[uint64]*span{}
	}
	if all[who][e.who.number] == nil {
		all[who][e.who.number] = &span{}
	}
	all[who][e.who.number].add(e)
	out := make(map[uint64]span, len(all[who]))
	for g, s := range all[who] {
		out[g] = *s
	}
	return out
}

// judgeOrder holds the generations in one store apart (I1) and in order (I2).
func (w *World) judgeOrder(e effect, spans map[uint64]span) {
	mine := spans[e.who.number]
	for g, s := range spans {
		switch {
		case g < e.who.number && s.lastVersion > mine.firstVersion:
			w.violate("I1", "the effects of generations %d and %d of %s overlap at %s", g, e.who.number, e.who.instance, e.store)
		case g > e.who.number && s.firstVersion < e.version:
			w.violate("I2", "%s had an effect at %s after generation %d", e.who, e.store, g)
		}
	}
}

// judgeOwner judges an effect by what the log says of its generation. An instance
// that is tied to the lease of its node must not have effects after the node's own
// deadline (I4), and so none anywhere after a newer generation (I1).
func (w *World) judgeOwner(e effect, spans map[uint64]span) {
	in, known := w.oracle.view().Instance(e.who.instance)
	if !known || in.GetSpec().GetOnDisconnect() != "stop" {
		return
	}
	for g, s := range spans {
		if g > e.who.number && s.first.Before(e.at) || g < e.who.number && s.last.After(spans[e.who.number].first) {
			w.violate("I1", "generations %d and %d of %s, which stops without its lease, both had effects at the same time", g, e.who.number, e.who.instance)
		}
	}
	var where placed
	var ok bool
	w.oracle.with(func(r *registry) { where, ok = r.placed[e.who] })
	if !ok {
		return
	}
	node := w.workers[where.where.node]
	if node == nil {
		return
	}
	if at, held := node.deadline(where.where.epoch); held && e.at.After(at) {
		w.violate("I4", "%s had an effect %s after the own deadline of node %s", e.who, e.at.Sub(at), node.id)
	}
}

// judgeStart holds every start of a guest to what is committed (I3).
func (w *World) judgeStart(m *workerMachine, spec runtime.Spec) {
	w.note("%s starts generation %d of %s", m.id, spec.Generation, spec.InstanceID)
	in, known := w.oracle.view().Instance(spec.InstanceID)
	if known && in.GetPlacement().GetGeneration() < spec.Generation {
		w.violate("I3", "agent %s started generation %d of %s, committed is %d", m.id, spec.Generation, spec.InstanceID, in.GetPlacement().GetGeneration())
	}
	if known {
		w.judgeReplaced(generation{spec.InstanceID, in.GetCreatedIndex(), spec.Generation})
	}
}

// replacedWithin is how long after the crash of its node an instance may be away
// while nothing else is wrong.
const replacedWithin = 4500 * time.Millisecond

// judgeReplaced times the replacement of an instance whose node has crashed (I6).
func (w *World) judgeReplaced(g generation) {
	last := g
	last.number--
	var was placed
	var ok, again bool
	var drain time.Time
	w.oracle.with(func(r *registry) {
		was, ok = r.placed[last]
		_, again = r.started[g]
		r.started[g] = time.Now()
		drain = r.drainChanged
	})
	if !ok || again || w.draining() || w.restarted(g.instance) {
		return
	}
	crashed, alone := w.troubles.crashedAlone(was.where.node)
	if !alone || was.at.After(crashed) || drain.After(crashed) {
		return
	}
	w.counts.Replaced.Add(1)
	if away := time.Since(crashed); away > replacedWithin {
		w.violate("I6", "%s starts %s after its node crashed", g, away)
	}
}

// judgeStop asks why a guest is stopped: the loss of the control plane is no
// reason for one that is to be kept (I7).
func (w *World) judgeStop(m *workerMachine, spec runtime.Spec) {
	w.note("%s stops generation %d of %s", m.id, spec.Generation, spec.InstanceID)
	in, known := w.oracle.view().Instance(spec.InstanceID)
	if !known || in.GetSpec().GetOnDisconnect() == "stop" || !in.GetDesiredRunning() || in.GetLeaving() {
		return
	}
	p := in.GetPlacement()
	if p.GetGeneration() != spec.Generation || p.GetNodeId() != m.id || !fsm.Placed(in) {
		return
	}
	if w.restarted(spec.InstanceID) {
		return
	}
	w.violate("I7", "agent %s stopped generation %d of %s, which is wanted there", m.id, spec.Generation, spec.InstanceID)
}

// judgeRenewal holds a renewal that a leader began to handle at began, and
// accepted, to the log (I5).
func (w *World) judgeRenewal(e epoch, began time.Time) {
	var over time.Time
	w.oracle.with(func(r *registry) { over = r.ended[e] })
	if !over.IsZero() && over.Before(began) {
		w.violate("I5", "a renewal of epoch %d of node %s was accepted; it came %s after the end of that epoch was committed", e.epoch, e.node, began.Sub(over))
	}
}

// judgeExpiry holds the end of a lease to the node's own deadline, which must
// have passed, and to the reason for it (I8): a node that nothing was wrong with
// is not expired because the leader changed.
func (w *World) judgeExpiry(e epoch, now time.Time) {
	node := w.workers[e.node]
	if node == nil {
		return
	}
	if at, held := node.deadline(e.epoch); held && at.After(now) {
		w.violate("I3", "epoch %d of node %s was expired %s before the node's own deadline", e.epoch, e.node, at.Sub(now))
	}
	if w.troubles.onlyLeaderChanges(now) && node.proc.Load() != nil {
		w.violate("I8", "node %s was expired, and nothing was wrong with it but that leaders changed", e.node)
	}
}

// judgeEnd asks why a peer ended by itself: a disk that failed is a reason.
func (w *World) judgeEnd(m *peerMachine, err error) {
	switch {
	case w.closing.Load():
	case errors.Is(err, cluster.ErrCorrupt):
		if !w.troubles.damaged(m.id) {
			w.violate("I10", "peer %s finds its files damaged, and nobody has damaged them: %v; its disk has %s", m.id, err, m.disk.describe())
		}
		w.note("the files of peer %s are set aside", m.id)
		m.disk.wipe()
	case cluster.IsDiskFailure(err) && w.troubles.disk(m.id):
	case err == nil && !w.wanted(m.id):
	default:
		w.violate("I10", "peer %s ended by itself: %v", m.id, err)
	}
}

// restarted reports whether a user has ever asked for a new start of an instance.
func (w *World) restarted(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.restarts[id].IsZero()
}

// draining reports whether a node takes no instances because it is drained.
func (w *World) draining() bool {
	return slices.ContainsFunc(w.oracle.view().Nodes(nil), func(n *pb.Node) bool { return n.GetDraining() })
}

// settledInstance reports whether an instance is as it is wanted.
func settledInstance(in *pb.Instance) bool {
	if fsm.Ended(in) {
		return true
	}
	if !in.GetDesiredRunning() {
		return in.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_STOPPED
	}
	return in.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_RUNNING && in.GetStatus().GetGeneration() == in.GetPlacement().GetGeneration()
}
