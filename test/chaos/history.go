package chaos

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/wasmatrix/wasmatrix/test/register"
)

// forever is the return of an operation whose outcome stayed unknown: it may
// take effect at any later time.
const forever = math.MaxInt64

// checkWithin bounds the check of one history. An undecided history is a failure.
const checkWithin = 5 * time.Minute

// history records what all clients did, by one clock.
type history struct {
	began time.Time

	mu  sync.Mutex
	ops []porcupine.Operation
	// marks are what the nemesis did, for the reader of a failing history.
	marks []porcupine.Annotation
}

func newHistory() *history { return &history{began: time.Now()} }

func (h *history) now() int64 { return int64(time.Since(h.began)) }

// add records an operation of a client that began at call and has just ended.
// A get without an answer says nothing and is left out, as is what certainly was
// not done: if it was done all the same, others see what nobody wrote.
func (h *history) add(client int, in register.Input, out register.Output, call int64) {
	back := h.now()
	if out.Outcome == register.Failed {
		return
	}
	if out.Outcome == register.Unknown {
		if in.Kind == register.Get {
			return
		}
		back = forever
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: back})
}

// mark records a fault from its injection until now.
func (h *history) mark(what string, from int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.marks = append(h.marks, porcupine.Annotation{Tag: "nemesis", Start: from, End: h.now(), Description: what})
}

// errHistory is returned for a history that is not shown to be linearizable.
var errHistory = errors.New("the history is not linearizable")

// check checks the history. One that fails is written to dir with the picture
// that shows where.
func (h *history) check(dir, name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	ops := h.closed()
	result := porcupine.CheckOperationsTimeout(register.Model(), ops, checkWithin)
	if result == porcupine.Ok {
		return nil
	}
	err := fmt.Errorf("%w: the checker says %q", errHistory, result)
	_, info := porcupine.CheckOperationsVerbose(register.Model(), ops, checkWithin)
	info.AddAnnotations(h.marks)
	if e := h.write(dir, name, info); e != nil {
		return errors.Join(err, e)
	}
	return fmt.Errorf("%w; see %s and the .json beside it", err, filepath.Join(dir, name+".html"))
}

// closed returns the operations with the open ones ending after all others, which
// is as good as never and can be drawn. The caller holds h.mu.
func (h *history) closed() []porcupine.Operation {
	ops, end := slices.Clone(h.ops), h.now()
	for i := range ops {
		ops[i].Return = min(ops[i].Return, end)
	}
	return ops
}

func (h *history) write(dir, name string, info porcupine.LinearizationInfo) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the history: %w", err)
	}
	picture := porcupine.VisualizePath(register.Model(), info, filepath.Join(dir, name+".html"))
	ops := slices.Clone(h.ops)
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	raw, err := json.MarshalIndent(struct {
		Operations []porcupine.Operation
		Faults     []porcupine.Annotation
	}{ops, h.marks}, "", " ")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".json"), raw, 0o600)
	}
	return errors.Join(picture, err)
}
