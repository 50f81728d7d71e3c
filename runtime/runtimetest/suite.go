package runtimetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Run is the suite that every executor passes. open returns an executor that the
// suite may use for one test and that is closed when that test ends.
func Run(t *testing.T, open func(t *testing.T) runtime.Runtime) {
	for _, group := range []struct {
		name  string
		tests []conformance
	}{
		{"reactor", reactorTests},
		{"ending", endingTests},
		{"capability", capabilityTests},
		{"stop", stopTests},
		{"command", commandTests},
		{"refusal", refusalTests},
	} {
		t.Run(group.name, func(t *testing.T) {
			for _, test := range group.tests {
				t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
			}
		})
	}
	t.Run("hostile", func(t *testing.T) { RunHostile(t, open) })
}

type conformance struct {
	name string
	run  func(t *testing.T, r runtime.Runtime)
}

func invoke(t *testing.T, i runtime.Instance, payload string) string {
	t.Helper()
	answer, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte(payload))
	if err != nil {
		t.Fatalf("Invoke: %v", err)
	}
	return string(answer)
}

var reactorTests = []conformance{
	{"every handler answers", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Echo()), NoHost(t))
		for _, h := range []runtime.Handler{runtime.HandlerInvoke, runtime.HandlerHTTP, runtime.HandlerMessage} {
			for _, payload := range []string{"hello", "", strings.Repeat("x", 4<<20)} {
				answer, err := i.Invoke(t.Context(), h, []byte(payload))
				if err != nil || string(answer) != payload {
					t.Fatalf("%s with %d bytes: %d bytes, %v", h, len(payload), len(answer), err)
				}
			}
		}
	}},
	{"a handler that is not exported is told", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Trapper()), NoHost(t))
		if _, err := i.Invoke(t.Context(), runtime.HandlerHTTP, nil); !errors.Is(err, runtime.ErrNoHandler) {
			t.Fatalf("error %v", err)
		}
		if got := invoke(t, i, "still alive"); got != "still alive" {
			t.Fatalf("answer %q", got)
		}
	}},
	{"no call before Start, none after Stop, no second Start", func(t *testing.T, r runtime.Runtime) {
		i := Prepared(t, r, Spec(t, Echo()), NoHost(t))
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("before: %v", err)
		}
		if err := i.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := i.Start(t.Context()); err == nil {
			t.Fatal("it started twice")
		}
		if err := i.Stop(t.Context(), time.Second); err != nil {
			t.Fatal(err)
		}
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("after: %v", err)
		}
		wantExit(t, i, runtime.Stopped)
	}},
	{"one slot keeps its memory between calls", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Counter()), NoHost(t))
		for n := byte(1); n <= 3; n++ {
			if got := invoke(t, i, ""); got != string(n) {
				t.Fatalf("call %d answered %q", n, got)
			}
		}
	}},
	{"instances of one module share no memory", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Counter())
		for range 3 {
			if got := invoke(t, Started(t, r, spec, NoHost(t)), ""); got != "\x01" {
				t.Fatalf("first call answered %q", got)
			}
		}
	}},
	{"as many calls at once as Concurrency says", concurrencyTest},
	{"initialisation runs before the first call", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Initializer(I32Const(0), I32Const(0x64636261), I32Store)), NoHost(t))
		if got := invoke(t, i, ""); got != "abcd" {
			t.Fatalf("answer %q", got)
		}
	}},
	{"usage is counted", func(t *testing.T, r runtime.Runtime) {
		host := HostFunc(func(context.Context, string, string, []byte) ([]byte, error) { return nil, nil })
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		invoke(t, i, "a")
		invoke(t, i, "b")
		u := i.Usage()
		if u.Invocations != 2 || u.CapabilityCalls != 2 || u.MemoryBytes < 128<<10 || u.GuestTime <= 0 {
			t.Fatalf("usage %+v", u)
		}
	}},
}

