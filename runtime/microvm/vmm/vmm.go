// Package vmm is the contract of a driver of virtual machines: what the executor
// in package microvm asks of QEMU, and could ask of another monitor.
//
// It imports nothing of wasmatrix.
package vmm

import (
	"context"
	"errors"
	"io"
)

// ErrUnavailable means that this node cannot run virtual machines. The message says
// why and what to do.
var ErrUnavailable = errors.New("no virtual machines on this node")

// Isolation says what keeps a machine apart from the node.
type Isolation string

// The words for it.
const (
	// Hardware: the processor does.
	Hardware Isolation = "hardware"
	// Emulated: a program that emulates the processor does.
	Emulated Isolation = "emulated"
)

// Driver starts virtual machines. Its methods may be called concurrently. Every
// machine it returns must be killed, every template closed.
type Driver interface {
	// Boot starts a machine with so many bytes of memory from its kernel and
	// returns while it boots. ctx bounds the start only.
	Boot(ctx context.Context, memory uint64) (Machine, error)
	// Copy makes a template of a machine that was booted or forked, and ends the
	// machine. Nothing changes a template any more.
	Copy(ctx context.Context, m Machine) (Template, error)
	// Clone starts a machine as the template was when it was copied; it is paused
	// and shares the memory that it does not change.
	Clone(ctx context.Context, t Template) (Machine, error)
	// Fork is Clone for a machine that Copy shall make another template of: it has
	// a memory of its own.
	Fork(ctx context.Context, t Template) (Machine, error)
	// Key names everything that a template depends on besides what ran in it.
	// Templates of another key must not be cloned.
	Key() string
	// Close frees the driver; all machines must have been killed before.
	Close() error
}

// Machine is one virtual machine.
type Machine interface {
	// Channel is the stream to the machine's init. It belongs to the machine.
	Channel() io.ReadWriter
	// Resume lets a paused machine run.
	Resume(ctx context.Context) error
	// Pause stops the machine until it is resumed.
	Pause(ctx context.Context) error
	// Kill ends the machine at once, frees all it has, and returns when it is gone.
	// It may be called more than once and concurrently.
	Kill()
	// Ended is closed when the machine is gone, by Kill or by itself.
	Ended() <-chan struct{}
	// Ending says how it ended; call it after Ended is closed.
	Ending() Ending
	// Process is the id of the process that runs the machine.
	Process() int
}

// Template is a machine at rest that others are cloned from.
type Template interface {
	// Bytes is the memory that the template takes.
	Bytes() uint64
	// Close frees it; machines cloned from it live on.
	Close() error
}

// Ending is how a machine ended.
type Ending struct {
	// OutOfMemory is true when its kernel had no memory left.
	OutOfMemory bool
	// Message is one line for people.
	Message string
}
