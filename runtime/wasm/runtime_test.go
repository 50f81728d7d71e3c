package wasm_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// compileChild is the argument that makes the test binary the compiling child.
const compileChild = "compile-child"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == compileChild {
		os.Exit(wasm.CompileMain(os.Args[2:], os.Stdin, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, change ...func(*wasm.Config)) *wasm.Runtime {
	t.Helper()
	config := wasm.Config{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
	for _, c := range change {
		c(&config)
	}
	r, err := wasm.New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Errorf("closing the runtime: %v", err)
		}
	})
	return r
}

// onDisk keeps compiled modules in dir.
func onDisk(dir string) func(*wasm.Config) {
	return func(c *wasm.Config) { c.CacheDir = dir }
}

// inChild compiles in a child process with these bounds.
func inChild(t testing.TB, timeout time.Duration, memory uint64) func(*wasm.Config) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(c *wasm.Config) {
		c.CacheDir = t.TempDir()
		c.CompileCommand = []string{self, compileChild}
		c.CompileTimeout, c.CompileMemoryBytes = timeout, memory
	}
}

func TestConformance(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtime.Runtime { return open(t) })
}
