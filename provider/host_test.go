package provider_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/provider"
)

func newHost(kind *fakeKind) *provider.Host {
	return provider.NewHost(slog.New(slog.DiscardHandler), kind)
}

func start(t *testing.T, h *provider.Host, id string) {
	t.Helper()
	if err := h.Start(t.Context(), "kv", provider.Config{ID: id}); err != nil {
		t.Fatalf("start %s: %v", id, err)
	}
}

// Calls in flight finish, later ones fail at once, and the provider is closed
// after the last.
func TestHostStopsUnderTwoHundredCallsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inFlight, closed atomic.Int64
		gate := make(chan struct{})
		kind := &fakeKind{typ: "kv", open: func(provider.Config) (provider.Provider, error) {
			return &fakeProvider{gate: gate, onEnd: func() { closed.Store(inFlight.Load() + 1000) }}, nil
		}}
		h := newHost(kind)
		start(t, h, "kv")
		var wg sync.WaitGroup
		for range 200 {
			inFlight.Add(1)
			wg.Go(func() {
				_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
				inFlight.Add(-1)
				if err != nil {
					t.Errorf("a call in flight: %v", err)
				}
			})
		}
		synctest.Wait()
		stopped := make(chan error, 1)
		go func() { stopped <- h.Stop(t.Context(), "kv") }()
		synctest.Wait()
		for range 10 {
			_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
			wantError(t, err, provider.ErrUnavailable, "does not take calls", "wasmatrix provider get kv")
		}
		if closed.Load() != 0 || inFlight.Load() != 200 {
			t.Errorf("closed %d, in flight %d: it must wait for its calls", closed.Load(), inFlight.Load())
		}
		close(gate)
		wg.Wait()
		if err := <-stopped; err != nil {
			t.Errorf("Stop: %v", err)
		}
		if closed.Load() < 1000 {
			t.Error("it was not closed")
		}
		start(t, h, "kv")
		if _, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{}); err != nil {
			t.Errorf("after it was started again: %v", err)
		}
		if err := h.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestHostStopGivesUpWaitingAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		closed := make(chan struct{})
		kind := &fakeKind{typ: "kv", open: func(provider.Config) (provider.Provider, error) {
			return &fakeProvider{gate: gate, deaf: true, onEnd: func() { close(closed) }}, nil
		}}
		h := newHost(kind)
		start(t, h, "kv")
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = h.Invoke(t.Context(), "kv", "kv", provider.Call{}) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := h.Stop(ctx, "kv"); !errors.Is(err, provider.ErrTimeout) {
			t.Errorf("Stop: %v, want ErrTimeout", err)
		}
		if err := h.Start(ctx, "kv", provider.Config{ID: "kv"}); !errors.Is(err, provider.ErrTimeout) {
			t.Errorf("Start while the old one is not closed: %v, want ErrTimeout", err)
		}
		close(gate)
		wg.Wait()
		<-closed
		if err := h.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Two providers never have the same directory open at once.
func TestHostReplacesOneAfterTheOther(t *testing.T) {
	defer goleak.VerifyNone(t)
	var open, most atomic.Int64
	kind := &fakeKind{typ: "kv", open: func(provider.Config) (provider.Provider, error) {
		if n := open.Add(1); n > most.Load() {
			most.Store(n)
		}
		return &fakeProvider{onEnd: func() { open.Add(-1) }}, nil
	}}
	h := newHost(kind)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 50 {
				var err error
				if i%5 == 4 {
					err = h.Stop(t.Context(), "kv")
				} else {
					err = h.Start(t.Context(), "kv", provider.Config{ID: "kv"})
				}
				if err != nil {
					t.Error(err)
				}
				if _, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{}); err != nil && !errors.Is(err, provider.ErrUnavailable) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d were open at once, want 1", most.Load())
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if open.Load() != 0 {
		t.Errorf("%d are still open after Close", open.Load())
	}
	if err := h.Start(t.Context(), "kv", provider.Config{ID: "kv"}); !errors.Is(err, provider.ErrUnavailable) {
		t.Errorf("Start after Close: %v, want ErrUnavailable", err)
	}
}

func TestHostStartFailures(t *testing.T) {
	broken := errors.New("no such disk")
	kind := &fakeKind{typ: "kv", open: func(cfg provider.Config) (provider.Provider, error) {
		if cfg.Driver == "broken" {
			return nil, broken
		}
		return &fakeProvider{}, nil
	}}
	h := newHost(kind)
	if err := h.Start(t.Context(), "teapot", provider.Config{ID: "x"}); !errors.Is(err, provider.ErrInvalid) {
		t.Errorf("unknown type: %v, want ErrInvalid", err)
	}
	if err := h.Start(t.Context(), "kv", provider.Config{ID: "kv", Driver: "broken"}); !errors.Is(err, broken) {
		t.Errorf("a driver that does not open: %v", err)
	}
	if got := h.Running(); len(got) != 0 {
		t.Errorf("running %v after failures", got)
	}
	start(t, h, "kv")
	start(t, h, "kv2")
	if got := fmt.Sprint(h.Running()); got != "[kv kv2]" {
		t.Errorf("running %v", got)
	}
	if _, err := h.Invoke(t.Context(), "kv", "http", provider.Call{}); !errors.Is(err, provider.ErrInvalid) {
		t.Errorf("a call of another capability: %v, want ErrInvalid", err)
	}
	if err := h.Stop(t.Context(), "never was"); err != nil {
		t.Errorf("stopping what does not run: %v", err)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
