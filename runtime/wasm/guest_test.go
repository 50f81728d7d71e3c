package wasm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// buildGuest builds testdata/guest for WASI. Only as a reactor it may export
// handlers, so the command is built with those left out.
func buildGuest(t testing.TB, reactor bool) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "guest.wasm")
	args := []string{"build", "-o", out}
	if reactor {
		args = append(args, "-buildmode=c-shared", "-tags=reactor")
	}
	cmd := exec.CommandContext(t.Context(), "go", append(args, ".")...)
	cmd.Dir = filepath.Join("testdata", "guest")
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=-mod=mod", "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the guest: %v\n%s", err, text)
	}
	binary, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// TestGoGuests runs real programs; what they compute is compared with the same
// code on this machine.
func TestGoGuests(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("builds guests with the Go toolchain and compiles megabytes, which takes minutes with the race detector")
	}
	r := open(t)
	native := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), "go", append([]string{"run", "."}, args...)...)
		cmd.Dir = filepath.Join("testdata", "guest")
		cmd.Stdin = strings.NewReader("some input")
		cmd.Env = append(os.Environ(), "COLOUR=blue", "GOWORK=off")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("running it natively: %v", err)
		}
		return string(out)
	}
	binary := buildGuest(t, false)
	run := func(t *testing.T, want runtime.Reason, mode string) (exit runtime.Exit, stdout, stderr string) {
		spec := runtimetest.Spec(t, binary)
		spec.MemoryBytes, spec.Args = 64<<20, []string{mode}
		spec.Stdin, spec.Env = []byte("some input"), map[string]string{"COLOUR": "blue"}
		out, errs := &runtimetest.Output{}, &runtimetest.Output{}
		spec.Stdout, spec.Stderr = out, errs
		if mode == "spin" {
			spec.Timeout = 500 * time.Millisecond
		}
		exit, err := runtimetest.Started(t, r, spec, runtimetest.NoHost(t)).Wait(t.Context())
		if err != nil || exit.Reason != want {
			t.Fatalf("exit %+v, %v, want reason %d; stderr %s", exit, err, want, errs)
		}
		return exit, out.String(), errs.String()
	}
	t.Run("computes the same", func(t *testing.T) {
		if _, out, _ := run(t, runtime.Completed, "work"); out != native("work") {
			t.Fatalf("it computed %q, natively %q", out, native("work"))
		}
	})
	t.Run("sleeps", func(t *testing.T) { run(t, runtime.Completed, "sleep") })
	t.Run("sees no file", func(t *testing.T) {
		if _, out, _ := run(t, runtime.Completed, "files"); !strings.HasPrefix(out, "true true") {
			t.Fatalf("it said %q", out)
		}
	})
	t.Run("runs out of memory", func(t *testing.T) {
		exit, _, errs := run(t, runtime.MemoryLimit, "memory")
		if !strings.Contains(exit.Message, "64 MiB") || !strings.Contains(errs, "out of memory") {
			t.Fatalf("exit %+v, stderr %s", exit, errs)
		}
	})
	t.Run("spins", func(t *testing.T) {
		if exit, _, _ := run(t, runtime.TimeLimit, "spin"); !strings.Contains(exit.Message, "main.") {
			t.Fatalf("exit %+v does not say where", exit)
		}
	})
	t.Run("panics", func(t *testing.T) {
		if exit, _, errs := run(t, runtime.ExitCode, "panic"); exit.Code != 2 || !strings.Contains(errs, "out of luck") {
			t.Fatalf("exit %+v, stderr %s", exit, errs)
		}
	})
	t.Run("handles calls", func(t *testing.T) {
		spec := runtimetest.Spec(t, buildGuest(t, true))
		spec.MemoryBytes, spec.Concurrency = 64<<20, 2
		i := runtimetest.Started(t, r, spec, runtimetest.NoHost(t))
		first, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("abc"))
		if err != nil || !strings.HasSuffix(string(first), "abc") {
			t.Fatalf("answer %q, %v", first, err)
		}
		for range 20 {
			if again, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("abc")); err != nil || string(again) != string(first) {
				t.Fatalf("answer %q, %v", again, err)
			}
		}
	})
}
