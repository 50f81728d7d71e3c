package provider_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// overlapping is a kind whose providers may be open twice.
type overlapping struct{ *fakeKind }

func (overlapping) Overlapping(_, _ provider.Config) bool { return true }

// timed is a provider whose calls take some time, and that tells how many are open.
type timed struct {
	driver string
	open   *atomic.Int64
	takes  time.Duration
	closed atomic.Bool
}

func (p *timed) Invoke(ctx context.Context, _ provider.Call) ([]byte, error) {
	if p.closed.Load() {
		return nil, errors.New("a call of a closed provider")
	}
	select {
	case <-time.After(p.takes):
		return []byte(p.driver), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *timed) Close() error {
	p.closed.Store(true)
	p.open.Add(-1)
	return nil
}

// Two hundred callers at any moment, fifty updates: no call fails, each is answered
// by the configuration that it met, and two are never open at the same time unless
// the kind allows it.
func TestUpdatesUnderTwoHundredCalls(t *testing.T) {
	for _, both := range []bool{false, true} {
		t.Run(fmt.Sprintf("both open is allowed %t", both), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var open, most atomic.Int64
				fake := &fakeKind{typ: "kv", open: func(cfg provider.Config) (provider.Provider, error) {
					if now := open.Add(1); now > most.Load() {
						most.Store(now)
					}
					return &timed{driver: cfg.Driver, open: &open, takes: 30 * time.Millisecond}, nil
				}}
				var kind provider.Kind = fake
				if both {
					kind = overlapping{fake}
				}
				n := newNode(t, nil)
				h := provider.NewHost(n.log(), kind)
				if err := h.Start(t.Context(), "kv", provider.Config{ID: "kv", Driver: "v0"}); err != nil {
					t.Fatal(err)
				}
				var done atomic.Int64
				end := make(chan struct{})
				var wg sync.WaitGroup
				for range 200 {
					wg.Go(func() {
						for last := 0; ; {
							select {
							case <-end:
								return
							default:
							}
							got, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
							var version int
							if _, scan := fmt.Sscanf(string(got), "v%d", &version); err != nil || scan != nil || version < last {
								t.Errorf("%q after v%d: %v", got, last, err)
								return
							}
							last = version
							done.Add(1)
						}
					})
				}
				for v := 1; v <= 50; v++ {
					time.Sleep(45 * time.Millisecond)
					if err := h.Update(t.Context(), "kv", provider.Config{ID: "kv", Driver: fmt.Sprintf("v%d", v)}); err != nil {
						t.Errorf("update %d: %v", v, err)
					}
				}
				if got, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{}); err != nil || string(got) != "v50" {
					t.Errorf("at last %q, %v", got, err)
				}
				close(end)
				wg.Wait()
				if want := map[bool]int64{false: 1, true: 2}[both]; most.Load() != want || done.Load() < 5000 {
					t.Errorf("at most %d were open at once, want %d; %d calls", most.Load(), want, done.Load())
				}
				if err := h.Close(t.Context()); err != nil || open.Load() != 0 {
					t.Errorf("%d are left open: %v", open.Load(), err)
				}
			})
		})
	}
}

