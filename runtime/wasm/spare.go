package wasm

import (
	"context"
	"sync"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// maxSpareBytes is the most memory a module may start with for a spare slot of it
// to be kept.
const maxSpareBytes = 64 << 20

// spare is a slot of a module that is instantiated before any instance needs it:
// for a guest with tens of thousands of functions in its tables, as Go makes
// them, that takes most of a start. No code of the guest has run in it.
type spare struct {
	mu      sync.Mutex
	slot    *slot
	limit   uint64
	filling bool
	closed  bool
}

// take returns the spare slot if there is one for instances with this memory limit.
func (p *spare) take(limit uint64) *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.slot == nil || p.limit != limit {
		return nil
	}
	s := p.slot
	p.slot = nil
	return s
}

// want reports whether the caller shall make a spare slot and put it; it must.
func (p *spare) want(limit uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.filling || p.closed || p.slot != nil && p.limit == limit {
		return false
	}
	p.filling = true
	return true
}

// put keeps a slot as the spare one, in place of the one before; nil when none
// could be made.
func (p *spare) put(s *slot, limit uint64) {
	p.mu.Lock()
	old := s
	if !p.closed && s != nil {
		old, p.slot, p.limit = p.slot, s, limit
	}
	p.filling = false
	p.mu.Unlock()
	if old != nil {
		old.close()
	}
}

// close frees the spare slot; none is kept any more.
func (p *spare) close() {
	p.mu.Lock()
	s := p.slot
	p.slot, p.closed = nil, true
	p.mu.Unlock()
	if s != nil {
		s.close()
	}
}

// slotFor returns a slot for an instance: the spare one of its module, or a new one.
func (l *loader) slotFor(i *instance) *slot {
	s := i.unit.spare.take(i.limit)
	if s == nil {
		s = &slot{unit: i.unit, memory: linearMemory{account: &i.memory, limit: i.limit}}
	}
	s.instance = i
	s.memory.move(&i.memory)
	return s
}

// keepSpare sees to it that the next start of the module finds a slot that is
// instantiated. It returns at once.
func (l *loader) keepSpare(e *entry, limit uint64) {
	if l.singleUse || !e.unit.wantsSpare(limit) {
		return
	}
	l.mu.Lock()
	if l.life.Err() != nil {
		l.mu.Unlock()
		e.unit.spare.put(nil, 0)
		return
	}
	e.refs++
	l.work.Go(func() {
		defer l.release(e)
		l.fillSpare(e.unit, limit)
	})
	l.mu.Unlock()
}

// wantsSpare reports whether the caller shall make a spare slot; it must. A module
// whose instantiation runs code of the guest gets none.
func (u *unit) wantsSpare(limit uint64) bool {
	return !u.shape.start && u.shape.memory <= maxSpareBytes && u.spare.want(limit)
}

// fillSpare instantiates a spare slot.
func (l *loader) fillSpare(u *unit, limit uint64) {
	s := &slot{unit: u, memory: linearMemory{account: &account{gauge: l.metrics.spare}, limit: limit}}
	if err := s.enter(call{caller: l.life}, func(ctx context.Context) error { return s.instantiate(ctx) }); err != nil {
		// The next instance of this module meets the same and says so.
		s.close()
		s = nil
	}
	u.spare.put(s, limit)
}

// Warm makes the next start of a module quick: the module is compiled and kept as
// if an instance had used it, and a slot is instantiated for instances with the
// memory limit of spec, which needs only that, Digest and ModulePath. No code of
// the guest runs. It fails as Prepare does.
func (r *Runtime) Warm(ctx context.Context, spec runtime.Spec) error {
	e, limit, err := r.load(ctx, spec)
	if err != nil {
		return err
	}
	defer r.loader.release(e)
	if e.unit.wantsSpare(limit) {
		r.loader.fillSpare(e.unit, limit)
	}
	return nil
}
