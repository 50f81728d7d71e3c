package sim

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// kind is what an operation does to a register.
type kind int

const (
	get kind = iota
	create
	update
	remove
)

func (k kind) String() string { return [...]string{"get", "create", "update", "remove"}[k] }

// outcome is what the caller of an operation was told.
type outcome int

const (
	done outcome = iota
	// exists and absent are refusals: the register was there, or was not.
	exists
	absent
	// unknown: nobody told whether it was done, or will be.
	unknown
	// failed: it was not done and never will be. It has no place in a history.
	failed
)

func (o outcome) String() string {
	return [...]string{"done", "exists", "absent", "unknown", "failed"}[o]
}

// input is an operation on one register.
type input struct {
	Kind   kind
	Key    string
	Value  uint64
	Client int
}

// output is its answer; Value and Version are those of a get that is done.
type output struct {
	Outcome        outcome
	Value, Version uint64
}

// register is the state of one key. Version counts its writes since it was
// created, so that a write that was applied twice shows.
type register struct {
	There          bool
	Value, Version uint64
}

// step says whether an operation with that answer may come next, and what it leaves.
func step(s register, in input, out output) (bool, register) {
	if in.Kind == get {
		if out.Outcome == absent {
			return !s.There, s
		}
		return s.There && out.Value == s.Value && out.Version == s.Version, s
	}
	next, refusal := register{}, absent
	switch in.Kind {
	case create:
		refusal, next = exists, register{There: true, Value: in.Value, Version: 1}
	case update:
		next = register{There: true, Value: in.Value, Version: s.Version + 1}
	case get, remove:
	}
	applies := s.There == (refusal == absent)
	switch {
	case out.Outcome == unknown && !applies:
		return true, s
	case out.Outcome == unknown, out.Outcome == done:
		return applies, next
	default:
		return out.Outcome == refusal && !applies, s
	}
}

// model is all registers, each on its own.
func model() porcupine.Model {
	return porcupine.Model{
		Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
			by := map[string][]porcupine.Operation{}
			for _, o := range all {
				if in, ok := o.Input.(input); ok {
					by[in.Key] = append(by[in.Key], o)
				}
			}
			var out [][]porcupine.Operation
			for _, ops := range by {
				out = append(out, ops)
			}
			return out
		},
		Init: func() any { return register{} },
		Step: func(state, in, out any) (bool, any) {
			s, _ := state.(register)
			i, _ := in.(input)
			o, _ := out.(output)
			return step(s, i, o)
		},
		Equal: func(a, b any) bool { return a == b },
	}
}

// forever is the return of an operation that nobody answered.
const forever = int64(1) << 62

// history is what clients saw of the registers in one round.
type history struct {
	world *World

	mu  sync.Mutex
	ops []porcupine.Operation
}

func newHistory(w *World) *history { return &history{world: w} }

func (h *history) now() int64 { return int64(time.Since(h.world.began)) }

func (h *history) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = nil
}

// add records an operation that began at called.
func (h *history) add(in input, out output, called int64) {
	if out.Outcome == failed {
		return
	}
	returned := h.now()
	if out.Outcome == unknown {
		returned = forever
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: in.Client, Input: in, Call: called, Output: out, Return: returned})
}

// judge checks that some order explains what all clients saw.
func (h *history) judge() {
	h.mu.Lock()
	ops := slices.Clone(h.ops)
	h.mu.Unlock()
	// The check runs in real time, outside of the world's; it needs no clock.
	for _, part := range model().Partition(ops) {
		if porcupine.CheckOperations(model(), part) {
			h.world.counts.Checked.Add(int64(len(part)))
			continue
		}
		h.world.violate("linearizable", "no order explains what the clients saw of one register:\n%s", describe(part))
		return
	}
}

// describe lists operations in the order of their calls.
func describe(ops []porcupine.Operation) string {
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	var text strings.Builder
	for _, o := range ops {
		in, _ := o.Input.(input)
		out, _ := o.Output.(output)
		until := "never"
		if o.Return != forever {
			until = time.Duration(o.Return).String()
		}
		fmt.Fprintf(&text, "  client %d %s %s value %d, from %s to %s: %s value %d version %d\n",
			in.Client, in.Kind, in.Key, in.Value, time.Duration(o.Call), until, out.Outcome, out.Value, out.Version)
	}
	return text.String()
}