// What cannot be opened leaves the configuration before it in its place.
func TestAFailedUpdateChangesNothing(t *testing.T) {
	for _, both := range []bool{false, true} {
		var open atomic.Int64
		broken := errors.New("no such disk")
		refused := map[string]bool{"bad": true}
		fake := &fakeKind{typ: "kv", open: func(cfg provider.Config) (provider.Provider, error) {
			if refused[cfg.Driver] {
				return nil, broken
			}
			open.Add(1)
			return &timed{driver: cfg.Driver, open: &open}, nil
		}}
		var kind provider.Kind = fake
		if both {
			kind = overlapping{fake}
		}
		n := newNode(t, nil)
		h := provider.NewHost(n.log(), kind)
		if err := h.Start(t.Context(), "kv", provider.Config{ID: "kv", Driver: "good"}); err != nil {
			t.Fatal(err)
		}
		if err := h.Update(t.Context(), "kv", provider.Config{ID: "kv", Driver: "bad"}); !errors.Is(err, broken) || !h.Serves("kv") {
			t.Errorf("update: %v, serves %t", err, h.Serves("kv"))
		}
		if got, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{}); err != nil || string(got) != "good" || open.Load() != 1 {
			t.Errorf("afterwards %q, %v, %d open", got, err, open.Load())
		}
		refused["good"] = true
		err := h.Update(t.Context(), "kv", provider.Config{ID: "kv", Driver: "bad"})
		if both != h.Serves("kv") || !errors.Is(err, broken) {
			t.Errorf("with the old one broken too: serves %t, %v", h.Serves("kv"), err)
		}
		if !both {
			_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
			wantError(t, err, provider.ErrUnavailable, "does not run", "")
		}
		if err := h.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// A call waits for an update no longer than its deadline, nor than a bound.
func TestWaitingForAnUpdateIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		kind := &fakeKind{typ: "kv", open: func(cfg provider.Config) (provider.Provider, error) {
			if cfg.Driver == "slow" {
				<-release
			}
			return &fakeProvider{}, nil
		}}
		h := newHost(kind)
		start(t, h, "kv")
		go func() { _ = h.Update(t.Context(), "kv", provider.Config{ID: "kv", Driver: "slow"}) }()
		synctest.Wait()
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := h.Invoke(ctx, "kv", "kv", provider.Call{}); !errors.Is(err, provider.ErrTimeout) || time.Since(began) != time.Second {
			t.Errorf("%v after %s, want ErrTimeout at its deadline", err, time.Since(began))
		}
		_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
		wantError(t, err, provider.ErrUnavailable, "being changed", "")
		if waited := time.Since(began) - time.Second; waited < 10*time.Second || waited > 20*time.Second {
			t.Errorf("it waited %s", waited)
		}
		waiting := make(chan error, 1)
		go func() {
			_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
			waiting <- err
		}()
		synctest.Wait()
		close(release)
		if err := <-waiting; err != nil {
			t.Errorf("the one that still waited: %v", err)
		}
		if err := h.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Two hundred calls in flight when a drain begins: those that end within the grace
// are answered, the others are cut off with the right code, and none is lost.
func TestADrainCutsOffWhatOutlastsTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var open atomic.Int64
		n := newNode(t, nil)
		takes := make(chan time.Duration, 200)
		kind := &fakeKind{typ: "kv", open: func(provider.Config) (provider.Provider, error) {
			open.Add(1)
			return invoker(func(ctx context.Context) ([]byte, error) {
				derived, cancel := context.WithTimeout(ctx, time.Hour) // as drivers do
				defer cancel()
				select {
				case <-time.After(<-takes):
					return []byte("done"), nil
				case <-derived.Done():
					return nil, derived.Err()
				}
			}, func() { open.Add(-1) }), nil
		}}
		h := provider.NewHost(n.log(), kind)
		start(t, h, "kv")
		var wg sync.WaitGroup
		var answered, cut atomic.Int64
		for i := range 200 {
			takes <- time.Duration(1+i%2*10) * time.Second // half 1 s, half 11 s
			wg.Go(func() {
				_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
				e, _ := errors.AsType[*provider.Error](err)
				switch {
				case err == nil:
					answered.Add(1)
				case errors.Is(err, provider.ErrUnavailable) && e.Details[provider.DetailOutcome] == provider.OutcomeUnknown:
					cut.Add(1)
				default:
					t.Errorf("%v", err)
				}
			})
		}
		synctest.Wait()
		if inFlight := h.Drain("kv"); inFlight != 200 {
			t.Errorf("%d in flight, want 200", inFlight)
		}
		_, err := h.Invoke(t.Context(), "kv", "kv", provider.Call{})
		wantError(t, err, provider.ErrUnavailable, "does not run", "")
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := h.Stop(ctx, "kv"); !errors.Is(err, provider.ErrTimeout) || time.Since(began) != 5*time.Second {
			t.Errorf("Stop: %v after %s", err, time.Since(began))
		}
		wg.Wait()
		if answered.Load() != 100 || cut.Load() != 100 || open.Load() != 0 {
			t.Errorf("%d answered, %d cut off, %d open", answered.Load(), cut.Load(), open.Load())
		}
	})
}

// invoker makes a provider of functions.
func invoker(f func(context.Context) ([]byte, error), closed func()) provider.Provider {
	return &functions{f, closed}
}

type functions struct {
	invoke func(context.Context) ([]byte, error)
	closed func()
}

func (p *functions) Invoke(ctx context.Context, _ provider.Call) ([]byte, error) {
	return p.invoke(ctx)
}

func (p *functions) Close() error { p.closed(); return nil }
