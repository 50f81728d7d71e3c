package provider

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
)

// Host runs the providers of this node. It is safe for concurrent use.
type Host struct {
	kinds map[string]Kind
	log   *slog.Logger

	mu     sync.RWMutex
	open   map[string]*hosted       // those that take calls
	busy   map[string]chan struct{} // those being opened or closed; closed afterwards
	closed bool
}

// hosted is one open provider.
type hosted struct {
	kind     string
	provider Provider
	calls    sync.WaitGroup // Add only under Host.mu while it is in Host.open
}

// NewHost returns a Host that can open providers of the given kinds.
func NewHost(log *slog.Logger, kinds ...Kind) *Host {
	return &Host{kinds: byType(kinds), log: log, open: map[string]*hosted{}, busy: map[string]chan struct{}{}}
}

func byType(kinds []Kind) map[string]Kind {
	m := make(map[string]Kind, len(kinds))
	for _, k := range kinds {
		m[k.Type()] = k
	}
	return m
}

// Start opens a provider of a type and lets it take calls. One with the same id
// is stopped first, as by Stop; calls in between fail with ErrUnavailable. Its
// errors are those of Kind.Open and Stop, ErrInvalid for a type that this node
// cannot host, and ErrUnavailable after Close.
func (h *Host) Start(ctx context.Context, typ string, cfg Config) error {
	kind, ok := h.kinds[capabilityOf(typ)]
	if !ok {
		return Errorf(ErrInvalid, "this node cannot host providers of type %q", typ).
			With("provider", cfg.ID).With("type", typ)
	}
	for {
		if err := h.Stop(ctx, cfg.ID); err != nil {
			return err
		}
		if err := h.enter(ctx, cfg.ID); err != nil {
			return err
		}
		h.mu.RLock()
		_, running := h.open[cfg.ID]
		closed := h.closed
		h.mu.RUnlock()
		if closed {
			h.leave(cfg.ID)
			return unavailable(cfg.ID, "the node is shutting down")
		}
		if !running {
			break
		}
		h.leave(cfg.ID) // somebody else started it in between
	}
	defer h.leave(cfg.ID)
	p, err := kind.Open(ctx, cfg)
	if err != nil {
		return fmt.Errorf("open provider %s: %w", cfg.ID, err)
	}
	h.mu.Lock()
	h.open[cfg.ID] = &hosted{kind: typ, provider: p}
	h.mu.Unlock()
	h.log.InfoContext(ctx, "provider started", "provider", cfg.ID, "type", typ, "driver", cfg.Driver)
	return nil
}

// Stop makes calls of a provider fail with ErrUnavailable at once, waits for
// those in flight, and closes it. A provider that is not running is no error.
// When ctx ends first it returns ErrTimeout, and the provider is closed as soon
// as the calls in flight have finished.
func (h *Host) Stop(ctx context.Context, id string) error {
	if err := h.enter(ctx, id); err != nil {
		return err
	}
	h.mu.Lock()
	old, running := h.open[id]
	delete(h.open, id)
	h.mu.Unlock()
	if !running {
		h.leave(id)
		return nil
	}
	done := make(chan error, 1)
	go func() {
		defer h.leave(id)
		old.calls.Wait()
		done <- old.provider.Close()
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("close provider %s: %w", id, err)
		}
		h.log.InfoContext(ctx, "provider stopped", "provider", id)
		return nil
	case <-ctx.Done():
		return Errorf(ErrTimeout, "provider %s still has calls in flight", id).With("provider", id).Because(ctx.Err())
	}
}

// Close stops every provider, as by Stop, and makes Start fail. It returns when
// all are closed or ctx has ended.
func (h *Host) Close(ctx context.Context) error {
	h.mu.Lock()
	h.closed = true
	ids := map[string]struct{}{}
	for id := range h.open {
		ids[id] = struct{}{}
	}
	for id := range h.busy {
		ids[id] = struct{}{}
	}
	h.mu.Unlock()
	var mu sync.Mutex
	var problems []error
	var wg sync.WaitGroup
	for id := range ids {
		wg.Go(func() {
			if err := h.Stop(ctx, id); err != nil {
				mu.Lock()
				defer mu.Unlock()
				problems = append(problems, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(problems...)
}

// Running returns the ids of the providers that take calls, sorted.
func (h *Host) Running() []string {
	h.mu.RLock()
	defer h.mu.RUnlock()
	ids := make([]string, 0, len(h.open))
	for id := range h.open {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Invoke calls a provider of this node. It authorises nothing: only Router may
// be its caller. It fails with ErrUnavailable when the provider does not run here.
func (h *Host) Invoke(ctx context.Context, id, capability string, call Call) ([]byte, error) {
	h.mu.RLock()
	p, running := h.open[id]
	if running {
		p.calls.Add(1)
	}
	h.mu.RUnlock()
	if !running {
		return nil, unavailable(id, "it does not run on its node")
	}
	defer p.calls.Done()
	if p.kind != typeOf(capability) {
		return nil, Errorf(ErrInvalid, "provider %s is of type %s and does not serve %s", id, p.kind, capability).
			With("provider", id).With("type", p.kind)
	}
	// A provider asks again where its effect happens; this is for one that cannot.
	if err := call.Admit(); err != nil {
		return nil, err
	}
	return p.provider.Invoke(ctx, call)
}

// enter waits until no other step of the provider's life is under way.
func (h *Host) enter(ctx context.Context, id string) error {
	for {
		h.mu.Lock()
		busy, taken := h.busy[id]
		if !taken {
			h.busy[id] = make(chan struct{})
			h.mu.Unlock()
			return nil
		}
		h.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return Errorf(ErrTimeout, "provider %s is still being opened or closed", id).With("provider", id).Because(ctx.Err())
		}
	}
}

func (h *Host) leave(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.busy[id])
	delete(h.busy, id)
}

func unavailable(id, why string) *Error {
	return Errorf(ErrUnavailable, "provider %s does not take calls: %s", id, why).
		With("provider", id).NextStep("wasmatrix provider get %s", id)
}
