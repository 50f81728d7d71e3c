package sim

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/wasmatrix/wasmatrix/test/register"
)

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
func (h *history) add(client int, in register.Input, out register.Output, called int64) {
	if out.Outcome == register.Failed {
		return
	}
	returned := h.now()
	if out.Outcome == register.Unknown {
		returned = forever
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: called, Output: out, Return: returned})
}

// judge checks that some order explains what all clients saw.
func (h *history) judge() {
	h.mu.Lock()
	ops := slices.Clone(h.ops)
	h.mu.Unlock()
	// The check runs in real time, outside of the world's; it needs no clock.
	for _, part := range register.Model().Partition(ops) {
		if porcupine.CheckOperations(register.Model(), part) {
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
		in, out := register.As[register.Input](o.Input), register.As[register.Output](o.Output)
		until := "never"
		if o.Return != forever {
			until = time.Duration(o.Return).String()
		}
		fmt.Fprintf(&text, "  client %d %s %s value %d, from %s to %s: %s value %d version %d\n",
			o.ClientId, in.Kind, in.Key, in.Value, time.Duration(o.Call), until, out.Outcome, out.Value, out.Version)
	}
	return text.String()
}
