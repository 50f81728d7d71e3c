package provider

import (
	"context"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
)

// Call is one capability call as a provider gets it: authenticated and authorised.
type Call struct {
	// Instance is the calling instance's id; empty for a user's call.
	Instance string
	// Name is the calling workload's name, or the user's name.
	Name string
	// Generation is that of the instance's placement; 0 for a user's call.
	Generation uint64
	// Created is the Raft index at which the instance was accepted; 0 when not known.
	Created uint64
	// Bucket is the key-value bucket to work on, from the assignment.
	Bucket string
	// Operation is the imported function's name: "get".
	Operation string
	// Payload is the encoded request message; valid only during the call.
	Payload []byte
	// Permissions are what the instance was granted on this provider, as the serving
	// side's own directory knows them; empty for a user, who may do everything.
	Permissions permission.Set

	admission admission
}

// Provider serves the calls of one capability. It is safe for concurrent use.
//
// Of any instance at most one generation may have effects, and never an older one
// after a newer one. So a provider asks Call.Admit where the effect happens, keeps
// the newest Call.Mark of each instance that it let through, and refuses older
// ones with Superseded, all in one critical section or transaction. One that
// keeps its data on disk keeps the marks there too, and one whose replicas share a
// backend keeps them in the backend: calls of one instance may go to any replica.
type Provider interface {
	// Invoke serves one call and returns the encoded response message, which
	// belongs to the caller. Its errors wrap the sentinels of this package. ctx
	// ends at the latest some time after the provider was asked to stop.
	Invoke(ctx context.Context, call Call) ([]byte, error)
	// Close waits for calls under way, frees everything, and makes later calls
	// fail with ErrUnavailable.
	Close() error
}

// Config is what a provider is opened with.
type Config struct {
	// ID is the provider's id.
	ID string
	// Driver names the driver; empty means the kind's default.
	Driver string
	// Settings are the driver's settings; an unknown one is an error.
	Settings map[string]string
	// Dir is a directory of the provider's own on the node's disk; it may not exist yet.
	Dir string
	// StopGrace is how long calls in flight may go on once another configuration
	// replaces this one; 0 means DefaultStopGrace.
	StopGrace time.Duration
	// Node is the id of the node that opens it; empty when not known.
	Node string
	// Messages is what a messaging provider gets from its node; nil for other kinds.
	Messages Messages
}

// DefaultStopGrace is how long calls in flight may go on when their provider stops.
const DefaultStopGrace = 10 * time.Second

// Demand is what a request asks for.
type Demand struct {
	// Provider is the id of the provider that it names, or "" for the only one granted.
	Provider string
	// Need is the permission that it needs.
	Need permission.Need
}

// Kind knows one type of provider without running one.
type Kind interface {
	// Type is the capability's name, and but for "provider", which providers of
	// type "external" serve, the provider type too: "kv".
	Type() string
	// Demand checks that the request is well-formed and returns what it asks for. It
	// fails with ErrInvalid.
	Demand(operation string, payload []byte) (Demand, error)
	// Open opens a provider; its Close ends what Open started. Its errors say
	// which setting is wrong and how to mend it.
	Open(ctx context.Context, cfg Config) (Provider, error)
}

// Repeatable is an optional ability of a Kind: to tell which operations may be
// carried out twice with the same effect as once, so that one whose answer was
// lost can be sent again. Without it none are.
type Repeatable interface {
	Repeatable(operation string) bool
}

// Overlapping is an optional ability of a Kind: to tell whether a provider may be
// open with two configurations at the same time, as one may that keeps nothing on
// its node. An update then opens the new one before it closes the old one, so that
// no call waits. Without it the old one is closed first.
type Overlapping interface {
	Overlapping(old, next Config) bool
}
