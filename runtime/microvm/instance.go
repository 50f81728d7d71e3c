package microvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

// maxInput bounds the input of a handler, as runtime/wasm does.
const maxInput = 4<<20 + 64<<10

type phase int

const (
	prepared phase = iota
	running
	stopping
	ended
)

// instance is the host's side of one guest.
type instance struct {
	runtime *Runtime
	link    *link
	// place is where link leads to.
	place  place
	spec   runtime.Spec
	host   runtime.Host
	logger *slog.Logger

	// tokens bounds the calls in the machine; closing is closed when no new call
	// may begin, done when nothing of the instance happens any more.
	tokens        chan struct{}
	closing, done chan struct{}
	// output is held by the one write of output at a time.
	output sync.Mutex
	// work counts the calls of the host and the writes of output under way.
	work   sync.WaitGroup
	memory atomic.Uint64

	state state
}

// state is what changes in an instance's life, under its lock.
type state struct {
	mu    sync.Mutex
	phase phase
	// until is the end of the grace, when phase is stopping: no call of the host
	// begins after it, although the machine may have sent it before.
	until time.Time
	exit  runtime.Exit
	// invocations are the exchanges that guest code works on, by id.
	invocations map[uint64]*invocation
	// origin is the context of calls that belong to no exchange.
	origin context.Context //nolint:containedctx // it is that of Start
	// calls holds what cuts off the calls of the host, by id.
	calls map[uint64]context.CancelFunc
	// outputs counts the writes of output under way.
	outputs int
	usage   runtime.Usage
	// run is the whole run of a command, nil for a reactor.
	run *invocation
}

// invocation is one Invoke, or Start.
type invocation struct {
	ctx   context.Context //nolint:containedctx // calls of the host derive from it
	began time.Time
	// overdue kills the machine when the guest does not keep to its time limit.
	overdue *time.Timer
}

func newInstance(r *Runtime, p place, spec runtime.Spec, host runtime.Host) *instance {
	i := &instance{
		runtime: r, link: p.link, place: p, spec: spec, host: host, logger: r.config.Logger.With("instance", spec.InstanceID),
		tokens:  make(chan struct{}, spec.Concurrency),
		closing: make(chan struct{}), done: make(chan struct{}),
		state: state{invocations: map[uint64]*invocation{}, calls: map[uint64]context.CancelFunc{}},
	}
	r.fleet.change(p.link, taken)
	return i
}

// Start implements runtime.Instance.
func (i *instance) Start(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	s := &i.state
	s.mu.Lock()
	if s.phase != prepared {
		s.mu.Unlock()
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, runtime.ErrNotRunning)
	}
	s.phase, s.origin = running, ctx
	if i.place.command { // its run is the life of the instance
		s.run = i.newInvocation(ctx)
	}
	s.mu.Unlock()
	if _, err := i.exchange(ctx, channel.Start, channel.Invocation{}); err != nil {
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, err)
	}
	if i.place.from != nil {
		i.runtime.refill(i.place.from, i.spec)
	}
	return nil
}

// Invoke implements runtime.Instance.
func (i *instance) Invoke(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
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
	defer func() { <-i.tokens }()
	i.state.mu.Lock()
	phase := i.state.phase
	i.state.mu.Unlock()
	if phase != running {
		return nil, runtime.ErrNotRunning
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", runtime.ErrBusy, ctx.Err())
	}
	answer, err := i.exchange(ctx, channel.Invoke, channel.Invocation{Handler: handler, Input: payload})
	if !errors.Is(err, runtime.ErrNoHandler) && !errors.Is(err, runtime.ErrBusy) {
		i.state.mu.Lock()
		i.state.usage.Invocations++
		i.state.mu.Unlock()
	}
	return answer, err
}

