package wasm

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// verdictTTL is how long a module that was too expensive to compile is refused
// without trying again.
const verdictTTL = 5 * time.Minute

// loader loads modules, each once, and keeps those that were used last.
type loader struct {
	limits   module.Limits
	wasi     map[string]module.FuncType
	disk     *diskCache // nil without a directory
	compiler compiler
	idleMax  int
	// singleUse keeps no spare slots.
	singleUse bool
	// reading bounds how many modules are held in memory whole at once.
	reading chan struct{}
	metrics *metrics
	logger  *slog.Logger

	// life ends when the runtime closes; loading goes on without the one who asked.
	life   context.Context //nolint:containedctx // see above
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu      sync.Mutex
	entries map[string]*entry
	idle    *list.List // of *entry, the one used last in front
}

// entry is a module that is loaded or being loaded.
type entry struct {
	digest string
	ready  chan struct{}
	// unit and err are set before ready is closed.
	unit *unit
	err  error
	// until is when a remembered error is forgotten.
	until time.Time
	// refs and place are guarded by the loader.
	refs  int
	place *list.Element
}

// acquire returns the module with this digest, loading it from path if need be.
// It must be released.
func (l *loader) acquire(ctx context.Context, digest, path string) (*entry, error) {
	l.mu.Lock()
	if l.life.Err() != nil {
		l.mu.Unlock()
		return nil, errors.New("the runtime is closed")
	}
	e := l.entries[digest]
	if e != nil && e.expired() {
		delete(l.entries, digest)
		e = nil
	}
	if e == nil {
		e = &entry{digest: digest, ready: make(chan struct{})}
		l.entries[digest] = e
		l.work.Go(func() { l.fill(e, path) })
	} else {
		l.metrics.lookups.inMemory.Inc()
	}
	e.refs++
	if e.place != nil {
		l.idle.Remove(e.place)
		e.place = nil
	}
	l.mu.Unlock()
	select {
	case <-e.ready:
	case <-ctx.Done():
		l.release(e)
		return nil, fmt.Errorf("waiting for the module to be compiled: %w", ctx.Err())
	}
	if e.err != nil {
		l.release(e)
		return nil, e.err
	}
	return e, nil
}

// expired reports whether a remembered error should be forgotten.
func (e *entry) expired() bool {
	select {
	case <-e.ready:
		return e.err != nil && !time.Now().Before(e.until)
	default:
		return false
	}
}

// release gives an entry back.
func (l *loader) release(e *entry) {
	l.mu.Lock()
	e.refs--
	l.settleLocked(e)
	closing := l.evictLocked()
	l.mu.Unlock()
	l.closeUnits(closing)
}

// settleLocked puts an entry without users among the idle ones.
func (l *loader) settleLocked(e *entry) {
	if e.refs == 0 && e.unit != nil && e.place == nil {
		e.place = l.idle.PushFront(e)
	}
}

// evictLocked takes out the idle entries that are too many.
func (l *loader) evictLocked() []*unit {
	keep := max(l.idleMax, 0)
	if l.life.Err() != nil {
		keep = 0
	}
	var closing []*unit
	for l.idle.Len() > keep {
		e, ok := l.idle.Remove(l.idle.Back()).(*entry)
		if !ok {
			continue
		}
		e.place = nil
		delete(l.entries, e.digest)
		closing = append(closing, e.unit)
	}
	return closing
}

func (l *loader) closeUnits(units []*unit) {
	for _, u := range units {
		l.metrics.loaded.Dec()
		if err := u.close(context.WithoutCancel(l.life)); err != nil {
			l.logger.Warn("freeing a module", "error", err)
		}
	}
}

// fill loads an entry and wakes those who wait for it.
func (l *loader) fill(e *entry, path string) {
	u, err := l.load(e.digest, path)
	if err != nil {
		l.metrics.failures.WithLabelValues(refusal(err)).Inc()
	}
	l.mu.Lock()
	e.unit, e.err = u, err
	switch {
	case err == nil:
		l.metrics.loaded.Inc()
	case errors.Is(err, errTooExpensive):
		e.until = time.Now().Add(verdictTTL)
	default:
		delete(l.entries, e.digest)
	}
	close(e.ready)
	l.settleLocked(e)
	closing := l.evictLocked()
	l.mu.Unlock()
	l.closeUnits(closing)
}

