package microvm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// Runtime executes modules in virtual machines. Make one with New and close it
// after all its instances. Its methods may be called concurrently.
type Runtime struct {
	config    Config
	metrics   *metrics
	fleet     *fleet
	templates *templates
	// starting bounds the machines that start at once.
	starting chan struct{}
	// rehearsing is held by the one spare that is being made.
	rehearsing chan struct{}
	// driverKey is the driver's key when it was last looked at.
	driverKey atomic.Pointer[string]
	// life ends when the runtime closes.
	life   context.Context //nolint:containedctx // work goes on without the one who asked for it
	cancel context.CancelFunc
	work   sync.WaitGroup
}

var _ runtime.Runtime = (*Runtime)(nil)

// New makes a Runtime, which owns config.Driver from then on. It starts nothing.
// It fails when the configuration is incomplete or the metrics are registered
// already; the driver then stays the caller's. ctx is used for values only.
func New(ctx context.Context, config Config) (*Runtime, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	r := &Runtime{config: config, fleet: newFleet(), starting: make(chan struct{}, config.Starting), rehearsing: make(chan struct{}, 1)}
	r.life, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	r.templates = &templates{
		limit: config.TemplateBytes, build: r.build, work: &r.work, life: r.life, entries: map[templateKey]*entry{},
	}
	if r.metrics, err = newMetrics(config.Registerer, r.fleet, r.templates); err != nil {
		r.cancel()
		return nil, err
	}
	return r, nil
}

// Name returns "microvm".
func (r *Runtime) Name() string { return "microvm" }

// Isolation says what keeps the machines apart.
func (r *Runtime) Isolation() vmm.Isolation { return r.config.Isolation }

// Warm makes the base template of the smallest machines, so that the first start
// need not wait for it. It returns when that is done, or with ctx.
func (r *Runtime) Warm(ctx context.Context) error {
	e, err := r.templates.acquire(ctx, templateKey{driver: r.config.Driver.Key(), size: leastBytes}, runtime.Spec{})
	if err != nil {
		return err
	}
	r.templates.release(e)
	return nil
}

// Prepare implements runtime.Runtime: it returns an instance in a machine of its
// own, in which the module is compiled. Modules are compiled once, in a template.
func (r *Runtime) Prepare(ctx context.Context, spec runtime.Spec, host runtime.Host) (runtime.Instance, error) {
	if host == nil || spec.Stdout == nil || spec.Stderr == nil {
		return nil, errors.New("preparing an instance: host, stdout and stderr are required")
	}
	spec.Concurrency = max(spec.Concurrency, 1)
	if spec.MemoryBytes > maxLinearBytes/uint64(spec.Concurrency) {
		return nil, fmt.Errorf("preparing %s: %w: %d bytes for each of %d calls at once is more than a machine may have",
			spec.InstanceID, runtime.ErrModuleInvalid, spec.MemoryBytes, spec.Concurrency)
	}
	p, err := r.provision(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("preparing %s: %w", spec.InstanceID, err)
	}
	i := newInstance(r, p, spec, host)
	if err := p.link.attach(i); err != nil {
		p.link.machine.Kill()
		return nil, fmt.Errorf("preparing %s: %w: %s", spec.InstanceID, err, p.link.reason())
	}
	return i, nil
}

// Close implements runtime.Runtime. It waits until everything under way has ended.
func (r *Runtime) Close(context.Context) error {
	r.cancel()
	r.work.Wait()
	r.templates.close()
	return r.config.Driver.Close()
}
