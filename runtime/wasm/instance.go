package wasm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// patience is how long an instance that is ended waits for a call of the host
// that ignores its context, before the instance counts as ended all the same.
// Nothing of the guest runs any more by then.
const patience = 5 * time.Second

type phase int

const (
	prepared phase = iota
	running
	stopping
	ended
)

// instance is one guest: a command, or a reactor with up to Concurrency slots.
type instance struct {
	runtime *Runtime
	entry   *entry
	unit    *unit
	spec    runtime.Spec
	host    runtime.Host
	limit   uint64
	// args and env are what the guest reads of spec through WASI.
	args, env wasiStrings

	// tokens bounds the slots in use; closing is closed when no new call may
	// begin, dying when calls are cut off, done when the last is out.
	tokens               chan struct{}
	closing, dying, done chan struct{}

	output          sync.Mutex // one write of output at a time
	memory          account
	capabilityCalls atomic.Uint64

	state state
}

// state is what changes in an instance's life, under its lock.
type state struct {
	mu    sync.Mutex
	phase phase
	exit  runtime.Exit
	idle  []*slot
	// out counts the slots in use; calls holds what cuts off their calls of the
	// host, began when the guest was entered.
	out   int
	calls map[*slot]context.CancelCauseFunc
	began map[*slot]time.Time
	usage runtime.Usage
	// abandoning calls abandon unless the instance finishes before.
	abandoning *time.Timer
	finished   bool
	closed     bool
	unitFreed  bool
}

func newInstance(r *Runtime, e *entry, spec runtime.Spec, host runtime.Host, limit uint64) *instance {
	slots := spec.Concurrency
	if e.unit.shape.command {
		slots = 1
	}
	return &instance{
		runtime: r, entry: e, unit: e.unit, spec: spec, host: host, limit: limit,
		tokens:  make(chan struct{}, slots),
		closing: make(chan struct{}), dying: make(chan struct{}), done: make(chan struct{}),
		memory: account{gauge: r.metrics.memory},
		state:  state{calls: map[*slot]context.CancelCauseFunc{}, began: map[*slot]time.Time{}},
	}
}

// logger returns the agent's logger, with the instance named. Most instances never need it.
func (i *instance) logger() *slog.Logger {
	return i.runtime.config.Logger.With("instance", i.spec.InstanceID)
}

// Command reports whether the module is a command rather than a reactor.
func (i *instance) Command() bool { return i.unit.shape.command }

// nanotime is the guest's monotonic clock; it begins with the runtime.
func (i *instance) nanotime() int64 { return int64(time.Since(i.runtime.began)) }

// Start implements runtime.Instance. A reactor's first slot is made ready here,
// within Timeout; a command begins to run.
func (i *instance) Start(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	s := &i.state
	s.mu.Lock()
	if s.phase != prepared {
		s.mu.Unlock()
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, runtime.ErrNotRunning)
	}
	s.phase = running
	s.out++
	s.mu.Unlock()
	i.tokens <- struct{}{}
	slot := i.runtime.loader.slotFor(i)
	if i.unit.shape.command {
		go i.runCommand(ctx, slot)
		return nil
	}
	err := i.guarded(ctx, slot, slot.initialize)
	i.checkin(slot)
	if err != nil {
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, err)
	}
	i.runtime.loader.keepSpare(i.entry, i.limit)
	return nil
}

// runCommand runs a command to its end, which is the end of the instance.
func (i *instance) runCommand(ctx context.Context, s *slot) {
	err := i.guarded(ctx, s, func(ctx context.Context) error {
		if err := s.instantiate(ctx); err != nil {
			return err
		}
		i.runtime.loader.keepSpare(i.entry, i.limit)
		return s.run(ctx, guestabi.Start)
	})
	if err == nil {
		i.end(runtime.Exit{Reason: runtime.Completed, Message: "completed"})
	}
	i.checkin(s)
}

// guarded runs f in the guest, for at most Timeout, and cuts it off when the
// instance ends. A guest that does not return from f ends the instance; the error
// then says how. Of ctx it takes the values, and the deadline for calls of the
// host: a caller that gives up must not end a guest that others share.
func (i *instance) guarded(ctx context.Context, s *slot, f func(context.Context) error) error {
	c := call{caller: context.WithoutCancel(ctx)}
	c.wanted, _ = ctx.Deadline()
	if i.spec.Timeout > 0 {
		c.deadline = time.Now().Add(i.spec.Timeout)
	}
	err := i.inGuest(s, c, f)
	if err == nil {
		return nil
	}
	if errors.Is(err, errEnded) {
		return i.endedError()
	}
	exit := s.exitOf(err)
	i.end(exit)
	return i.callError(s, exit)
}

