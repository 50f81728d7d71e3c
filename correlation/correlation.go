// Package correlation carries the id that ties together everything one request
// causes: API calls, Raft commands, capability calls, guest logs, events and
// errors. It imports nothing of wasmatrix.
package correlation

import (
	"context"

	"github.com/google/uuid"
)

// Header is the gRPC metadata key and HTTP header that carries the id.
const Header = "x-correlation-id"

// maxLength is the longest id taken from a caller, in bytes.
const maxLength = 128

type key struct{}

// New makes an id: a time-ordered UUID (version 7).
func New() string {
	return uuid.Must(uuid.NewV7()).String()
}

// With returns a context that carries id. An id that is not Valid is replaced by a new one.
func With(ctx context.Context, id string) context.Context {
	if !Valid(id) {
		id = New()
	}
	return context.WithValue(ctx, key{}, id)
}

// ID returns the id that ctx carries, or "".
func ID(ctx context.Context) string {
	id, _ := ctx.Value(key{}).(string)
	return id
}

// Ensure returns a context that carries an id, and that id; it makes one when ctx has none.
func Ensure(ctx context.Context) (context.Context, string) {
	if id := ID(ctx); id != "" {
		return ctx, id
	}
	id := New()
	return context.WithValue(ctx, key{}, id), id
}

// Valid reports whether id can be taken from a caller: 1 to 128 bytes of
// printable ASCII without spaces.
func Valid(id string) bool {
	if id == "" || len(id) > maxLength {
		return false
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return false
		}
	}
	return true
}