func concurrencyTest(t *testing.T, r runtime.Runtime) {
	const slots = 3
	inside := make(chan struct{}, slots)
	leave := make(chan struct{})
	host := HostFunc(func(ctx context.Context, _, _ string, p []byte) ([]byte, error) {
		inside <- struct{}{}
		select {
		case <-leave:
		case <-ctx.Done():
		}
		return bytes.Clone(p), nil
	})
	spec := Spec(t, Caller("wasmatrix:kv/v1", "get"))
	spec.Concurrency = slots
	i := Started(t, r, spec, host)
	answers := make(chan error, slots)
	for n := range slots {
		go func() {
			want := fmt.Sprintf("\x00\x00\x00\x00call %d", n)
			got, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte(want[4:]))
			if err == nil && string(got) != want {
				err = fmt.Errorf("answer %q, want %q", got, want)
			}
			answers <- err
		}()
	}
	for range slots {
		receive(t, "all calls are in the host at once", inside)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := i.Invoke(ctx, runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrBusy) {
		t.Fatalf("one call too many: %v, want ErrBusy", err)
	}
	close(leave)
	for range slots {
		if err := receive(t, "the calls return", answers); err != nil {
			t.Fatal(err)
		}
	}
}

var endingTests = []conformance{
	{"a trap ends the instance and tells where", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Trapper()), NoHost(t))
		invoke(t, i, "fine")
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrCrashed) {
			t.Fatalf("error %v", err)
		}
		exit := wantExit(t, i, runtime.Trap)
		if !strings.Contains(exit.Message, "unreachable") || !strings.Contains(exit.Message, "crash_here") || strings.Contains(exit.Message, "\n") {
			t.Fatalf("message %q", exit.Message)
		}
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("x")); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("a call afterwards: %v", err)
		}
	}},
	{"Timeout ends a spinning call", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Spinner())
		spec.Timeout = 50 * time.Millisecond
		i := Started(t, r, spec, NoHost(t))
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("x")); !errors.Is(err, runtime.ErrTimeLimit) {
			t.Fatalf("error %v", err)
		}
		wantExit(t, i, runtime.TimeLimit)
	}},
	{"a caller that gives up does not end the guest", func(t *testing.T, r runtime.Runtime) {
		inside := make(chan struct{}, 2)
		host := HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
			inside <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		answer, err := i.Invoke(ctx, runtime.HandlerInvoke, []byte("x"))
		if err != nil || answer[0] != 10 { // TIMEOUT
			t.Fatalf("the capability call of an unwanted call: %q, %v", answer, err)
		}
		receive(t, "the guest called out", inside)
		short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if answer, err = i.Invoke(short, runtime.HandlerInvoke, []byte("x")); err != nil || answer[0] != 10 {
			t.Fatalf("the guest after that: %q, %v", answer, err)
		}
	}},
	{"a crash ends the calls beside it", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Either())
		spec.Concurrency = 2
		i := Started(t, r, spec, NoHost(t))
		errs := make(chan error, 1)
		go func() {
			_, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("spin"))
			errs <- err
		}()
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrCrashed) {
			t.Fatalf("the call that crashes: %v", err)
		}
		wantExit(t, i, runtime.Trap)
		if err := receive(t, "the other call ends", errs); !errors.Is(err, runtime.ErrCrashed) && !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("the other call: %v", err)
		}
	}},
	{"a guest that crashes out of memory ran into MemoryLimit", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Grower()), NoHost(t))
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrCrashed) {
			t.Fatalf("error %v", err)
		}
		wantExit(t, i, runtime.MemoryLimit)
	}},
	{"memory.grow fails at the limit and the guest lives on", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, PatientGrower())
		spec.MemoryBytes = 3<<20 + 1000 // rounded down
		i := Started(t, r, spec, NoHost(t))
		for range 2 {
			if got := binary.LittleEndian.Uint32([]byte(invoke(t, i, ""))); got != 48 {
				t.Fatalf("%d pages, want 48", got)
			}
		}
		if u := i.Usage(); u.MemoryBytes != 3<<20 {
			t.Fatalf("usage %+v", u)
		}
	}},
	{"a failed initialisation is a failed start", func(t *testing.T, r runtime.Runtime) {
		i := Prepared(t, r, Spec(t, Initializer(Unreachable)), NoHost(t))
		if err := i.Start(t.Context()); !errors.Is(err, runtime.ErrCrashed) {
			t.Fatalf("Start: %v", err)
		}
		wantExit(t, i, runtime.Trap)
	}},
	{"Timeout bounds the initialisation", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Initializer(Loop(Br(0))))
		spec.Timeout = 50 * time.Millisecond
		i := Prepared(t, r, spec, NoHost(t))
		if err := i.Start(t.Context()); !errors.Is(err, runtime.ErrTimeLimit) {
			t.Fatalf("Start: %v", err)
		}
		wantExit(t, i, runtime.TimeLimit)
	}},
	{"Wait gives up with its context", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Echo()), NoHost(t))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := i.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("Wait: %v", err)
		}
	}},
}
