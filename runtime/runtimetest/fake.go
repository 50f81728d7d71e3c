package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Fake is an executor without WebAssembly: its instances start, answer, block
// and crash as the test scripts them. Without a script an instance prepares and
// starts at once, answers every call with the call's payload, ends only by
// Crash or Stop, and stops at once. Its methods may be called concurrently;
// scripts may be changed at any time and hold for what happens afterwards.
type Fake struct {
	mu        sync.Mutex
	changed   chan struct{}
	script    script
	instances []*fakeInstance
	prepares  map[string]int
	starts    map[string]int
	closed    bool
}

type script struct {
	prepare func(context.Context, runtime.Spec) error
	start   func(runtime.Spec) error
	invoke  InvokeFunc
	stop    func(context.Context, runtime.Spec) error
}

// InvokeFunc scripts a call of a handler. ctx ends when the call's time is over
// or the instance ends; host is the one that Prepare was given.
type InvokeFunc func(ctx context.Context, spec runtime.Spec, host runtime.Host, handler runtime.Handler, payload []byte) ([]byte, error)

// NewFake returns a Fake without a script.
func NewFake() *Fake {
	return &Fake{changed: make(chan struct{}), prepares: map[string]int{}, starts: map[string]int{}}
}

// OnPrepare scripts Prepare: fn may block until its ctx ends, and an error is
// returned by Prepare as it is. nil removes the script.
func (f *Fake) OnPrepare(fn func(ctx context.Context, spec runtime.Spec) error) {
	f.edit(func(s *script) { s.prepare = fn })
}

// OnStart scripts Start: an error is returned by Start as it is, and the
// instance does not run. nil removes the script.
func (f *Fake) OnStart(fn func(spec runtime.Spec) error) {
	f.edit(func(s *script) { s.start = fn })
}

// OnInvoke scripts calls of handlers. An error that wraps runtime.ErrCrashed or
// runtime.ErrTimeLimit also ends the instance with Trap or TimeLimit. nil
// removes the script.
func (f *Fake) OnInvoke(fn InvokeFunc) {
	f.edit(func(s *script) { s.invoke = fn })
}

// OnStop scripts the drain of a stop: fn is called with a context that ends
// after the grace; the instance ends when fn returns or the grace is over,
// whichever is first. nil removes the script.
func (f *Fake) OnStop(fn func(ctx context.Context, spec runtime.Spec) error) {
	f.edit(func(s *script) { s.stop = fn })
}

func (f *Fake) edit(change func(*script)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.script)
}

func (f *Fake) scripted() script {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.script
}

// Crash ends the running instances with this id as exit says and reports how
// many there were.
func (f *Fake) Crash(instanceID string, exit runtime.Exit) int {
	return f.crash(exit, func(s runtime.Spec) bool { return s.InstanceID == instanceID })
}

// CrashName ends the running instances with this name as exit says and reports
// how many there were.
func (f *Fake) CrashName(name string, exit runtime.Exit) int {
	return f.crash(exit, func(s runtime.Spec) bool { return s.Name == name })
}

func (f *Fake) crash(exit runtime.Exit, match func(runtime.Spec) bool) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	hit := 0
	for _, i := range f.instances {
		if i.state == fakeRunning && match(i.spec) {
			i.endLocked(exit)
			hit++
		}
	}
	return hit
}

// Running returns the ids of the instances that run, sorted.
func (f *Fake) Running() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for _, i := range f.instances {
		if i.state == fakeRunning {
			ids = append(ids, i.spec.InstanceID)
		}
	}
	slices.Sort(ids)
	return ids
}

// Specs returns the specs of the instances that run, sorted by id.
func (f *Fake) Specs() []runtime.Spec {
	f.mu.Lock()
	defer f.mu.Unlock()
	var specs []runtime.Spec
	for _, i := range f.instances {
		if i.state == fakeRunning {
			specs = append(specs, i.spec)
		}
	}
	slices.SortFunc(specs, func(a, b runtime.Spec) int {
		switch {
		case a.InstanceID < b.InstanceID:
			return -1
		case a.InstanceID > b.InstanceID:
			return 1
		}
		return 0
	})
	return specs
}

// Prepares counts the calls of Prepare for an instance id, failed ones included.
func (f *Fake) Prepares(instanceID string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.prepares[instanceID]
}

// Starts counts the calls of Start for an instance id, failed ones included.
func (f *Fake) Starts(instanceID string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.starts[instanceID]
}

// Unclosed returns the ids of instances that were prepared and not closed,
// sorted: what a test expects to be empty at its end.
func (f *Fake) Unclosed() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for _, i := range f.instances {
		ids = append(ids, i.spec.InstanceID)
	}
	slices.Sort(ids)
	return ids
}

// Await blocks until what ok looks at holds; ok is asked again after each change
// of an instance's state and may call the methods of Fake. It returns an error
// that names what when ctx ends first.
func (f *Fake) Await(ctx context.Context, what string, ok func() bool) error {
	for {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s (running: %v): %w", what, f.Running(), ctx.Err())
		}
	}
}

// touchLocked wakes all that wait in Await.
func (f *Fake) touchLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// Name returns "wasm": a Fake stands in for the default executor.
func (f *Fake) Name() string { return "wasm" }

