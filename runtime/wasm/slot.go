package wasm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"

	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/runtime"
)

const (
	// budget is what a guest may run between two checkpoints, in the units of
	// module.Meter: 50 to 200 microseconds of ordinary code.
	budget = 200_000
	// maxInput bounds the input of a capability call: the largest payload of the
	// interface is 4 MiB, and its message has a few fields more.
	maxInput = 4<<20 + 64<<10
	// maxAnswer bounds the answer of a handler in the same way.
	maxAnswer = maxInput
)

// errInterrupted unwinds a guest that was ended by a limit or by Stop.
var errInterrupted = errors.New("interrupted")

// errEnded is the cause with which calls are cancelled when their instance ends.
var errEnded = errors.New("instance has ended")

// errTimeLimit is the cause with which a call is cancelled after Spec.Timeout.
var errTimeLimit = errors.New("time limit")

// slot is one wasm instance; it handles one call at a time, and all its fields
// belong to the goroutine of that call.
type slot struct {
	unit *unit
	// instance is nil in a spare slot.
	instance *instance
	module   api.Module
	memory   linearMemory
	// ready is set when a reactor takes calls.
	ready    bool
	alloc    api.Function
	handlers map[runtime.Handler]api.Function

	call call
	// cause is set when the present call was interrupted.
	cause error
	// answer waits for wasmatrix:result/v1 read.
	answer  []byte
	waiting bool
	// input is what the last call of the host got.
	input []byte
}

// call is what bounds the present call of a slot.
type call struct {
	// caller carries the values of whoever called; its end is that of the guest
	// only where done is not nil.
	caller context.Context //nolint:containedctx // the guest's imports have no other way to it
	done   <-chan struct{}
	// deadline is when the guest is ended, zero for never.
	deadline time.Time
	// wanted is until when calls of the host make sense, zero for ever.
	wanted time.Time
	// host is the context for calls of the host, nil until the first; it costs a
	// timer, which a call that only computes can do without. cut ends it.
	host     context.Context //nolint:containedctx // see above
	hostDone <-chan struct{}
	cut      func()
}

// callContext brings the slot to the functions that the guest imports. wazero
// hands on the context as it is.
type callContext struct {
	context.Context //nolint:containedctx // this is a context
	slot            *slot
}

// slotOf returns the slot that is calling out. It panics for another context,
// which ends that guest and nothing else.
func slotOf(ctx context.Context) *slot {
	c, ok := ctx.(*callContext)
	if !ok {
		panic(errors.New("a guest ran without its call context"))
	}
	return c.slot
}

// enter runs f in the guest, bounded by c.
func (s *slot) enter(c call, f func(ctx context.Context) error) (err error) {
	s.call, s.cause, s.memory.refused = c, nil, false
	s.answer, s.waiting = nil, false
	defer func() {
		if s.call.cut != nil {
			s.call.cut()
		}
		s.call, s.answer, s.waiting = call{}, nil, false
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errInternal, r)
		}
	}()
	return f(&callContext{Context: c.caller, slot: s})
}

// interruptible ends the guest, by a panic that wazero turns into the error of
// the call, when the call's time is over or its instance has ended. It is called
// wherever the guest calls out. With more spinning guests than processors timers
// are late, so it looks at the clock itself.
func (s *slot) interruptible() {
	select {
	case <-s.instance.dying:
		s.interrupt(errEnded)
	default:
	}
	select {
	case <-s.call.done:
		s.interrupt(context.Cause(s.call.caller))
	default:
	}
	if !s.call.deadline.IsZero() && !time.Now().Before(s.call.deadline) {
		s.interrupt(errTimeLimit)
	}
}

func (s *slot) interrupt(cause error) {
	s.cause = cause
	panic(errInterrupted)
}

// hostContext returns the context for calls of the host. It ends when nobody
// wants their answers any more, and with the guest.
func (s *slot) hostContext() context.Context {
	c := &s.call
	if c.host != nil {
		return c.host
	}
	ctx, cut := context.WithCancelCause(c.caller)
	stop := func() {}
	if end := c.deadline; !end.IsZero() || !c.wanted.IsZero() {
		if end.IsZero() || !c.wanted.IsZero() && c.wanted.Before(end) {
			end = c.wanted
		}
		ctx, stop = context.WithDeadline(ctx, end)
	}
	c.host, c.hostDone = ctx, ctx.Done()
	c.cut = func() {
		stop()
		cut(nil)
		s.instance.forget(s)
	}
	s.instance.remember(s, cut)
	return ctx
}

// instantiate creates the wasm instance, unless the slot was a spare one. The start
// function of the module, if it has one, runs here.
func (s *slot) instantiate(ctx context.Context) error {
	if s.module != nil {
		return nil
	}
	// The allocator has to be found in the context, and the slot as its type.
	inner := &callContext{Context: experimental.WithMemoryAllocator(ctx, &s.memory), slot: s}
	mod, err := s.unit.runtime.InstantiateModule(inner, s.unit.compiled, s.moduleConfig())
	if err != nil {
		return fmt.Errorf("%w: %w", errInstantiate, err)
	}
	s.module = mod
	return nil
}

// initialize makes a reactor ready for calls.
func (s *slot) initialize(ctx context.Context) error {
	if err := s.instantiate(ctx); err != nil {
		return err
	}
	if s.unit.shape.initialize {
		if err := s.run(ctx, guestabi.Initialize); err != nil {
			return err
		}
	}
	s.alloc = s.module.ExportedFunction(guestabi.Alloc)
	s.handlers = map[runtime.Handler]api.Function{}
	s.ready = true
	return nil
}

// run calls an exported function without parameters and results, once.
func (s *slot) run(ctx context.Context, name string) error {
	_, err := s.module.ExportedFunction(name).Call(ctx)
	return err
}

// handle calls a handler with a copy of payload and returns a copy of its answer.
func (s *slot) handle(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
	f := s.handlers[handler]
	if f == nil {
		f = s.module.ExportedFunction(string(handler))
		s.handlers[handler] = f
	}
	var stack [2]uint64
	if len(payload) > 0 {
		stack[0] = uint64(len(payload))
		if err := s.alloc.CallWithStack(ctx, stack[:1]); err != nil {
			return nil, err
		}
		if !s.module.Memory().Write(uint32(stack[0]), payload) {
			return nil, fmt.Errorf("%w: %s handed out %d bytes at %d, outside of its memory", errMisbehaved, guestabi.Alloc, len(payload), uint32(stack[0]))
		}
		stack[0], stack[1] = uint64(uint32(stack[0])), uint64(len(payload))
	}
	if err := f.CallWithStack(ctx, stack[:]); err != nil {
		return nil, err
	}
	at, size := uint32(stack[0]>>32), uint32(stack[0])
	if size == 0 {
		return []byte{}, nil
	}
	if size > maxAnswer {
		return nil, fmt.Errorf("%w: %s answered with %d bytes, at most %d are allowed", errMisbehaved, handler, size, maxAnswer)
	}
	view, ok := s.module.Memory().Read(at, size)
	if !ok {
		return nil, fmt.Errorf("%w: %s answered with %d bytes at %d, outside of its memory", errMisbehaved, handler, size, at)
	}
	return append([]byte(nil), view...), nil
}

// close frees the wasm instance with its memory. No call may be under way.
func (s *slot) close() {
	if s.module == nil {
		if s.memory.region != nil {
			s.memory.Free() // the instantiation failed after its memory was made
		}
		return
	}
	// Closing frees memory only and does not fail.
	_ = s.module.Close(context.Background()) //nolint:forbidigo // nothing here waits for a context
	s.module, s.ready = nil, false
}
