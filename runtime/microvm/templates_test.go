package microvm_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// answers checks that an instance of a module starts and answers.
func answers(t *testing.T, r runtime.Runtime, spec runtime.Spec) {
	t.Helper()
	i := rt.Started(t, r, spec, rt.NoHost(t))
	if got, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("hello")); err != nil || string(got) != "hello" {
		t.Fatalf("answer %q, %v", got, err)
	}
}

func TestTemplatesAreMadeOnce(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d)
	spec := rt.Spec(t, rt.Echo())
	for range 3 {
		answers(t, r, spec)
	}
	if boots, clones := d.boots.Load(), d.clones.Load(); boots != 1 || clones != 4 {
		t.Fatalf("%d boots and %d clones for one base, one module and three instances", boots, clones)
	}
}

func TestDamagedTemplateIsMadeAgain(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d)
	spec := rt.Spec(t, rt.Echo())
	answers(t, r, spec)
	clones := d.clones.Load()
	d.failClones.Store(2)
	answers(t, r, spec)
	// Two that failed, one fork for the new template, one for the instance.
	if got := d.clones.Load() - clones; got != 4 {
		t.Fatalf("%d clones", got)
	}
}

func TestMonitorThatChangedMakesTemplatesStale(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d)
	spec := rt.Spec(t, rt.Echo())
	answers(t, r, spec)
	upgraded := "upgraded"
	d.key.Store(&upgraded)
	answers(t, r, spec)
	if got := d.boots.Load(); got != 2 {
		t.Fatalf("%d boots, want a new base template after the upgrade", got)
	}
}

func TestWithoutTemplatesMachinesAreBooted(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d)
	d.failClones.Store(1 << 20)
	answers(t, r, rt.Spec(t, rt.Echo()))
}

func TestBootThatFailsIsNotTheModulesFault(t *testing.T) {
	d := newFakeDriver(t)
	d.failBoots.Store(2)
	r := open(t, d)
	spec := rt.Spec(t, rt.Echo())
	if _, err := r.Prepare(t.Context(), spec, rt.NoHost(t)); err == nil || errors.Is(err, runtime.ErrModuleInvalid) {
		t.Fatalf("Prepare: %v", err)
	}
	answers(t, r, spec)
}

func TestSpareClonesAreTaken(t *testing.T) {
	d := newFakeDriver(t)
	metrics := prometheus.NewRegistry()
	r := open(t, d, func(c *microvm.Config) { c.Spares, c.Registerer = 2, metrics })
	spec := rt.Spec(t, rt.Echo())
	for range 4 {
		answers(t, r, spec)
		r.Settle()
	}
	values := gathered(t, metrics)
	if hits, misses := values[`wasmatrix_microvm_pool_takes_total{result="hit"}`], values[`wasmatrix_microvm_pool_takes_total{result="miss"}`]; hits != 3 || misses != 1 {
		t.Fatalf("%v hits and %v misses", hits, misses)
	}
}

// TestSparesThatDiedAreReplaced: a machine that waits may end, for whatever reason.
func TestSparesThatDiedAreReplaced(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d, func(c *microvm.Config) { c.Spares = 1 })
	spec := rt.Spec(t, rt.Echo())
	for range 3 {
		answers(t, r, spec)
		r.Settle()
		d.last().die(vmm.Ending{Message: "killed"})
	}
}

// TestTemplatesUsedLongestAgoGoFirst: templates of modules have a bound on memory;
// the fake's take one MiB each.
func TestTemplatesUsedLongestAgoGoFirst(t *testing.T) {
	d := newFakeDriver(t)
	r := open(t, d, func(c *microvm.Config) { c.TemplateBytes = 2 << 20 })
	first, second, third := rt.Spec(t, rt.Echo()), rt.Spec(t, rt.Trapper()), rt.Spec(t, rt.Either())
	start := func(spec runtime.Spec) (made int32) {
		before := d.copies.Load()
		rt.Started(t, r, spec, rt.NoHost(t))
		return d.copies.Load() - before
	}
	for n, step := range []struct {
		spec runtime.Spec
		made int32
	}{
		{first, 2}, {second, 1}, {first, 0}, {third, 1}, {first, 0}, {second, 1}, {third, 1},
	} {
		if got := start(step.spec); got != step.made {
			t.Fatalf("step %d made %d templates, want %d", n, got, step.made)
		}
	}
	if boots := d.boots.Load(); boots != 1 {
		t.Fatalf("%d boots: the base template went too", boots)
	}
}

// TestMachineThatIgnoresItsLimits: the host ends a machine that does not end its guest.
func TestMachineThatIgnoresItsLimits(t *testing.T) {
	d := newFakeDriver(t)
	d.serve = obedient(func(c *channel.Conn) {
		for {
			if _, err := c.Receive(); err != nil {
				return
			}
		}
	})
	spec := rt.Spec(t, rt.Echo())
	spec.Timeout = 10 * time.Millisecond
	i := rt.Started(t, open(t, d, func(c *microvm.Config) { c.Overtime = 10 * time.Millisecond }), spec, rt.NoHost(t))
	if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrTimeLimit) {
		t.Fatalf("Invoke: %v", err)
	}
	if exit, err := i.Wait(t.Context()); err != nil || exit.Reason != runtime.TimeLimit {
		t.Fatalf("exit %+v, %v", exit, err)
	}
}

