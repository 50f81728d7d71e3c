package provider

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// hosted is one open provider with its calls in flight.
type hosted struct {
	kind     string
	cfg      Config
	provider Provider

	// calls counts those in flight. It grows only under Host.mu while the provider
	// is in Host.open.
	calls atomic.Int64
	// ending is set once no call is added any more; idle is closed when then the
	// last has ended.
	ending atomic.Bool
	idle   chan struct{}
	once   sync.Once
	// life ends when the calls in flight are cut off.
	life context.Context //nolint:containedctx // it is what the contexts of many calls end with
	// cutOff is set, and then cancel called, when they are.
	cutOff atomic.Bool
	cancel context.CancelFunc
}

func (p *hosted) cut() {
	p.cutOff.Store(true)
	p.cancel()
}

func newHosted(kind string, cfg Config, p Provider) *hosted {
	life, cancel := context.WithCancel(context.Background()) //nolint:forbidigo // ends with the provider, not with the call that opened it
	return &hosted{kind: kind, cfg: cfg, provider: p, idle: make(chan struct{}), life: life, cancel: cancel}
}

func (c *Config) grace() time.Duration {
	if c.StopGrace > 0 {
		return c.StopGrace
	}
	return DefaultStopGrace
}

// done says that a call has ended.
func (p *hosted) done() {
	if p.calls.Add(-1) == 0 && p.ending.Load() {
		p.once.Do(func() { close(p.idle) })
	}
}

// end waits for the calls in flight, for as long as ctx lives and, if it is not 0,
// no longer than grace; then it cuts off those that are left. It returns how many
// those were, and whether all have ended. No call may be added any more.
func (p *hosted) end(ctx context.Context, grace time.Duration) (cut int, ended bool) {
	defer p.cut()
	p.ending.Store(true)
	if p.calls.Load() == 0 {
		p.once.Do(func() { close(p.idle) })
	}
	var late <-chan time.Time
	if grace > 0 {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-p.idle:
		return 0, true
	case <-late:
	case <-ctx.Done():
	}
	cut = int(p.calls.Load())
	p.cut()
	patience := time.NewTimer(cutPatience)
	defer patience.Stop()
	select {
	case <-p.idle:
		return cut, true
	case <-patience.C:
		return cut, false
	}
}

// callContext is the context of one call in flight: the caller's, which also ends
// when the provider's calls are cut off. Most calls in memory never wait, so what
// it takes to be told of that is made only once somebody asks.
type callContext struct {
	context.Context //nolint:containedctx // it is one

	at    *hosted
	bound atomic.Pointer[bound]
}

// bound is a context that ends with the caller's and with the provider's calls.
type bound struct {
	context.Context //nolint:containedctx // it is one

	cancel context.CancelFunc
	forget func() bool
}

func (b *bound) release() {
	b.forget()
	b.cancel()
}

// Done returns the channel that is closed when the call is to end.
func (c *callContext) Done() <-chan struct{} {
	b := c.bound.Load()
	if b == nil {
		b = &bound{}
		b.Context, b.cancel = context.WithCancel(c.Context)
		b.forget = context.AfterFunc(c.at.life, b.cancel)
		if !c.bound.CompareAndSwap(nil, b) {
			b.release()
			b = c.bound.Load()
		}
	}
	return b.Done()
}

// Err says why the call is to end; nil while it may go on.
func (c *callContext) Err() error {
	if err := c.Context.Err(); err != nil {
		return err
	}
	if c.at.cutOff.Load() {
		return context.Canceled
	}
	if b := c.bound.Load(); b != nil {
		return b.Err()
	}
	return nil
}

// Value returns what the caller's context holds. Contexts made from this one find
// in it the one that they end with.
func (c *callContext) Value(key any) any {
	if b := c.bound.Load(); b != nil {
		return b.Value(key)
	}
	return c.Context.Value(key)
}

// release frees what the context holds; it is for when the call has ended.
func (c *callContext) release() {
	if b := c.bound.Load(); b != nil {
		b.release()
	}
}