// Prepare returns an instance that has not started, after the script of OnPrepare.
func (f *Fake) Prepare(ctx context.Context, spec runtime.Spec, host runtime.Host) (runtime.Instance, error) {
	f.mu.Lock()
	f.prepares[spec.InstanceID]++
	f.touchLocked()
	closed, prepare := f.closed, f.script.prepare
	f.mu.Unlock()
	if closed {
		return nil, errors.New("preparing an instance: the runtime is closed")
	}
	if prepare != nil {
		if err := prepare(ctx, spec); err != nil {
			return nil, err
		}
	}
	i := &fakeInstance{
		fake: f, spec: spec, host: host,
		ended: make(chan struct{}), slots: make(chan struct{}, max(spec.Concurrency, 1)),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.instances = append(f.instances, i)
	f.touchLocked()
	return i, nil
}

// Close fails when an instance has not been closed.
func (f *Fake) Close(context.Context) error {
	left := f.Unclosed()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if len(left) > 0 {
		return fmt.Errorf("closing the runtime: instances not closed: %v", left)
	}
	return nil
}

type fakeState int

const (
	fakePrepared fakeState = iota
	fakeRunning
	fakeEnded
)

type fakeInstance struct {
	fake  *Fake
	spec  runtime.Spec
	host  runtime.Host
	ended chan struct{}
	slots chan struct{}

	// What follows is guarded by fake.mu.
	state    fakeState
	stopping bool
	exit     runtime.Exit
	usage    runtime.Usage
}

func (i *fakeInstance) endLocked(exit runtime.Exit) {
	if i.state == fakeEnded {
		return
	}
	i.state, i.exit = fakeEnded, exit
	close(i.ended)
	i.fake.touchLocked()
}

func (i *fakeInstance) end(exit runtime.Exit) {
	i.fake.mu.Lock()
	defer i.fake.mu.Unlock()
	i.endLocked(exit)
}

func (i *fakeInstance) Start(context.Context) error {
	i.fake.mu.Lock()
	i.fake.starts[i.spec.InstanceID]++
	start := i.fake.script.start
	state := i.state
	i.fake.mu.Unlock()
	if state != fakePrepared {
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, runtime.ErrNotRunning)
	}
	if start != nil {
		if err := start(i.spec); err != nil {
			i.end(runtime.Exit{Reason: runtime.InvalidGuest, Message: err.Error()})
			return err
		}
	}
	i.fake.mu.Lock()
	defer i.fake.mu.Unlock()
	if i.state != fakePrepared {
		return fmt.Errorf("starting %s: %w", i.spec.InstanceID, runtime.ErrNotRunning)
	}
	i.state = fakeRunning
	i.fake.touchLocked()
	return nil
}

func (i *fakeInstance) Wait(ctx context.Context) (runtime.Exit, error) {
	select {
	case <-i.ended:
		return i.exit, nil
	default:
	}
	select {
	case <-i.ended:
		return i.exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}

func (i *fakeInstance) Invoke(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
	select {
	case i.slots <- struct{}{}:
		defer func() { <-i.slots }()
	case <-i.ended:
	case <-ctx.Done():
		return nil, fmt.Errorf("calling %s of %s: %w", handler, i.spec.InstanceID, runtime.ErrBusy)
	}
	i.fake.mu.Lock()
	running := i.state == fakeRunning && !i.stopping
	i.fake.mu.Unlock()
	if !running {
		return nil, fmt.Errorf("calling %s of %s: %w", handler, i.spec.InstanceID, runtime.ErrNotRunning)
	}
	began := time.Now()
	answer, err := i.call(ctx, handler, payload)
	i.fake.mu.Lock()
	defer i.fake.mu.Unlock()
	i.usage.Invocations++
	i.usage.GuestTime += time.Since(began)
	switch {
	case errors.Is(err, runtime.ErrCrashed):
		i.endLocked(runtime.Exit{Reason: runtime.Trap, Message: err.Error()})
	case errors.Is(err, runtime.ErrTimeLimit):
		i.endLocked(runtime.Exit{Reason: runtime.TimeLimit, Message: err.Error()})
	}
	return answer, err
}

func (i *fakeInstance) call(ctx context.Context, handler runtime.Handler, payload []byte) ([]byte, error) {
	invoke := i.fake.scripted().invoke
	if invoke == nil {
		return slices.Clone(payload), nil
	}
	if i.spec.Timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, i.spec.Timeout)
		defer stop()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-i.ended:
			cancel()
		case <-over:
		}
	}()
	return invoke(ctx, i.spec, i.host, handler, slices.Clone(payload))
}

func (i *fakeInstance) Stop(ctx context.Context, grace time.Duration) error {
	i.fake.mu.Lock()
	running := i.state == fakeRunning
	i.stopping = true
	drain := i.fake.script.stop
	i.fake.mu.Unlock()
	if running && drain != nil {
		i.drain(ctx, grace, drain)
	}
	i.end(runtime.Exit{Reason: runtime.Stopped, Message: "stopped"})
	return nil
}

// drain runs the script of OnStop and returns when it does, when the grace is
// over, or when the instance ends otherwise.
func (i *fakeInstance) drain(ctx context.Context, grace time.Duration, fn func(context.Context, runtime.Spec) error) {
	bounded, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = fn(bounded, i.spec)
	}()
	select {
	case <-done:
	case <-bounded.Done():
	case <-i.ended:
	}
}

func (i *fakeInstance) Usage() runtime.Usage {
	i.fake.mu.Lock()
	defer i.fake.mu.Unlock()
	return i.usage
}

func (i *fakeInstance) Close(context.Context) error {
	i.end(runtime.Exit{Reason: runtime.Stopped, Message: "closed"})
	i.fake.mu.Lock()
	defer i.fake.mu.Unlock()
	i.fake.instances = slices.DeleteFunc(i.fake.instances, func(o *fakeInstance) bool { return o == i })
	i.fake.touchLocked()
	return nil
}
