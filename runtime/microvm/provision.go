package microvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

var (
	// errTooExpensive marks a module whose compilation took too much time or memory.
	errTooExpensive = errors.New("too expensive to compile")
	// errTemplate marks a template that cannot be made or cloned.
	errTemplate = errors.New("template of a virtual machine")
)

// attempts is how often a boot is tried, and a clone before the template counts as
// damaged.
const attempts = 2

// refillDelay is how long after a start its spare is made, so that the two do not
// compete for processors.
const refillDelay = 200 * time.Millisecond

// within runs f on a machine's conversation and kills the machine when f takes
// longer than the deadline. A machine that hangs cannot hold anybody up.
func within(ctx context.Context, limit time.Duration, l *link, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.breakOff(fmt.Sprintf("%s took more than %s", what, limit)) })
	err := f(ctx)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if errors.Is(err, errLost) {
		<-l.machine.Ended()
		err = fmt.Errorf("%w: %s", err, l.reason())
	}
	if err != nil {
		l.machine.Kill()
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// reason says why the machine ended.
func (l *link) reason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != "" {
		return l.broken
	}
	return l.machine.Ending().Message
}

// start takes one of the places for machines that start.
func (r *Runtime) start(ctx context.Context) (done func(), err error) {
	select {
	case r.starting <- struct{}{}:
		return func() { <-r.starting }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting until other virtual machines have started: %w", ctx.Err())
	}
}

// boot starts a machine from its kernel. On a busy node a kernel may hang in its
// first seconds, so it is tried several times.
func (r *Runtime) boot(ctx context.Context, size uint64) (l *link, err error) {
	for range attempts {
		if l, err = r.bootOnce(ctx, size); err == nil || ctx.Err() != nil {
			return l, err
		}
		r.config.Logger.Warn("a virtual machine did not boot", "error", err)
	}
	return nil, err
}