func refusal(err error) string {
	switch {
	case errors.Is(err, errTooExpensive):
		return "expensive"
	case errors.Is(err, runtime.ErrModuleInvalid):
		return "invalid"
	default:
		return "internal"
	}
}

// load reads a module, checks it, and gets it compiled.
func (l *loader) load(digest, path string) (*unit, error) {
	u, s, metered, err := l.prepare(digest, path)
	if u != nil || err != nil {
		return u, err
	}
	began := time.Now()
	if l.disk == nil {
		u, err = newUnit(l.life, metered, s, "")
		l.metrics.compile.Observe(time.Since(began).Seconds())
		return u, invalid(err)
	}
	if err := l.disk.build(l.life, digest, metered, l.compiler.compile); err != nil {
		return nil, invalid(err)
	}
	took := time.Since(began)
	l.metrics.compile.Observe(took.Seconds())
	l.logger.Info("module compiled", "digest", digest, "metered_bytes", len(metered), "duration", took)
	u, err = l.open(digest, s)
	return u, invalid(err)
}

// prepare returns the module when it is on disk already, else what has to be
// compiled. It does not wait for compilations of others.
func (l *loader) prepare(digest, path string) (u *unit, s shape, metered []byte, err error) {
	l.reading <- struct{}{}
	defer func() { <-l.reading }()
	binary, err := readModule(path, l.limits)
	if err != nil {
		return nil, s, nil, err
	}
	m, err := module.Decode(binary, l.limits)
	if err == nil {
		s, err = inspect(m, l.wasi)
	}
	if err != nil {
		return nil, s, nil, fmt.Errorf("%w: %w", runtime.ErrModuleInvalid, err)
	}
	if l.disk != nil {
		if u, err = l.fromDisk(digest, s); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return u, s, nil, err
		}
	}
	l.metrics.lookups.nowhere.Inc()
	if metered, err = m.Meter(); err != nil {
		return nil, s, nil, fmt.Errorf("%w: %w", runtime.ErrModuleInvalid, err)
	}
	return nil, s, metered, nil
}

// fromDisk loads a module from the cache on disk; fs.ErrNotExist means that it
// has to be compiled.
func (l *loader) fromDisk(digest string, s shape) (*unit, error) {
	u, err := l.open(digest, s)
	switch {
	case err == nil:
		l.metrics.lookups.onDisk.Inc()
		return u, nil
	case errors.Is(err, errCorrupt):
		l.metrics.corrupt.Inc()
		l.logger.Warn("module cache entry is damaged, compiling again", "digest", digest, "error", err)
		return nil, fs.ErrNotExist
	default:
		return nil, err
	}
}

func (l *loader) open(digest string, s shape) (*unit, error) {
	dir, metered, err := l.disk.load(digest)
	if err != nil {
		return nil, err
	}
	return newUnit(l.life, metered, s, dir)
}

// invalid marks what wazero rejects as an invalid module.
func invalid(err error) error {
	if errors.Is(err, errRejected) && !errors.Is(err, runtime.ErrModuleInvalid) {
		return fmt.Errorf("%w: %w", runtime.ErrModuleInvalid, err)
	}
	return err
}

// readModule reads a module without taking more memory than its limit.
func readModule(path string, limits module.Limits) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the module: %w", err)
	}
	defer func() { _ = file.Close() }() // it was only read
	size := limits.Bytes
	if size == 0 {
		size = module.DefaultLimits().Bytes
	}
	binary, err := io.ReadAll(io.LimitReader(file, int64(size)+1))
	if err != nil {
		return nil, fmt.Errorf("reading the module: %w", err)
	}
	return binary, nil
}

// close ends all loading and frees the modules that nobody uses.
func (l *loader) close() {
	l.cancel()
	l.work.Wait()
	l.mu.Lock()
	closing := l.evictLocked()
	l.mu.Unlock()
	l.closeUnits(closing)
}
