package register

import (
	"math"
	"testing"

	"github.com/anishathalye/porcupine"
)

// op is an operation from call to back on the key "k"; back 0 means that its
// outcome stayed unknown.
func op(call, back int64, k Kind, value uint64, out Output) porcupine.Operation {
	if back == 0 {
		back, out = math.MaxInt64, Output{Outcome: Unknown}
	}
	return porcupine.Operation{Input: Input{Kind: k, Key: "k", Value: value}, Call: call, Output: out, Return: back}
}

// TestTheCheckerTellsGoodFromBad shows that the checker accepts what a registry
// may do and refuses each kind of damage.
func TestTheCheckerTellsGoodFromBad(t *testing.T) {
	done, none, taken := Output{}, Output{Outcome: Absent}, Output{Outcome: Exists}
	saw := func(value, version uint64) Output { return Output{Value: value, Version: version} }
	for _, tc := range []struct {
		name    string
		history []porcupine.Operation
		want    bool
	}{
		{"write, then read", []porcupine.Operation{op(1, 2, Create, 7, done), op(3, 4, Get, 0, saw(7, 1))}, true},
		{"a lost write", []porcupine.Operation{op(1, 2, Create, 7, done), op(3, 4, Get, 0, none)}, false},
		{"a lost update", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 4, Update, 8, done), op(5, 6, Get, 0, saw(7, 1)),
		}, false},
		{"a stale read", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 6, Update, 8, done), op(4, 5, Get, 0, saw(8, 2)), op(7, 8, Get, 0, saw(7, 1)),
		}, false},
		{"a read during a write sees either", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 9, Update, 8, done), op(4, 5, Get, 0, saw(7, 1)), op(6, 7, Get, 0, saw(8, 2)),
		}, true},
		{"an update applied twice", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 4, Update, 8, done), op(5, 6, Get, 0, saw(8, 3)),
		}, false},
		{"a registration that was told to be refused and is there", []porcupine.Operation{
			op(1, 2, Create, 7, taken), op(3, 4, Get, 0, saw(7, 1)),
		}, false},
		{"an unknown write that comes much later", []porcupine.Operation{
			op(1, 0, Create, 7, done), op(2, 3, Get, 0, none), op(4, 5, Get, 0, none), op(6, 7, Get, 0, saw(7, 1)),
		}, true},
		{"an unknown write that never comes", []porcupine.Operation{op(1, 0, Create, 7, done), op(2, 3, Get, 0, none)}, true},
		{"an unknown write that comes twice", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 0, Update, 8, done), op(4, 5, Get, 0, saw(8, 2)), op(6, 7, Get, 0, saw(8, 3)),
		}, false},
		{"an unknown removal that goes back on itself", []porcupine.Operation{
			op(1, 2, Create, 7, done), op(3, 0, Remove, 0, done), op(4, 5, Get, 0, none), op(6, 7, Get, 0, saw(7, 1)),
		}, false},
		{"two registrations of which one is refused", []porcupine.Operation{
			op(1, 4, Create, 7, taken), op(2, 3, Create, 8, done), op(5, 6, Get, 0, saw(8, 1)),
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := porcupine.CheckOperations(Model(), tc.history); got != tc.want {
				t.Errorf("linearizable: %v, want %v", got, tc.want)
			}
		})
	}
}
