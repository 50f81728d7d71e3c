// Package register is the model, for the porcupine checker, of the registry of
// providers as a set of registers: one for each id, with create, update, remove
// and get, and answers whose outcome is unknown. The simulation and the tests
// with real processes judge their histories by it. It drives nothing itself.
package register

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/anishathalye/porcupine"
)

// Kind is what an operation does to the record of its key.
type Kind int

// The operations.
const (
	Get    Kind = iota // the present record
	Create             // makes the record, refused with Exists
	Update             // changes it, refused with Absent
	Remove             // removes it, refused with Absent
)

// String returns the operation's name.
func (k Kind) String() string { return [...]string{"get", "create", "update", "remove"}[k] }

// Outcome is what the caller of an operation was told.
type Outcome int

// The outcomes. One that failed was not done and never will be; it has no place
// in the history.
const (
	Done    Outcome = iota // it was done; of a get: there is a record
	Exists                 // refused, because the key has a record
	Absent                 // refused, because the key has none; of a get: there is none
	Unknown                // nobody told whether it was done, or will be
	Failed                 // it was not done
)

// String returns the outcome's name.
func (o Outcome) String() string {
	return [...]string{"done", "exists", "absent", "unknown", "failed"}[o]
}

// Input is an operation on one key.
type Input struct {
	Kind  Kind
	Key   string
	Value uint64
}

// Output is the answer to an operation; Value and Version are those of a get that is Done.
type Output struct {
	Outcome Outcome
	Value   uint64
	Version uint64
}

// record is the state of one key. Version counts its writes since it was
// created, so that a write that is applied twice shows.
type record struct {
	There   bool
	Value   uint64
	Version uint64
}

// step says whether an operation with that answer may come next, and what it leaves.
func step(s record, in Input, out Output) (bool, record) {
	if in.Kind == Get {
		if out.Outcome == Absent {
			return !s.There, s
		}
		return s.There && out.Value == s.Value && out.Version == s.Version, s
	}
	next := s
	refusal := Absent
	switch in.Kind {
	case Create:
		refusal, next = Exists, record{There: true, Value: in.Value, Version: 1}
	case Update:
		next.Value, next.Version = in.Value, s.Version+1
	default:
		next = record{}
	}
	applies := s.There == (refusal == Absent)
	switch {
	case out.Outcome == Unknown && !applies:
		return true, s
	case out.Outcome == Unknown, out.Outcome == Done:
		return applies, next
	default:
		return out.Outcome == refusal && !applies, s
	}
}

// Model is the registry of providers as far as the operations see it: each key on its own.
func Model() porcupine.Model {
	return porcupine.Model{
		Partition: byKey,
		Init:      func() any { return record{} },
		Step: func(state, in, out any) (bool, any) {
			return step(As[record](state), As[Input](in), As[Output](out))
		},
		Hash: func(state any) uint64 {
			s := As[record](state)
			return s.Value<<20 ^ s.Version
		},
		DescribeOperation: func(in, out any) string {
			i, o := As[Input](in), As[Output](out)
			text := i.Kind.String() + " " + i.Key
			if i.Kind == Create || i.Kind == Update {
				text += fmt.Sprintf(" = %d", i.Value)
			}
			if i.Kind == Get && o.Outcome == Done {
				return fmt.Sprintf("%s → %d, version %d", text, o.Value, o.Version)
			}
			return text + " → " + o.Outcome.String()
		},
		DescribeState: func(state any) string {
			s := As[record](state)
			if !s.There {
				return "absent"
			}
			return fmt.Sprintf("%d, version %d", s.Value, s.Version)
		},
	}
}

// As returns what the checker, which knows no types, hands back.
func As[T any](v any) T {
	t, _ := v.(T)
	return t
}

// byKey splits a history, because what happens to one key says nothing of another.
func byKey(history []porcupine.Operation) [][]porcupine.Operation {
	keys := map[string][]porcupine.Operation{}
	for _, op := range history {
		key := As[Input](op.Input).Key
		keys[key] = append(keys[key], op)
	}
	var out [][]porcupine.Operation
	for _, ops := range keys {
		out = append(out, ops)
	}
	slices.SortFunc(out, func(a, b []porcupine.Operation) int {
		return cmp.Compare(As[Input](a[0].Input).Key, As[Input](b[0].Input).Key)
	})
	return out
}
