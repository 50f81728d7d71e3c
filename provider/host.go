package provider

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"
)

// cutPatience is how long calls that were cut off may take to notice it.
const cutPatience = time.Second

// Host runs the providers of this node. It is safe for concurrent use.
type Host struct {
	kinds map[string]Kind
	log   *slog.Logger

	mu       sync.RWMutex
	open     map[string]*hosted       // those that take calls
	leaving  map[string]*hosted       // those that Drain took out and Stop has not closed
	updating map[string]chan struct{} // whose calls wait for an update; closed afterwards
	busy     map[string]chan struct{} // those being opened or closed; closed afterwards
	closed   bool
}

// NewHost returns a Host that can open providers of the given kinds.
func NewHost(log *slog.Logger, kinds ...Kind) *Host {
	return &Host{
		kinds: byType(kinds), log: log, open: map[string]*hosted{}, leaving: map[string]*hosted{},
		updating: map[string]chan struct{}{}, busy: map[string]chan struct{}{},
	}
}

func byType(kinds []Kind) map[string]Kind {
	m := make(map[string]Kind, len(kinds))
	for _, k := range kinds {
		m[k.Type()] = k
	}
	return m
}

func (h *Host) kind(typ, id string) (Kind, error) {
	kind, ok := h.kinds[capabilityOf(typ)]
	if !ok {
		return nil, Errorf(ErrInvalid, "this node cannot host providers of type %q", typ).
			With("provider", id).With("type", typ)
	}
	return kind, nil
}

// Start opens a provider of a type and lets it take calls. One with the same id
// is stopped first, with cfg.StopGrace for its calls; calls in between fail with
// ErrUnavailable. Its errors are those of Kind.Open, ErrInvalid for a type that
// this node cannot host, ErrTimeout when the one before does not end, and
// ErrUnavailable after Close.
func (h *Host) Start(ctx context.Context, typ string, cfg Config) error {
	kind, err := h.kind(typ, cfg.ID)
	if err != nil {
		return err
	}
	if err := h.enter(ctx, cfg.ID); err != nil {
		return err
	}
	if old := h.takeOut(cfg.ID); old != nil {
		if _, ended := old.end(ctx, cfg.grace()); !ended {
			h.closeLater(cfg.ID, old)
			return stillBusy(cfg.ID)
		}
		if err := old.provider.Close(); err != nil {
			h.log.WarnContext(ctx, "closing a provider failed", "provider", cfg.ID, "error", err)
		}
	}
	defer h.leave(cfg.ID)
	if h.isClosed() {
		return unavailable(cfg.ID, "the node is shutting down")
	}
	return h.openNew(ctx, kind, typ, cfg, nil)
}

// openNew opens a provider and lets it take calls in the place of old, which may
// be nil. Its caller has entered.
func (h *Host) openNew(ctx context.Context, kind Kind, typ string, cfg Config, old *hosted) error {
	p, err := kind.Open(ctx, cfg)
	if err != nil {
		return fmt.Errorf("open provider %s: %w", cfg.ID, err)
	}
	h.mu.Lock()
	drained := h.open[cfg.ID] != old
	if !drained {
		h.open[cfg.ID] = newHosted(typ, cfg, p)
	}
	h.mu.Unlock()
	if drained {
		return errors.Join(unavailable(cfg.ID, "it is stopping"), p.Close())
	}
	h.log.InfoContext(ctx, "provider started", "provider", cfg.ID, "type", typ, "driver", cfg.Driver)
	return nil
}

// Drain makes calls of a provider fail with ErrUnavailable from now on, and
// returns how many are under way. Stop waits for those and closes it.
func (h *Host) Drain(id string) (inFlight int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, running := h.open[id]
	if !running {
		return 0
	}
	delete(h.open, id)
	h.leaving[id] = old
	return int(old.calls.Load())
}

// Stop makes calls of a provider fail with ErrUnavailable at once, waits for
// those in flight, and closes it. A provider that is not running is no error.
// When ctx ends first the contexts of the calls in flight end too, and the
// provider is closed once they have returned; Stop then fails with ErrTimeout.
func (h *Host) Stop(ctx context.Context, id string) error {
	if err := h.enter(ctx, id); err != nil {
		return err
	}
	old := h.takeOut(id)
	if old == nil {
		h.leave(id)
		return nil
	}
	cut, ended := old.end(ctx, 0)
	if !ended {
		h.closeLater(id, old)
		return stillBusy(id)
	}
	defer h.leave(id)
	if err := old.provider.Close(); err != nil {
		return fmt.Errorf("close provider %s: %w", id, err)
	}
	h.log.InfoContext(ctx, "provider stopped", "provider", id, "calls_cut_off", cut)
	if cut > 0 {
		return Errorf(ErrTimeout, "%d calls in flight of provider %s were cut off", cut, id).
			With("provider", id).With("calls", strconv.Itoa(cut))
	}
	return nil
}

// takeOut takes a provider out of those that take calls or leave.
func (h *Host) takeOut(id string) *hosted {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.open[id]
	if old == nil {
		old = h.leaving[id]
	}
	delete(h.open, id)
	delete(h.leaving, id)
	return old
}

// closeLater closes a provider whose calls do not end, when they have.
func (h *Host) closeLater(id string, old *hosted) {
	go func() {
		defer h.leave(id)
		<-old.idle
		if err := old.provider.Close(); err != nil {
			h.log.Warn("closing a provider failed", "provider", id, "error", err)
		}
	}()
}

func stillBusy(id string) error {
	return Errorf(ErrTimeout, "provider %s still has calls in flight", id).With("provider", id)
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
	for id := range h.leaving {
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

func (h *Host) isClosed() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.closed
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

// Serves reports whether a provider takes calls.
func (h *Host) Serves(id string) bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	_, running := h.open[id]
	return running
}

// Invoke calls a provider of this node. It authorises nothing: only Router may
// be its caller. It fails with ErrUnavailable when the provider does not run here;
// while it is updated the call waits.
func (h *Host) Invoke(ctx context.Context, id, capability string, call Call) ([]byte, error) {
	h.mu.RLock()
	p, running := h.open[id]
	if running {
		p.calls.Add(1)
	}
	h.mu.RUnlock()
	if !running {
		var err error
		if p, err = h.await(ctx, id); err != nil {
			return nil, err
		}
	}
	defer p.done()
	if p.kind != typeOf(capability) {
		return nil, Errorf(ErrInvalid, "provider %s is of type %s and does not serve %s", id, p.kind, capability).
			With("provider", id).With("type", p.kind)
	}
	// A provider asks again where its effect happens; this is for one that cannot.
	if err := call.Admit(); err != nil {
		return nil, err
	}
	within := callContext{Context: ctx, at: p}
	defer within.release()
	answer, err := p.provider.Invoke(&within, call)
	if err != nil && p.cutOff.Load() && ctx.Err() == nil && errors.Is(err, context.Canceled) {
		return nil, unavailable(id, "it was stopped before the call ended").With(DetailOutcome, OutcomeUnknown).Because(err)
	}
	return answer, err
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