// TestNoCallBeginsAfterTheGrace: a machine that was told to stop and calls out all
// the same, or whose calls were under way, has no effect any more.
func TestNoCallBeginsAfterTheGrace(t *testing.T) {
	d := newFakeDriver(t)
	d.serve = obedient(func(c *channel.Conn) {
		for {
			f, err := c.Receive()
			if err != nil {
				return
			}
			if f.Kind == channel.Stop {
				_ = c.Send(channel.Call, 1, channel.CapabilityCall{Capability: "kv", Operation: "set"}.Encode())
			}
		}
	})
	i := rt.Started(t, open(t, d), rt.Spec(t, rt.Echo()), rt.NoHost(t))
	if err := i.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if exit, err := i.Wait(t.Context()); err != nil || exit.Reason != runtime.Stopped {
		t.Fatalf("exit %+v, %v", exit, err)
	}
}

// TestMachinesThatMisbehave have taken over the guest's side: whatever they say ends
// them and nothing else.
func TestMachinesThatMisbehave(t *testing.T) {
	for name, serve := range map[string]func(conn *channel.Conn){
		"hangs up":     func(*channel.Conn) {},
		"too long":     func(c *channel.Conn) { _ = c.Send(channel.Done, 1, make([]byte, channel.MaxFromGuest+1)) },
		"unknown kind": func(c *channel.Conn) { _ = c.Send(200, 1) },
		"ready twice": func(c *channel.Conn) {
			_ = c.Send(channel.Ready, 0)
			_ = c.Send(channel.Ready, 0)
		},
		"calls before the start": func(c *channel.Conn) { _ = c.Send(channel.Call, 1, make([]byte, 64)) },
		"never ready": func(c *channel.Conn) {
			_, _ = c.Receive()
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDriver(t)
			d.serve = serve
			r := open(t, d, func(c *microvm.Config) { c.BootTimeout, c.CloneTimeout = time.Second, time.Second })
			i, err := r.Prepare(t.Context(), rt.Spec(t, rt.Echo()), rt.NoHost(t))
			if err == nil {
				_ = i.Close(t.Context())
				t.Fatal("it was believed")
			}
			if errors.Is(err, runtime.ErrModuleInvalid) {
				t.Fatalf("the module is blamed: %v", err)
			}
		})
	}
}

// obedient does what the host asks up to the Start, and then what misbehave does.
func obedient(misbehave func(c *channel.Conn)) func(c *channel.Conn) {
	return func(c *channel.Conn) {
		_ = c.Send(channel.Ready, 0)
		for {
			f, err := c.Receive()
			if err != nil {
				return
			}
			switch f.Kind {
			case channel.Hello, channel.Settle, channel.Warm, channel.Prepare:
				_ = c.Send(channel.Done, f.ID, channel.EncodeNumber(0))
			case channel.Start:
				_ = c.Send(channel.Done, f.ID, channel.EncodeNumber(0))
				misbehave(c)
			default:
			}
		}
	}
}

func TestGuestsThatMisbehave(t *testing.T) {
	call := channel.CapabilityCall{Capability: "kv", Operation: "get"}.Encode()
	for name, misbehave := range map[string]func(c *channel.Conn){
		"a flood of calls": func(c *channel.Conn) {
			for id := range uint64(1000) {
				_ = c.Send(channel.Call, id, call)
			}
		},
		"one id twice": func(c *channel.Conn) {
			_ = c.Send(channel.Call, 1, call)
			_ = c.Send(channel.Call, 1, call)
		},
		"another stream":    func(c *channel.Conn) { _ = c.Send(channel.Output, 1, []byte{9, 'x'}) },
		"no output":         func(c *channel.Conn) { _ = c.Send(channel.Output, 1) },
		"an unknown ending": func(c *channel.Conn) { _ = c.Send(channel.Ended, 0, channel.EncodeExit(runtime.Exit{Reason: 99})) },
		"a cut-off message": func(c *channel.Conn) { _ = c.Send(channel.Call, 1, []byte{1}) },
		"usage of two sizes": func(c *channel.Conn) {
			_ = c.Send(channel.Usage, 0, make([]byte, 16))
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDriver(t)
			d.serve = obedient(misbehave)
			host := rt.HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			})
			i := rt.Started(t, open(t, d), rt.Spec(t, rt.Echo()), host)
			exit, err := i.Wait(t.Context())
			if err != nil || exit.Reason != runtime.Internal || !strings.Contains(exit.Message, "malformed") {
				t.Fatalf("exit %+v, %v", exit, err)
			}
		})
	}
}

// TestEndsOfMachines: that a machine ends by itself is told as what it is.
func TestEndsOfMachines(t *testing.T) {
	for _, test := range []struct {
		ending vmm.Ending
		want   runtime.Reason
	}{
		{vmm.Ending{OutOfMemory: true, Message: "no memory"}, runtime.MemoryLimit},
		{vmm.Ending{Message: "panic"}, runtime.Internal},
	} {
		d := newFakeDriver(t)
		i := rt.Started(t, open(t, d), rt.Spec(t, rt.Echo()), rt.NoHost(t))
		d.last().die(test.ending)
		exit, err := i.Wait(t.Context())
		if err != nil || exit.Reason != test.want || exit.Message != test.ending.Message {
			t.Fatalf("exit %+v, %v, want reason %d", exit, err, test.want)
		}
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("a call afterwards: %v", err)
		}
	}
}