func (r *Runtime) bootOnce(ctx context.Context, size uint64) (*link, error) {
	done, err := r.start(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	began := time.Now()
	m, err := r.config.Driver.Boot(ctx, size)
	if err != nil {
		return nil, fmt.Errorf("booting a virtual machine: %w", err)
	}
	l := newLink(m, r.fleet)
	if err := within(ctx, r.config.BootTimeout, l, "booting a virtual machine", l.booted); err != nil {
		return nil, err
	}
	r.metrics.starts.WithLabelValues(startBoot).Observe(time.Since(began).Seconds())
	return l, nil
}

// clone starts a machine from a template and makes it unlike all others.
func (r *Runtime) clone(ctx context.Context, e *entry, fork bool) (*link, error) {
	done, err := r.start(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	began := time.Now()
	bounded, cancel := context.WithTimeout(ctx, r.config.CloneTimeout)
	defer cancel()
	start, label := r.config.Driver.Clone, startClone
	if fork {
		start, label = r.config.Driver.Fork, startFork
	}
	m, err := start(bounded, e.template)
	if err != nil {
		return nil, err
	}
	l := newLink(m, r.fleet)
	if err := r.wake(ctx, l); err != nil {
		return nil, err
	}
	r.metrics.starts.WithLabelValues(label).Observe(time.Since(began).Seconds())
	return l, nil
}

// wake lets a clone run and makes it unlike its template.
func (r *Runtime) wake(ctx context.Context, l *link) error {
	return within(ctx, r.config.CloneTimeout, l, "waking a virtual machine", func(ctx context.Context) error {
		if err := l.machine.Resume(ctx); err != nil {
			return err
		}
		return l.greet(ctx)
	})
}

// fresh returns a running clone that nobody has used, a spare one if there is one.
func (r *Runtime) fresh(ctx context.Context, e *entry) (*link, error) {
	for {
		l := r.templates.takeSpare(e)
		r.metrics.pool(l != nil)
		if l == nil {
			return r.newClone(ctx, e, false)
		}
		began := time.Now()
		err := r.wake(ctx, l)
		if err == nil {
			r.metrics.starts.WithLabelValues(startSpare).Observe(time.Since(began).Seconds())
		}
		if err == nil || ctx.Err() != nil {
			return l, err
		}
		r.config.Logger.Warn("a spare virtual machine did not wake", "error", err)
	}
}

// newClone returns a running clone. A template that cannot be cloned several times
// in a row is dropped.
func (r *Runtime) newClone(ctx context.Context, e *entry, fork bool) (l *link, err error) {
	for range attempts {
		if l, err = r.clone(ctx, e, fork); err == nil || ctx.Err() != nil {
			return l, err
		}
		r.config.Logger.Warn("a clone of a virtual machine did not start", "error", err)
	}
	r.templates.drop(e)
	return nil, fmt.Errorf("%w: it cannot be cloned: %w", errTemplate, err)
}

// build makes a template.
func (r *Runtime) build(ctx context.Context, key templateKey, spec runtime.Spec) (vmm.Template, error) {
	began := time.Now()
	t, err := r.buildBase(ctx, key, spec)
	if err != nil {
		return nil, err
	}
	r.config.Logger.Info("template of a virtual machine made", "digest", key.digest, "machine_bytes", key.size,
		"template_bytes", t.Bytes(), "duration", time.Since(began))
	return t, nil
}

func (r *Runtime) buildBase(ctx context.Context, key templateKey, spec runtime.Spec) (vmm.Template, error) {
	if key.digest != "" {
		return r.buildModule(ctx, key, spec)
	}
	l, err := r.boot(ctx, key.size)
	if err != nil {
		return nil, err
	}
	err = within(ctx, r.config.BootTimeout, l, "settling a virtual machine", func(ctx context.Context) error {
		_, err := l.ask(ctx, channel.Settle)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.copy(ctx, l)
}

// copy makes a template of a machine.
func (r *Runtime) copy(ctx context.Context, l *link) (vmm.Template, error) {
	bounded, cancel := context.WithTimeout(ctx, r.config.BootTimeout)
	defer cancel()
	t, err := r.config.Driver.Copy(bounded, l.machine)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTemplate, err)
	}
	return t, nil
}

// buildModule compiles a module in a fork of the base template. The machine sees
// the module and how much memory it may have, and nothing else of any instance.
func (r *Runtime) buildModule(ctx context.Context, key templateKey, spec runtime.Spec) (vmm.Template, error) {
	base, err := r.templates.acquire(ctx, templateKey{driver: key.driver, size: key.size}, runtime.Spec{})
	if err != nil {
		return nil, err
	}
	defer r.templates.release(base)
	l, err := r.newClone(ctx, base, true)
	if err != nil {
		return nil, err
	}
	if _, err := r.compile(ctx, l, channel.Warm, public(spec), spec.ModulePath); err != nil {
		return nil, err
	}
	return r.copy(ctx, l)
}

// compile sends a module to a machine and has it compiled there. A module that
// makes the machine run out of time or memory is at fault.
func (r *Runtime) compile(ctx context.Context, l *link, kind channel.Kind, spec runtime.Spec, path string) (command bool, err error) {
	began := time.Now()
	err = within(ctx, r.config.CompileTimeout, l, "compiling the module", func(ctx context.Context) error {
		if path != "" {
			if err := l.load(path); err != nil {
				return err
			}
		}
		answer, err := l.ask(ctx, kind, channel.EncodeSpec(spec))
		if err != nil {
			return err
		}
		_, shape, err := channel.DecodeNumber(answer)
		command = len(shape) == 1 && shape[0] == channel.IsCommand
		return err
	})
	if err == nil {
		return command, nil
	}
	exhausted := errors.Is(err, errLost) && l.machine.Ending().OutOfMemory
	overdue := ctx.Err() == nil && time.Since(began) >= r.config.CompileTimeout
	if exhausted || overdue {
		return false, fmt.Errorf("%w: %w: %w; make it smaller or raise the instance's memory or the node's compile timeout", runtime.ErrModuleInvalid, errTooExpensive, err)
	}
	return false, err
}

// place is a machine in which an instance is prepared.
type place struct {
	link *link
	// command is whether the module is one.
	command bool
	// from is the template that the machine is a clone of; nil when it was booted.
	from *entry
}

// provision returns a machine in which spec is prepared. Where templates do not
// work on this node, the machine is booted.
func (r *Runtime) provision(ctx context.Context, spec runtime.Spec) (place, error) {
	driver := r.config.Driver.Key()
	if old := r.driverKey.Swap(&driver); old != nil && *old != driver {
		r.config.Logger.Warn("the monitor of virtual machines has changed: templates are made again")
		r.templates.dropStale(driver)
	}
	size := machineBytes(spec.MemoryBytes * uint64(spec.Concurrency))
	for try := 0; ; try++ {
		var p place
		e, err := r.templates.acquire(ctx, templateKey{driver: driver, size: size, digest: spec.Digest}, spec)
		if err == nil {
			p, err = r.fromTemplate(ctx, e, spec)
			r.templates.release(e)
		}
		if err == nil || !errors.Is(err, errTemplate) {
			return p, err
		}
		if e != nil && try == 0 {
			continue
		}
		r.config.Logger.Warn("a virtual machine is booted because templates do not work", "error", err)
		return r.fromKernel(ctx, size, spec)
	}
}

func (r *Runtime) fromTemplate(ctx context.Context, e *entry, spec runtime.Spec) (place, error) {
	l, err := r.fresh(ctx, e)
	if err != nil {
		return place{}, err
	}
	command, err := r.compile(ctx, l, channel.Prepare, spec, "")
	return place{link: l, command: command, from: e}, err
}

func (r *Runtime) fromKernel(ctx context.Context, size uint64, spec runtime.Spec) (place, error) {
	l, err := r.boot(ctx, size)
	if err != nil {
		return place{}, err
	}
	if err := within(ctx, r.config.CloneTimeout, l, "waking a virtual machine", l.greet); err != nil {
		return place{}, err
	}
	command, err := r.compile(ctx, l, channel.Prepare, spec, spec.ModulePath)
	return place{link: l, command: command}, err
}

// refill makes spares of a template that was used, in the background and one at a
// time: what runs already goes first.
func (r *Runtime) refill(e *entry, spec runtime.Spec) {
	for r.templates.wantSpare(e, r.config.Spares) {
		r.work.Go(func() {
			l, err := r.spare(r.life, e, public(spec))
			if err != nil {
				if r.life.Err() == nil {
					r.config.Logger.Warn("a spare virtual machine could not be made", "error", err)
				}
				l = nil
			}
			r.templates.putSpare(e, l)
		})
	}
}

// spare returns a paused clone that has gone through a start that nobody saw. It
// has seen no more of any instance than its template.
func (r *Runtime) spare(ctx context.Context, e *entry, spec runtime.Spec) (*link, error) {
	select {
	case r.rehearsing <- struct{}{}:
		defer func() { <-r.rehearsing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-time.After(refillDelay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l, err := r.clone(ctx, e, false)
	if err != nil {
		return nil, err
	}
	err = within(ctx, r.config.CloneTimeout, l, "rehearsing in a spare virtual machine", func(ctx context.Context) error {
		if _, err := l.ask(ctx, channel.Rehearse, channel.EncodeSpec(spec)); err != nil {
			return err
		}
		return l.machine.Pause(ctx)
	})
	if err == nil {
		r.fleet.change(l, spare)
	}
	return l, err
}

// public is what a template and its spares may know of an instance.
func public(spec runtime.Spec) runtime.Spec {
	return runtime.Spec{InstanceID: spec.Digest, Digest: spec.Digest, MemoryBytes: spec.MemoryBytes, Concurrency: spec.Concurrency}
}