// exchange has the guest work on something and waits for the end of that,
// whatever becomes of ctx: others share the guest.
func (i *instance) exchange(ctx context.Context, kind channel.Kind, in channel.Invocation) ([]byte, error) {
	p, err := i.link.open()
	if err != nil {
		return nil, i.endedError()
	}
	in.Now = time.Now()
	in.CorrelationID = correlation.ID(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		in.Remaining = max(time.Until(deadline), 1)
	}
	i.begin(ctx, p.id)
	unwatch := context.AfterFunc(ctx, func() {
		_ = i.link.conn.Send(channel.Cancel, p.id) // a machine that has gone waits for nothing
	})
	defer unwatch()
	if err := i.link.conn.Send(kind, p.id, in.Encode(), in.Input); err != nil {
		i.link.close(p)
		i.finished(p.id)
		return nil, i.lostError()
	}
	answer, err := i.link.finish(context.WithoutCancel(ctx), p)
	i.finished(p.id)
	switch {
	case errors.Is(err, errLost):
		return nil, i.lostError()
	case err != nil:
		return nil, i.guestError(ctx, err)
	}
	memory, answer, err := channel.DecodeNumber(answer)
	if err != nil {
		i.link.breakOff(err.Error())
		return nil, i.lostError()
	}
	i.memory.Store(memory)
	return answer, nil
}

// guestError is the error of a call as the guest's side tells it.
func (i *instance) guestError(ctx context.Context, err error) error {
	if errors.Is(err, runtime.ErrBusy) && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", runtime.ErrBusy, ctx.Err())
	}
	if errors.Is(err, runtime.ErrNotRunning) {
		return i.endedError()
	}
	return err
}

// begin notes that the guest works on something; it does so until finished.
func (i *instance) begin(ctx context.Context, id uint64) {
	v := i.newInvocation(ctx)
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	i.state.invocations[id] = v
}

// newInvocation begins to count the time of the guest, and to watch it.
func (i *instance) newInvocation(ctx context.Context) *invocation {
	v := &invocation{ctx: ctx, began: time.Now()}
	if limit := i.spec.Timeout; limit > 0 {
		// A slot may have to be made ready first, which has a limit of its own.
		v.overdue = time.AfterFunc(2*limit+i.runtime.config.Overtime, func() {
			i.end(runtime.Exit{Reason: runtime.TimeLimit, Message: fmt.Sprintf("the virtual machine did not end the guest at its time limit of %s", limit)})
		})
	}
	return v
}

// stop ends the watch and returns the time since begin.
func (v *invocation) stop() time.Duration {
	if v.overdue != nil {
		v.overdue.Stop()
	}
	return time.Since(v.began)
}

func (i *instance) finished(id uint64) {
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	v := i.state.invocations[id]
	delete(i.state.invocations, id)
	if v == nil {
		return
	}
	took := v.stop()
	if i.state.run == nil { // a command's run contains its Start
		i.state.usage.GuestTime += took
	}
}

// lostError is the error of an exchange whose machine ended under it. How it ended
// is known when the instance has ended, which follows at once.
func (i *instance) lostError() error {
	<-i.done
	i.state.mu.Lock()
	exit := i.state.exit
	i.state.mu.Unlock()
	switch exit.Reason {
	case runtime.Stopped, runtime.Completed:
		return runtime.ErrNotRunning
	case runtime.TimeLimit:
		return fmt.Errorf("%w: %s", runtime.ErrTimeLimit, exit.Message)
	default:
		return fmt.Errorf("%w: %s", runtime.ErrCrashed, exit.Message)
	}
}

// endedError is the error of a call that was cut off, or never began, because the
// instance ended.
func (i *instance) endedError() error {
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	if i.state.phase == ended {
		return i.state.exit.CutOff()
	}
	return runtime.ErrNotRunning
}

// Usage implements runtime.Instance.
func (i *instance) Usage() runtime.Usage {
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	u := i.state.usage
	if run := i.state.run; run == nil {
		for _, v := range i.state.invocations {
			u.GuestTime += time.Since(v.began)
		}
	} else if i.state.phase != ended {
		u.GuestTime += time.Since(run.began)
	}
	u.MemoryBytes = i.memory.Load()
	return u
}
