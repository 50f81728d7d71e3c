package runtimetest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// spinning starts a spinning call and returns once it is under way, and where its
// error will come.
func spinning(t *testing.T, i runtime.Instance) <-chan error {
	t.Helper()
	errs := make(chan error, 1)
	go func() {
		_, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("x"))
		errs <- err
	}()
	deadline := time.Now().Add(patience)
	for i.Usage().GuestTime == 0 || busy(t, i) == nil {
		if time.Now().After(deadline) {
			t.Fatalf("the call is not under way after %v", patience)
		}
	}
	return errs
}

// busy returns the error of a call that finds the only slot taken.
func busy(t *testing.T, i runtime.Instance) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := i.Invoke(ctx, runtime.HandlerInvoke, nil)
	if err != nil && !errors.Is(err, runtime.ErrBusy) {
		t.Fatalf("a call beside the spinning one: %v", err)
	}
	return err
}

var stopTests = []conformance{
	{"a spinning guest is stopped by force after the grace", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Spinner()), NoHost(t))
		errs := spinning(t, i)
		if err := i.Stop(t.Context(), 10*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Stopped)
		if err := receive(t, "the call ends", errs); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("the call: %v", err)
		}
	}},
	{"memory that a call takes is seen while the call goes on", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, GrowingSpinner()), NoHost(t))
		before := i.Usage().MemoryBytes
		errs := spinning(t, i)
		deadline := time.Now().Add(patience)
		for i.Usage().MemoryBytes != before+64<<10 {
			if time.Now().After(deadline) {
				t.Fatalf("usage %+v, memory was %d bytes before the call", i.Usage(), before)
			}
		}
		if err := i.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if err := receive(t, "the call ends", errs); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("the call: %v", err)
		}
	}},
	{"Stop obeys its context", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Spinner()), NoHost(t))
		spinning(t, i)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_ = i.Stop(ctx, time.Hour)
		wantExit(t, i, runtime.Stopped)
	}},
	{"a call under way is given the grace", func(t *testing.T, r runtime.Runtime) {
		inside, leave := make(chan struct{}), make(chan struct{})
		host := HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
			close(inside)
			select {
			case <-leave:
				return []byte("done"), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		answers := make(chan string, 1)
		go func() {
			answer, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil)
			if err != nil {
				answer = []byte(err.Error())
			}
			answers <- string(answer)
		}()
		receive(t, "the call is in the host", inside)
		stopped := make(chan error, 1)
		go func() { stopped <- i.Stop(t.Context(), patience) }()
		deadline := time.Now().Add(patience)
		for {
			if _, err := i.Invoke(expired(t), runtime.HandlerInvoke, nil); errors.Is(err, runtime.ErrNotRunning) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("a stopping instance still takes calls")
			}
		}
		close(leave)
		if got := receive(t, "the call ends", answers); got != "\x00\x00\x00\x00done" {
			t.Fatalf("the call under way: %q", got)
		}
		if err := receive(t, "Stop returns", stopped); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Stopped)
	}},
	{"the drain handler runs, and may call out", func(t *testing.T, r runtime.Runtime) {
		calls := make(chan string, 1)
		host := HostFunc(func(_ context.Context, capability, operation string, _ []byte) ([]byte, error) {
			calls <- capability + "." + operation
			return nil, nil
		})
		i := Started(t, r, Spec(t, Drainer()), host)
		invoke(t, i, "x")
		if err := i.Stop(t.Context(), patience); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Stopped)
		if got := receive(t, "the drain handler calls", calls); got != "log.write" {
			t.Fatalf("it called %s", got)
		}
	}},
	{"a drain handler that does not return is cut off", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, StubbornDrainer()), NoHost(t))
		if err := i.Stop(t.Context(), 50*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Stopped)
	}},
	{"Stop cuts off a call of the host", func(t *testing.T, r runtime.Runtime) {
		inside := make(chan struct{})
		host := HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
			close(inside)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:http/v1", "request")), host)
		errs := make(chan error, 1)
		go func() {
			_, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil)
			errs <- err
		}()
		receive(t, "the call is in the host", inside)
		if err := i.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Stopped)
		if err := receive(t, "the call ends", errs); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("the call: %v", err)
		}
	}},
	{"Stop before Start, twice, and after the end", func(t *testing.T, r runtime.Runtime) {
		i := Prepared(t, r, Spec(t, Echo()), NoHost(t))
		for range 2 {
			if err := i.Stop(t.Context(), time.Second); err != nil {
				t.Fatal(err)
			}
		}
		wantExit(t, i, runtime.Stopped)
		if err := i.Start(t.Context()); !errors.Is(err, runtime.ErrNotRunning) {
			t.Fatalf("Start: %v", err)
		}
	}},
	{"Close ends a spinning guest, and may be called twice", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Spinner()), NoHost(t))
		spinning(t, i)
		for range 2 {
			if err := i.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if exit := exitOf(t, i); exit.Reason != runtime.Stopped || i.Usage().MemoryBytes != 0 {
			t.Fatalf("exit %+v, usage %+v", exit, i.Usage())
		}
	}},
}

