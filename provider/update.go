package provider

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// maxUpdateWait bounds how long a call waits for an update.
	maxUpdateWait = 15 * time.Second
	// reopenTimeout bounds the opening of the old configuration when the new one failed.
	reopenTimeout = 30 * time.Second
)

// Follow passes the messages on a subject of a messaging provider of this node
// to sink, as Follower says. It fails with ErrUnavailable when the provider does
// not run here, and with ErrInvalid when it cannot be listened to.
func (h *Host) Follow(ctx context.Context, id, subject string, sink func(message []byte, dropped uint64) error) error {
	h.mu.RLock()
	p, running := h.open[id]
	h.mu.RUnlock()
	if !running {
		return unavailable(id, "it does not run on its node")
	}
	follower, ok := p.provider.(Follower)
	if !ok {
		return Errorf(ErrInvalid, "provider %s has no messages to listen to", id).With("provider", id)
	}
	return follower.Follow(ctx, subject, sink)
}

// Update gives a running provider another driver or configuration without a
// failing call: those in flight finish on the old one, within cfg.StopGrace, and
// those that arrive meanwhile wait for the new one. Where both can be open at the
// same time (Overlapping) nobody waits, and the old one is closed in the
// background.
//
// When it fails, the old configuration goes on, or is opened again; Serves tells
// whether that worked. A provider that is not running is opened as by Start. Its
// errors are those of Start.
func (h *Host) Update(ctx context.Context, typ string, cfg Config) error {
	kind, err := h.kind(typ, cfg.ID)
	if err != nil {
		return err
	}
	if err := h.enter(ctx, cfg.ID); err != nil {
		return err
	}
	h.mu.RLock()
	old, closed := h.open[cfg.ID], h.closed
	h.mu.RUnlock()
	switch {
	case closed:
		err = unavailable(cfg.ID, "the node is shutting down")
	case old == nil:
		err = h.openNew(ctx, kind, typ, cfg, nil)
	case overlapping(kind, old, typ, cfg):
		return h.swap(ctx, kind, typ, cfg, old)
	default:
		err = h.exchange(ctx, kind, typ, cfg, old)
	}
	h.leave(cfg.ID)
	return err
}

func overlapping(kind Kind, old *hosted, typ string, next Config) bool {
	k, able := kind.(Overlapping)
	return able && old.kind == typ && k.Overlapping(old.cfg, next)
}

// swap opens the new one beside the old one. It leaves when the old one is closed.
func (h *Host) swap(ctx context.Context, kind Kind, typ string, cfg Config, old *hosted) error {
	if err := h.openNew(ctx, kind, typ, cfg, old); err != nil {
		h.leave(cfg.ID)
		return err
	}
	go func() {
		background := context.WithoutCancel(ctx)
		if _, ended := old.end(background, cfg.grace()); !ended {
			<-old.idle
		}
		if err := old.provider.Close(); err != nil {
			h.log.WarnContext(background, "closing a provider failed", "provider", cfg.ID, "error", err)
		}
		h.leave(cfg.ID)
	}()
	return nil
}

// exchange closes the old one, opens the new one, and lets calls wait meanwhile.
func (h *Host) exchange(ctx context.Context, kind Kind, typ string, cfg Config, old *hosted) error {
	done := make(chan struct{})
	h.mu.Lock()
	if h.open[cfg.ID] != old { // drained in between
		h.mu.Unlock()
		return unavailable(cfg.ID, "it is stopping")
	}
	delete(h.open, cfg.ID)
	h.updating[cfg.ID] = done
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.updating, cfg.ID)
		h.mu.Unlock()
		close(done)
	}()
	if _, ended := old.end(ctx, cfg.grace()); !ended {
		h.mu.Lock()
		h.open[cfg.ID] = newHosted(old.kind, old.cfg, old.provider) // its Close waits for what is left
		h.mu.Unlock()
		return stillBusy(cfg.ID)
	}
	if err := old.provider.Close(); err != nil {
		h.log.WarnContext(ctx, "closing a provider failed", "provider", cfg.ID, "error", err)
	}
	err := h.openNew(ctx, kind, typ, cfg, nil)
	if err == nil {
		return nil
	}
	again, cancel := context.WithTimeout(context.WithoutCancel(ctx), reopenTimeout)
	defer cancel()
	if oldErr := h.openNew(again, h.kinds[capabilityOf(old.kind)], old.kind, old.cfg, nil); oldErr != nil {
		return errors.Join(err, fmt.Errorf("and the configuration before it: %w", oldErr))
	}
	return err
}

// await waits for an update and takes up a call of the updated provider.
func (h *Host) await(ctx context.Context, id string) (*hosted, error) {
	timer := time.NewTimer(maxUpdateWait)
	defer timer.Stop()
	for {
		h.mu.RLock()
		p, running := h.open[id]
		if running {
			p.calls.Add(1)
		}
		updating := h.updating[id]
		h.mu.RUnlock()
		switch {
		case running:
			return p, nil
		case updating == nil:
			return nil, unavailable(id, "it does not run on its node")
		}
		select {
		case <-updating:
		case <-timer.C:
			return nil, unavailable(id, "its configuration is being changed")
		case <-ctx.Done():
			return nil, FromContext(ctx)
		}
	}
}