// inGuest runs f in the guest and counts its time; errEnded when the instance
// has ended before.
func (i *instance) inGuest(s *slot, c call, f func(context.Context) error) error {
	began := time.Now()
	st := &i.state
	st.mu.Lock()
	if st.phase == ended {
		st.mu.Unlock()
		return errEnded
	}
	st.began[s] = began
	st.mu.Unlock()
	err := s.enter(c, f)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.usage.GuestTime += time.Since(began)
	delete(st.began, s)
	return err
}

// remember notes what cuts off the calls of the host that a slot makes.
func (i *instance) remember(s *slot, cut context.CancelCauseFunc) {
	st := &i.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase == ended {
		cut(errEnded)
	}
	st.calls[s] = cut
}

func (i *instance) forget(s *slot) {
	st := &i.state
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.calls, s)
}

// callError is the error of a call whose guest did not return from it.
func (i *instance) callError(s *slot, exit runtime.Exit) error {
	switch {
	case s.cause != nil && errors.Is(s.cause, errEnded):
		return i.endedError()
	case exit.Reason == runtime.TimeLimit:
		return fmt.Errorf("%w: %s", runtime.ErrTimeLimit, exit.Message)
	case exit.Reason == runtime.InvalidGuest && s.module == nil:
		return fmt.Errorf("%w: %w: %s", runtime.ErrCrashed, runtime.ErrModuleInvalid, exit.Message)
	default:
		return fmt.Errorf("%w: %s", runtime.ErrCrashed, exit.Message)
	}
}

// endedError is the error of a call that was cut off, or never began, because
// the instance ended.
func (i *instance) endedError() error {
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	if i.state.phase == ended {
		return i.state.exit.CutOff()
	}
	return runtime.ErrNotRunning
}

// Invoke implements runtime.Instance.
func (i *instance) Invoke(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
	if !slices.Contains(i.unit.shape.handlers, handler) {
		return nil, fmt.Errorf("calling %s: %w: the module does not export %s", i.spec.InstanceID, runtime.ErrNoHandler, handler)
	}
	answer, err := i.invoke(ctx, handler, payload)
	if err != nil {
		return nil, fmt.Errorf("calling %s of %s: %w", handler, i.spec.InstanceID, err)
	}
	return answer, nil
}

func (i *instance) invoke(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
	if len(payload) > maxInput {
		return nil, fmt.Errorf("payload of %d bytes, at most %d are allowed", len(payload), maxInput)
	}
	s, err := i.checkout(ctx)
	if err != nil {
		return nil, err
	}
	defer i.checkin(s)
	if !s.ready {
		// Making a slot ready has its own time and is not the caller's fault.
		if err := i.guarded(context.WithoutCancel(ctx), s, s.initialize); err != nil {
			return nil, err
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", runtime.ErrBusy, ctx.Err())
	}
	var answer []byte
	err = i.guarded(ctx, s, func(ctx context.Context) (err error) {
		answer, err = s.handle(ctx, handler, payload)
		return err
	})
	i.state.mu.Lock()
	i.state.usage.Invocations++
	i.state.mu.Unlock()
	return answer, err
}

// checkout takes a slot, one that is ready if there is one; it waits until ctx
// ends. The slot must be checked in.
func (i *instance) checkout(ctx context.Context) (*slot, error) {
	select {
	case i.tokens <- struct{}{}:
	default:
		select {
		case i.tokens <- struct{}{}:
		case <-i.closing:
			return nil, runtime.ErrNotRunning
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", runtime.ErrBusy, ctx.Err())
		}
	}
	st := &i.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != running {
		<-i.tokens
		return nil, runtime.ErrNotRunning
	}
	st.out++
	if n := len(st.idle); n > 0 {
		s := st.idle[n-1]
		st.idle = st.idle[:n-1]
		return s, nil
	}
	return i.runtime.loader.slotFor(i), nil
}

// checkin gives a slot back, or frees it when the instance has ended.
func (i *instance) checkin(s *slot) {
	st := &i.state
	st.mu.Lock()
	over := st.phase == ended
	if !over {
		st.idle = append(st.idle, s)
		st.out--
	}
	st.mu.Unlock()
	if over {
		s.close()
		st.mu.Lock()
		st.out--
		last := st.out == 0
		st.mu.Unlock()
		if last {
			i.finish()
		}
	}
	<-i.tokens
}

// Usage implements runtime.Instance.
func (i *instance) Usage() runtime.Usage {
	st := &i.state
	st.mu.Lock()
	defer st.mu.Unlock()
	u := st.usage
	for _, began := range st.began {
		u.GuestTime += time.Since(began)
	}
	u.MemoryBytes = uint64(max(i.memory.bytes.Load(), 0))
	u.CapabilityCalls = i.capabilityCalls.Load()
	return u
}
