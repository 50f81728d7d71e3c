package microvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// verdictTTL is how long a module that could not be compiled within its bounds is
// refused without trying again.
const verdictTTL = 5 * time.Minute

// templateKey names a template by all that it depends on.
type templateKey struct {
	// driver is the driver's key.
	driver string
	// size is the memory of the machine in bytes.
	size uint64
	// digest is the module's; empty for a base template.
	digest string
}

// entry is a template that exists or is being made.
type entry struct {
	key   templateKey
	ready chan struct{}
	// template and err are set before ready is closed.
	template vmm.Template
	err      error

	// The rest is guarded by templates.
	used  time.Time
	until time.Time // when err is forgotten
	refs  int
	gone  bool // dropped: it is closed with its last user
	// spares are paused clones that nobody has used; filling counts those being made.
	spares  []*link
	filling int
}

// templates makes each template once and keeps those that were used last.
type templates struct {
	limit uint64
	build func(ctx context.Context, key templateKey, spec runtime.Spec) (vmm.Template, error)
	work  *sync.WaitGroup
	// life ends when the runtime closes; making goes on without the one who asked.
	life context.Context //nolint:containedctx // see above

	mu      sync.Mutex
	entries map[templateKey]*entry
}

// acquire returns a template, making it if need be; it must be released. When ctx
// ends, the making goes on for those who come later.
func (t *templates) acquire(ctx context.Context, key templateKey, spec runtime.Spec) (*entry, error) {
	t.mu.Lock()
	if t.life.Err() != nil {
		t.mu.Unlock()
		return nil, errors.New("the runtime is closed")
	}
	e := t.entries[key]
	if e != nil && e.expired() {
		delete(t.entries, key)
		e = nil
	}
	if e == nil {
		e = &entry{key: key, ready: make(chan struct{})}
		t.entries[key] = e
		t.work.Go(func() { t.make(e, spec) })
	}
	e.refs++
	e.used = time.Now()
	t.mu.Unlock()
	select {
	case <-e.ready:
	case <-ctx.Done():
		t.release(e)
		return nil, fmt.Errorf("waiting for a virtual machine's template: %w", ctx.Err())
	}
	if e.err != nil {
		t.release(e)
		return nil, e.err
	}
	return e, nil
}

func (e *entry) expired() bool {
	select {
	case <-e.ready:
		return e.err != nil && !time.Now().Before(e.until)
	default:
		return false
	}
}

// make makes a template and wakes those who wait for it. A failure is told to
// them and to nobody after them, unless the module is at fault for long.
func (t *templates) make(e *entry, spec runtime.Spec) {
	template, err := t.build(t.life, e.key, spec)
	t.mu.Lock()
	e.template, e.err = template, err
	switch {
	case err == nil:
	case errors.Is(err, errTooExpensive):
		e.until = time.Now().Add(verdictTTL)
	default:
		delete(t.entries, e.key)
	}
	close(e.ready)
	doomed := t.evictLocked()
	t.mu.Unlock()
	closeAll(doomed)
}

// release gives a template back.
func (t *templates) release(e *entry) {
	t.mu.Lock()
	e.refs--
	var doomed []*entry
	if e.gone && e.refs == 0 {
		doomed = append(doomed, e)
	}
	t.mu.Unlock()
	closeAll(doomed)
}

// drop forgets a template that turned out to be of no use, so that the next one
// who asks has it made again.
func (t *templates) drop(e *entry) {
	t.mu.Lock()
	doomed := t.dropLocked(e)
	t.mu.Unlock()
	closeAll(doomed)
}

func (t *templates) dropLocked(e *entry) []*entry {
	if e.gone {
		return nil
	}
	e.gone = true
	if t.entries[e.key] == e {
		delete(t.entries, e.key)
	}
	if e.refs == 0 {
		return []*entry{e}
	}
	return nil
}

// evictLocked takes out templates of modules that are too many, and those of a
// driver that has changed. Base templates stay: all others are made from them.
func (t *templates) evictLocked() (doomed []*entry) {
	var total uint64
	var candidates []*entry
	for _, e := range t.entries {
		if e.template == nil || e.key.digest == "" {
			continue
		}
		total += e.template.Bytes()
		candidates = append(candidates, e)
	}
	slices.SortFunc(candidates, func(a, b *entry) int { return cmp.Compare(a.used.UnixNano(), b.used.UnixNano()) })
	for _, e := range candidates {
		if total <= t.limit || e == candidates[len(candidates)-1] {
			break
		}
		total -= e.template.Bytes()
		doomed = append(doomed, t.dropLocked(e)...)
	}
	return doomed
}

// dropStale forgets all templates of another driver key.
func (t *templates) dropStale(driver string) {
	t.mu.Lock()
	var doomed []*entry
	for key, e := range t.entries {
		if key.driver != driver && e.template != nil {
			doomed = append(doomed, t.dropLocked(e)...)
		}
	}
	t.mu.Unlock()
	closeAll(doomed)
}

// close forgets all templates. Nobody uses any more.
func (t *templates) close() {
	t.mu.Lock()
	var doomed []*entry
	for _, e := range t.entries {
		doomed = append(doomed, t.dropLocked(e)...)
	}
	t.mu.Unlock()
	closeAll(doomed)
}

// closeAll frees what nobody uses any more.
func closeAll(doomed []*entry) {
	for _, e := range doomed {
		for _, l := range e.spares {
			l.machine.Kill()
		}
		if e.template != nil {
			_ = e.template.Close() // it was only read
		}
	}
}

// size returns how many templates there are, and the memory that they take.
func (t *templates) size() (count int, bytes uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.entries {
		if e.template != nil {
			count++
			bytes += e.template.Bytes()
		}
	}
	return count, bytes
}

// takeSpare returns a paused clone if there is one that lives.
func (t *templates) takeSpare(e *entry) *link {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(e.spares) > 0 {
		l := e.spares[len(e.spares)-1]
		e.spares = e.spares[:len(e.spares)-1]
		select {
		case <-l.machine.Ended():
		default:
			return l
		}
	}
	return nil
}

// wantSpare reports whether the caller shall make a spare and put it; it must.
func (t *templates) wantSpare(e *entry, most int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.gone || t.life.Err() != nil || len(e.spares)+e.filling >= most {
		return false
	}
	e.filling++
	e.refs++
	return true
}

// putSpare keeps a clone, nil when none could be made, and gives the template back.
func (t *templates) putSpare(e *entry, l *link) {
	t.mu.Lock()
	e.filling--
	unwanted := l != nil && (e.gone || t.life.Err() != nil)
	if l != nil && !unwanted {
		e.spares = append(e.spares, l)
	}
	t.mu.Unlock()
	if unwanted {
		l.machine.Kill()
	}
	t.release(e)
}
