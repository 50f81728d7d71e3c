package wasm

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// pageBytes is the unit of linear memory.
const pageBytes = 64 << 10

// readers is how many modules are decoded at once.
const readers = 4

// maxMemoryBytes is the most that 32-bit addresses reach.
const maxMemoryBytes = 4 << 30

// Runtime executes modules with wazero. Make one with New and close it after all
// its instances. Its methods may be called concurrently.
type Runtime struct {
	loader  *loader
	metrics *metrics
	config  Config
	began   time.Time
}

var _ runtime.Runtime = (*Runtime)(nil)

// New makes a Runtime. It creates the cache directory and starts nothing. It
// fails when the configuration contradicts itself, the directory cannot be used
// or the metrics are registered already. ctx is used for values only.
func New(ctx context.Context, config Config) (*Runtime, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	wasi, err := wasiTypes(ctx)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(config.Registerer)
	if err != nil {
		return nil, err
	}
	l := &loader{
		limits: config.Limits, wasi: wasi, idleMax: config.IdleModules, singleUse: config.SingleUse, metrics: m, logger: config.Logger,
		compiler: compiler{
			command: config.CompileCommand, timeout: config.CompileTimeout, memory: config.CompileMemoryBytes,
			slots: make(chan struct{}, config.CompileConcurrency),
		},
		reading: make(chan struct{}, readers),
		entries: map[string]*entry{}, idle: list.New(),
	}
	if config.CacheDir != "" {
		if l.disk, err = openDiskCache(config.CacheDir, config.CacheBytes, config.Limits); err != nil {
			return nil, err
		}
	}
	l.life, l.cancel = context.WithCancel(ctx)
	return &Runtime{loader: l, metrics: m, config: config, began: time.Now()}, nil
}

// Name returns "wasm".
func (r *Runtime) Name() string { return "wasm" }

// Prepare implements runtime.Runtime. A module is compiled at most once at a
// time however many ask for it; when ctx ends, the compilation goes on for those
// who come later.
func (r *Runtime) Prepare(ctx context.Context, spec runtime.Spec, host runtime.Host) (runtime.Instance, error) {
	if host == nil || spec.Stdout == nil || spec.Stderr == nil {
		return nil, errors.New("preparing an instance: host, stdout and stderr are required")
	}
	spec.Concurrency = max(spec.Concurrency, 1)
	args, env, err := stringsOf(spec)
	if err != nil {
		return nil, fmt.Errorf("preparing %s: %w: %w", spec.InstanceID, runtime.ErrModuleInvalid, err)
	}
	e, limit, err := r.load(ctx, spec)
	if err != nil {
		return nil, err
	}
	i := newInstance(r, e, spec, host, limit)
	i.args, i.env = args, env
	return i, nil
}

// load returns spec's module, which must be released, and the limit of a linear
// memory of it.
func (r *Runtime) load(ctx context.Context, spec runtime.Spec) (*entry, uint64, error) {
	limit := min(spec.MemoryBytes, maxMemoryBytes) / pageBytes * pageBytes
	e, err := r.loader.acquire(ctx, spec.Digest, spec.ModulePath)
	if err != nil {
		return nil, 0, fmt.Errorf("preparing %s: %w", spec.InstanceID, err)
	}
	if need := e.unit.shape.memory; need > limit {
		r.loader.release(e)
		return nil, 0, fmt.Errorf("preparing %s: %w: the module starts with %s of memory and the instance's limit is %s; raise the limit or link the module with less",
			spec.InstanceID, runtime.ErrModuleInvalid, bytesText(need), bytesText(limit))
	}
	return e, limit, nil
}

// Close frees all modules. Instances that are still open keep theirs until they
// are closed.
func (r *Runtime) Close(context.Context) error {
	r.loader.close()
	return nil
}
