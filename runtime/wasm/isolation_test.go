package wasm_test

import (
	"context"
	"errors"
	"log/slog"
	goruntime "runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// TestSpinningGuestsHoldUpNobody fills every processor with guests that spin, more
// than once. Compiled code cannot be preempted by Go: without checkpoints neither
// a collection nor another guest would get any further.
func TestSpinningGuestsHoldUpNobody(t *testing.T) {
	r := open(t)
	spec := rt.Spec(t, rt.SpinCommand())
	var spinners []runtime.Instance
	for range 2 * goruntime.GOMAXPROCS(0) {
		spinners = append(spinners, rt.Started(t, r, spec, rt.NoHost(t)))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 3 {
			goruntime.GC()
		}
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("garbage collection does not get through beside spinning guests")
	}
	echo(t, r, rt.Spec(t, rt.Echo()))
	for _, s := range spinners {
		if err := s.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostileModulesBehindTheChild compiles hostile modules as an agent does.
func TestHostileModulesBehindTheChild(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("starts a process for each module; the same modules run in this process in the conformance suite")
	}
	r := open(t, inChild(t, time.Minute, 1<<30))
	rt.RunHostile(t, func(*testing.T) runtime.Runtime { return r })
}

// TestACallOfTheHostThatIgnoresItsContextDoesNotKeepAnInstanceAlive shows the
// last resort: Wait has its answer though the call has not returned, and nothing
// of the guest runs when it does.
func TestACallOfTheHostThatIgnoresItsContextDoesNotKeepAnInstanceAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { abandoned(t) })
}

func abandoned(t *testing.T) {
	inside, leave, left := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	host := rt.HostFunc(func(context.Context, string, string, []byte) ([]byte, error) {
		close(inside)
		<-leave
		return nil, nil
	})
	i := rt.Started(t, open(t), rt.Spec(t, rt.Caller("wasmatrix:kv/v1", "get")), host)
	go func() {
		_, err := i.Invoke(context.WithoutCancel(t.Context()), runtime.HandlerInvoke, nil)
		left <- err
	}()
	<-inside
	if err := i.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if exit, err := i.Wait(t.Context()); err != nil || exit.Reason != runtime.Stopped {
		t.Fatalf("Wait = %+v, %v", exit, err)
	}
	close(leave)
	if err := <-left; !errors.Is(err, runtime.ErrNotRunning) {
		t.Fatalf("the call that was left behind: %v", err)
	}
}

func TestWhatAGuestNamesIsMadeHarmlessInMessages(t *testing.T) {
	name := "evil\x1b[31m\n" + strings.Repeat("x", 5000)
	var m rt.Module
	m.Memory(1)
	f := m.Func(name, nil, nil, nil, rt.Unreachable)
	m.Func("_start", nil, nil, nil, rt.Call(f))
	exit, err := rt.Started(t, open(t), rt.Spec(t, m.Bytes()), rt.NoHost(t)).Wait(t.Context())
	if err != nil || exit.Reason != runtime.Trap {
		t.Fatalf("Wait = %+v, %v", exit, err)
	}
	if len(exit.Message) > 1000 || strings.ContainsAny(exit.Message, "\x1b\n") {
		t.Fatalf("message %q", exit.Message)
	}
}

func TestConfigurationsThatContradictThemselvesAreRefused(t *testing.T) {
	if _, err := wasm.New(t.Context(), wasm.Config{}); err == nil {
		t.Error("no logger was accepted")
	}
	c := wasm.Config{CompileCommand: []string{"true"}, Logger: slog.New(slog.DiscardHandler)}
	if _, err := wasm.New(t.Context(), c); err == nil {
		t.Error("a child process without a directory was accepted")
	}
}
