package chaos

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/anishathalye/porcupine"
)

// kind is what an operation does to the record of its key.
type kind int

const (
	get kind = iota
	register
	update
	deregister
)

func (k kind) String() string { return [...]string{"get", "register", "update", "deregister"}[k] }

// outcome is what the caller of an operation was told.
type outcome int

const (
	ok outcome = iota
	// exists: refused, because the key has a record.
	exists
	// absent: refused, because the key has none.
	absent
	// unknown: nobody told whether it was done, or will be.
	unknown
	// failed: it was not done and never will be. It has no place in the history.
	failed
)

func (o outcome) String() string {
	return [...]string{"ok", "exists", "absent", "unknown", "failed"}[o]
}

// input is an operation on one key.
type input struct {
	Kind  kind
	Key   string
	Value int
}

// output is the answer to an operation; Value and Version are those of a get that is ok.
type output struct {
	Outcome outcome
	Value   int
	Version uint64
}

// record is the state of one key. Version counts its writes since it was
// registered, so that a write that is applied twice shows.
type record struct {
	Exists  bool
	Value   int
	Version uint64
}

// step says whether an operation with that answer may come next, and what it leaves.
func step(s record, in input, out output) (bool, record) {
	if in.Kind == get {
		if out.Outcome == absent {
			return !s.Exists, s
		}
		return s.Exists && out.Value == s.Value && out.Version == s.Version, s
	}
	next := s
	refusal := absent
	switch in.Kind {
	case register:
		refusal, next = exists, record{Exists: true, Value: in.Value, Version: 1}
	case update:
		next.Value, next.Version = in.Value, s.Version+1
	default:
		next = record{}
	}
	applies := s.Exists == (refusal == absent)
	switch {
	case out.Outcome == unknown && !applies:
		return true, s
	case out.Outcome == unknown, out.Outcome == ok:
		return applies, next
	default:
		return out.Outcome == refusal && !applies, s
	}
}

// model is the registry of providers as far as the operations see it: each key on its own.
func model() porcupine.Model {
	return porcupine.Model{
		Partition: byKey,
		Init:      func() any { return record{} },
		Step: func(state, in, out any) (bool, any) {
			return step(as[record](state), as[input](in), as[output](out))
		},
		Hash: func(state any) uint64 {
			s := as[record](state)
			return uint64(s.Value)<<20 ^ s.Version
		},
		DescribeOperation: func(in, out any) string {
			i, o := as[input](in), as[output](out)
			text := i.Kind.String() + " " + i.Key
			if i.Kind == register || i.Kind == update {
				text += fmt.Sprintf(" = %d", i.Value)
			}
			if i.Kind == get && o.Outcome == ok {
				return fmt.Sprintf("%s → %d, version %d", text, o.Value, o.Version)
			}
			return text + " → " + o.Outcome.String()
		},
		DescribeState: func(state any) string {
			s := as[record](state)
			if !s.Exists {
				return "absent"
			}
			return fmt.Sprintf("%d, version %d", s.Value, s.Version)
		},
	}
}

// as returns what the checker, which knows no types, hands back.
func as[T any](v any) T {
	t, _ := v.(T)
	return t
}

// byKey splits a history, because what happens to one key says nothing of another.
func byKey(history []porcupine.Operation) [][]porcupine.Operation {
	keys := map[string][]porcupine.Operation{}
	for _, op := range history {
		key := as[input](op.Input).Key
		keys[key] = append(keys[key], op)
	}
	var out [][]porcupine.Operation
	for _, ops := range keys {
		out = append(out, ops)
	}
	slices.SortFunc(out, func(a, b []porcupine.Operation) int {
		return cmp.Compare(as[input](a[0].Input).Key, as[input](b[0].Input).Key)
	})
	return out
}
