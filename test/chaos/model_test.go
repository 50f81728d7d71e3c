package chaos

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// op is an operation from call to back on the key "k"; back 0 means that its
// outcome stayed unknown.
func op(call, back int64, k kind, value int, out output) porcupine.Operation {
	if back == 0 {
		back, out = forever, output{Outcome: unknown}
	}
	return porcupine.Operation{Input: input{Kind: k, Key: "k", Value: value}, Call: call, Output: out, Return: back}
}

// TestTheCheckerTellsGoodFromBad shows that the checker accepts what a registry
// may do and refuses each kind of damage.
func TestTheCheckerTellsGoodFromBad(t *testing.T) {
	done, none, taken := output{}, output{Outcome: absent}, output{Outcome: exists}
	saw := func(value int, version uint64) output { return output{Value: value, Version: version} }
	for _, tc := range []struct {
		name    string
		history []porcupine.Operation
		want    bool
	}{
		{"write, then read", []porcupine.Operation{op(1, 2, register, 7, done), op(3, 4, get, 0, saw(7, 1))}, true},
		{"a lost write", []porcupine.Operation{op(1, 2, register, 7, done), op(3, 4, get, 0, none)}, false},
		{"a lost update", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 4, update, 8, done), op(5, 6, get, 0, saw(7, 1)),
		}, false},
		{"a stale read", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 6, update, 8, done), op(4, 5, get, 0, saw(8, 2)), op(7, 8, get, 0, saw(7, 1)),
		}, false},
		{"a read during a write sees either", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 9, update, 8, done), op(4, 5, get, 0, saw(7, 1)), op(6, 7, get, 0, saw(8, 2)),
		}, true},
		{"an update applied twice", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 4, update, 8, done), op(5, 6, get, 0, saw(8, 3)),
		}, false},
		{"a registration that was told to be refused and is there", []porcupine.Operation{
			op(1, 2, register, 7, taken), op(3, 4, get, 0, saw(7, 1)),
		}, false},
		{"an unknown write that comes much later", []porcupine.Operation{
			op(1, 0, register, 7, done), op(2, 3, get, 0, none), op(4, 5, get, 0, none), op(6, 7, get, 0, saw(7, 1)),
		}, true},
		{"an unknown write that never comes", []porcupine.Operation{op(1, 0, register, 7, done), op(2, 3, get, 0, none)}, true},
		{"an unknown write that comes twice", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 0, update, 8, done), op(4, 5, get, 0, saw(8, 2)), op(6, 7, get, 0, saw(8, 3)),
		}, false},
		{"an unknown removal that goes back on itself", []porcupine.Operation{
			op(1, 2, register, 7, done), op(3, 0, deregister, 0, done), op(4, 5, get, 0, none), op(6, 7, get, 0, saw(7, 1)),
		}, false},
		{"two registrations of which one is refused", []porcupine.Operation{
			op(1, 4, register, 7, taken), op(2, 3, register, 8, done), op(5, 6, get, 0, saw(8, 1)),
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := porcupine.CheckOperations(model(), tc.history); got != tc.want {
				t.Errorf("linearizable: %v, want %v", got, tc.want)
			}
		})
	}
}