// expired returns a context that has ended.
func expired(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

var commandTests = []conformance{
	{"exit codes", func(t *testing.T, r runtime.Runtime) {
		for code, want := range map[int32]runtime.Reason{0: runtime.Completed, 1: runtime.ExitCode, 42: runtime.ExitCode} {
			exit := wantExit(t, Started(t, r, Spec(t, Exit(code)), NoHost(t)), want)
			if exit.Code != code {
				t.Fatalf("exit %+v, want code %d", exit, code)
			}
		}
		wantExit(t, Started(t, r, Spec(t, Command(nil)), NoHost(t)), runtime.Completed)
	}},
	{"stdin, stdout and stderr", func(t *testing.T, r runtime.Runtime) {
		// Each instance has its own, whatever an executor keeps ready of a module.
		for _, line := range []string{"all work", "and no play", "makes Jack", "a dull boy"} {
			spec := Spec(t, CatCommand())
			spec.Stdin = []byte(strings.Repeat(line+"\n", 100))
			out, errs := &Output{}, &Output{}
			spec.Stdout, spec.Stderr = out, errs
			wantExit(t, Started(t, r, spec, NoHost(t)), runtime.Completed)
			if out.String() != string(spec.Stdin) || errs.String() != "done" {
				t.Fatalf("stdout %q, stderr %q", out, errs)
			}
		}
	}},
	{"arguments and environment, and no other", func(t *testing.T, r runtime.Runtime) {
		t.Setenv("SECRET", "of the host")
		for _, first := range []string{"one", "two", "six", "ten"} {
			args, env := first+"\x00two three\x00", "A="+first+"\x00B=two=2\x00"
			spec := Spec(t, ArgsCommand(int32(len("guest\x00"+args)), int32(len(env)), int32(len("guest\x00"))))
			spec.Args, spec.Env = []string{first, "two three"}, map[string]string{"B": "two=2", "A": first}
			out := &Output{}
			spec.Stdout = out
			wantExit(t, Started(t, r, spec, NoHost(t)), runtime.Completed)
			if out.String() != args+env {
				t.Fatalf("stdout %q", out)
			}
		}
	}},
	{"a command has no handlers", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, SpinCommand()), NoHost(t))
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrNoHandler) {
			t.Fatalf("error %v", err)
		}
	}},
	{"Timeout bounds the run", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, SpinCommand())
		spec.Timeout = 50 * time.Millisecond
		wantExit(t, Started(t, r, spec, NoHost(t)), runtime.TimeLimit)
	}},
	{"Timeout wakes a sleeper", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Sleeper(int64(time.Hour)))
		spec.Timeout = 50 * time.Millisecond
		wantExit(t, Started(t, r, spec, NoHost(t)), runtime.TimeLimit)
	}},
	{"a sleeper wakes by itself", func(t *testing.T, r runtime.Runtime) {
		wantExit(t, Started(t, r, Spec(t, Sleeper(int64(time.Millisecond))), NoHost(t)), runtime.Completed)
	}},
	{"Stop ends a sleeper and a spinner", func(t *testing.T, r runtime.Runtime) {
		for _, binary := range [][]byte{Sleeper(int64(time.Hour)), SpinCommand()} {
			i := Started(t, r, Spec(t, binary), NoHost(t))
			if err := i.Stop(t.Context(), time.Millisecond); err != nil {
				t.Fatal(err)
			}
			wantExit(t, i, runtime.Stopped)
		}
	}},
	{"Stop lets a command come to its end within the grace", func(t *testing.T, r runtime.Runtime) {
		i := Started(t, r, Spec(t, Sleeper(int64(20*time.Millisecond))), NoHost(t))
		if err := i.Stop(t.Context(), patience); err != nil {
			t.Fatal(err)
		}
		wantExit(t, i, runtime.Completed)
	}},
	{"a trap", func(t *testing.T, r runtime.Runtime) {
		wantExit(t, Started(t, r, Spec(t, Command(nil, Unreachable)), NoHost(t)), runtime.Trap)
	}},
}
