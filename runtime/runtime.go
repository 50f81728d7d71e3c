// Package runtime is the contract of an executor of guest modules: what the
// agent asks of it and what it gets from the agent. It imports nothing of
// wasmatrix; runtime/wasm and runtime/microvm implement it, and
// runtime/runtimetest holds the suite that both pass.
package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

// Sentinels that an executor's errors wrap.
var (
	// ErrModuleInvalid: the module is damaged, breaks a limit, or imports what
	// does not exist. Trying again does not help.
	ErrModuleInvalid = errors.New("invalid module")
	// ErrBusy: all of the instance's slots were taken until the deadline.
	ErrBusy = errors.New("instance is busy")
	// ErrNoHandler: the module does not export the handler that was called.
	ErrNoHandler = errors.New("no such handler")
	// ErrNotRunning: the instance has not started or has ended.
	ErrNotRunning = errors.New("instance is not running")
	// ErrTimeLimit: the call ran into its time limit; the instance has ended.
	ErrTimeLimit = errors.New("time limit exceeded")
	// ErrCrashed: the guest crashed during the call; the instance has ended.
	ErrCrashed = errors.New("guest crashed")
)

// Handler names one of a reactor's exported handlers.
type Handler string

// The handlers of interface version 1.
const (
	HandlerInvoke  Handler = "wasmatrix_on_invoke"
	HandlerHTTP    Handler = "wasmatrix_on_http"
	HandlerMessage Handler = "wasmatrix_on_message"
)

// Spec is one instance as its executor needs it. The agent has filled in all defaults.
type Spec struct {
	// InstanceID and Name identify the instance in logs and errors.
	InstanceID, Name string
	// Generation is that of the instance's placement.
	Generation uint64
	// Digest is the module's digest, "sha256:…".
	Digest string
	// ModulePath is a local file whose content has been verified against Digest.
	ModulePath string
	// MemoryBytes bounds each linear memory; a multiple of 64 KiB is used, rounded down.
	MemoryBytes uint64
	// Timeout bounds one call into a reactor, its initialisation, and the whole
	// run of a command; 0 means none.
	Timeout time.Duration
	// Concurrency is the number of calls that a reactor handles at once; at least 1.
	Concurrency int
	// Args are a command's arguments, without the program's name.
	Args []string
	// Env is the guest's whole environment.
	Env map[string]string
	// Stdin is a command's standard input.
	Stdin []byte
	// Stdout and Stderr take the guest's output as it comes; never nil. Their
	// writes may block the guest and must not fail.
	Stdout, Stderr io.Writer
}

// Host is the guest's only way out besides WASI's clocks, random numbers,
// arguments, environment and output.
type Host interface {
	// Call makes one call of a capability import: capability is "kv", "log",
	// "context", …, operation the imported function's name, payload the encoded
	// request, valid only during the call. The answer belongs to the caller. ctx
	// derives from the one given to Invoke or Start. A failure is a *Failure.
	Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error)
}

// Failure is a refused or failed capability call as the guest sees it.
type Failure struct {
	// Code is the number of the wasmatrix.v1.ErrorCode; never 0.
	Code uint32
	// Encoded is the wasmatrix.v1.Error message.
	Encoded []byte
}

// Error describes the failure by its number only; what it says is in Encoded.
func (f *Failure) Error() string { return fmt.Sprintf("capability call failed with code %d", f.Code) }

// Reason says why an instance ended. The numbers equal those of wasmatrix.v1.ExitReason.
type Reason int32

// The reasons.
const (
	Completed    Reason = 1
	ExitCode     Reason = 2
	Trap         Reason = 3
	MemoryLimit  Reason = 4
	TimeLimit    Reason = 5
	Stopped      Reason = 6
	InvalidGuest Reason = 7
	Internal     Reason = 10
)

// String returns the reason as metrics and logs spell it: "memory_limit".
func (r Reason) String() string {
	switch r {
	case Completed:
		return "completed"
	case ExitCode:
		return "exit_code"
	case Trap:
		return "trap"
	case MemoryLimit:
		return "memory_limit"
	case TimeLimit:
		return "time_limit"
	case Stopped:
		return "stopped"
	case InvalidGuest:
		return "invalid_guest"
	case Internal:
		return "internal"
	default:
		return strconv.Itoa(int(r))
	}
}

// Exit is how an instance ended.
type Exit struct {
	// Reason says why.
	Reason Reason
	// Code is the exit code when Reason is Completed or ExitCode.
	Code int32
	// Message is one line for people, such as the trap and the function it happened in.
	Message string
}

// Usage is what an instance has used since it started.
type Usage struct {
	// MemoryBytes is the present size of its linear memories.
	MemoryBytes uint64
	// Invocations counts finished calls.
	Invocations uint64
	// CapabilityCalls counts calls of Host.
	CapabilityCalls uint64
	// GuestTime is the time spent inside guest code, host calls included.
	GuestTime time.Duration
}

// Runtime executes modules.
type Runtime interface {
	// Name is the runtime's name in a workload's spec: "wasm" or "microvm".
	Name() string
	// Prepare checks and compiles the module (or takes it from the cache) and
	// returns an instance that has not started. Its errors wrap ErrModuleInvalid
	// when the module is at fault. The instance must be closed.
	Prepare(ctx context.Context, spec Spec, host Host) (Instance, error)
	// Close frees everything; all instances must have been closed before.
	Close(ctx context.Context) error
}

// Instance is one prepared or running guest. All methods may be called
// concurrently; Start once.
type Instance interface {
	// Start makes a reactor ready for calls, or begins the run of a command and
	// returns. ctx carries values only and does not end the guest.
	Start(ctx context.Context) error
	// Wait blocks until the guest has ended by itself or was stopped, and tells
	// how; a reactor ends by a crash, by proc_exit or by Stop. It returns an
	// error only when ctx ends first.
	Wait(ctx context.Context) (Exit, error)
	// Invoke calls a reactor's handler. payload is copied into the guest; the
	// answer belongs to the caller. It waits for a free slot until ctx ends. Once
	// the guest runs, the end of ctx does not end it, for others share it: its
	// capability calls fail from ctx's deadline on, and Invoke returns when the
	// handler does. A guest that still runs after Spec.Timeout is ended with
	// TimeLimit. Its errors wrap the sentinels above.
	Invoke(ctx context.Context, handler Handler, payload []byte) ([]byte, error)
	// Stop takes no new calls, gives those under way and the drain handler up to
	// grace, then ends the guest whatever it does. It returns when Wait has its answer.
	Stop(ctx context.Context, grace time.Duration) error
	// Usage returns what the instance has used; it never blocks on the guest.
	Usage() Usage
	// Close frees the instance, ending the guest if need be. It may be called twice.
	Close(ctx context.Context) error
}

// CutOff is the error of a call that this end of the instance cut off, or that came
// after it: ErrNotRunning after an orderly end, else ErrCrashed.
func (e Exit) CutOff() error {
	if e.Reason == Stopped || e.Reason == Completed {
		return ErrNotRunning
	}
	return fmt.Errorf("%w: another call ended the instance: %s", ErrCrashed, e.Message)
}

// Await waits until done is closed, or fails when ctx ends first. Where both have
// happened, done counts.
func Await(ctx context.Context, done <-chan struct{}, instanceID string) error {
	select {
	case <-done:
		return nil
	default:
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s: %w", instanceID, ctx.Err())
	}
}
