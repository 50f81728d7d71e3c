package runtimetest_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

var _ runtime.Runtime = (*runtimetest.Fake)(nil)

func prepare(t *testing.T, f *runtimetest.Fake, spec runtime.Spec) runtime.Instance {
	t.Helper()
	i, err := f.Prepare(t.Context(), spec, nil)
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	t.Cleanup(func() { _ = i.Close(context.Background()) })
	return i
}

func TestFakeEchoesUntilItCrashes(t *testing.T) {
	f := runtimetest.NewFake()
	i := prepare(t, f, runtime.Spec{InstanceID: "a", Name: "web", Concurrency: 1})
	if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrNotRunning) {
		t.Fatalf("a call before Start: %v, want ErrNotRunning", err)
	}
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.Running(); len(got) != 1 || got[0] != "a" {
		t.Fatalf("Running = %v", got)
	}
	if out, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("x")); err != nil || string(out) != "x" {
		t.Fatalf("Invoke = %q, %v", out, err)
	}
	want := runtime.Exit{Reason: runtime.Trap, Message: "unreachable"}
	if n := f.Crash("a", want); n != 1 {
		t.Fatalf("Crash hit %d instances", n)
	}
	if got, err := i.Wait(t.Context()); err != nil || got != want {
		t.Fatalf("Wait = %+v, %v", got, err)
	}
	if len(f.Running()) != 0 || f.Starts("a") != 1 || f.Prepares("a") != 1 {
		t.Fatalf("after the crash: running %v, starts %d", f.Running(), f.Starts("a"))
	}
	if i.Usage().Invocations != 1 {
		t.Fatalf("Usage = %+v", i.Usage())
	}
}

func TestFakeStopGivesItsScriptTheGraceAndNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := runtimetest.NewFake()
		f.OnStop(func(ctx context.Context, _ runtime.Spec) error {
			<-ctx.Done()
			return ctx.Err()
		})
		i := prepare(t, f, runtime.Spec{InstanceID: "a"})
		if err := i.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := i.Stop(t.Context(), 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Fatalf("Stop took %v", took)
		}
		if exit, _ := i.Wait(t.Context()); exit.Reason != runtime.Stopped {
			t.Fatalf("exit %+v", exit)
		}
	})
}

func TestFakeScriptsFailures(t *testing.T) {
	f := runtimetest.NewFake()
	bad := errors.New("bad luck")
	f.OnPrepare(func(context.Context, runtime.Spec) error { return bad })
	if _, err := f.Prepare(t.Context(), runtime.Spec{}, nil); !errors.Is(err, bad) {
		t.Fatalf("Prepare: %v", err)
	}
	f.OnPrepare(nil)
	f.OnStart(func(runtime.Spec) error { return bad })
	if err := prepare(t, f, runtime.Spec{InstanceID: "b"}).Start(t.Context()); !errors.Is(err, bad) {
		t.Fatalf("Start: %v", err)
	}
	f.OnStart(nil)
	f.OnInvoke(func(context.Context, runtime.Spec, runtime.Host, runtime.Handler, []byte) ([]byte, error) {
		return nil, runtime.ErrCrashed
	})
	i := prepare(t, f, runtime.Spec{InstanceID: "c", Concurrency: 1})
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Invoke(t.Context(), runtime.HandlerHTTP, nil); !errors.Is(err, runtime.ErrCrashed) {
		t.Fatalf("Invoke: %v", err)
	}
	if exit, err := i.Wait(t.Context()); err != nil || exit.Reason != runtime.Trap {
		t.Fatalf("Wait = %+v, %v", exit, err)
	}
}
