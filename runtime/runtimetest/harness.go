package runtimetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// patience bounds every wait of the suite; a healthy executor takes a fraction.
const patience = 20 * time.Second

// HostFunc is a runtime.Host made of a function.
type HostFunc func(ctx context.Context, capability, operation string, payload []byte) ([]byte, error)

// Call calls the function.
func (f HostFunc) Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	return f(ctx, capability, operation, payload)
}

// NoHost is a host that fails the test when a guest calls out.
func NoHost(t *testing.T) runtime.Host {
	return HostFunc(func(_ context.Context, capability, operation string, _ []byte) ([]byte, error) {
		t.Errorf("the guest called %s %s", capability, operation)
		return nil, &runtime.Failure{Code: 13}
	})
}

// Spec returns the spec of an instance of a module that it writes to a file of
// the test: 16 MiB of memory, no time limit, one call at a time, output thrown away.
func Spec(t testing.TB, binary []byte) runtime.Spec {
	t.Helper()
	path := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(path, binary, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(binary)
	return runtime.Spec{
		InstanceID: "guest-aaaaa", Name: "guest", Generation: 1,
		Digest: "sha256:" + hex.EncodeToString(sum[:]), ModulePath: path,
		MemoryBytes: 16 << 20, Concurrency: 1,
		Stdout: &Output{}, Stderr: &Output{},
	}
}

// Output keeps what is written to it. Its zero value is empty.
type Output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write appends p.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

// String returns what has been written so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// Started prepares and starts an instance that is closed when the test ends.
func Started(t testing.TB, r runtime.Runtime, spec runtime.Spec, host runtime.Host) runtime.Instance {
	t.Helper()
	i := Prepared(t, r, spec, host)
	if err := i.Start(t.Context()); err != nil {
		t.Fatalf("Start: %v", err)
	}
	return i
}

// Prepared prepares an instance that is closed when the test ends.
func Prepared(t testing.TB, r runtime.Runtime, spec runtime.Spec, host runtime.Host) runtime.Instance {
	t.Helper()
	i, err := r.Prepare(t.Context(), spec, host)
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	t.Cleanup(func() {
		if err := i.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return i
}

// exitOf waits for an instance to end.
func exitOf(t *testing.T, i runtime.Instance) runtime.Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	exit, err := i.Wait(ctx)
	if err != nil {
		t.Fatalf("the instance has not ended: %v", err)
	}
	return exit
}

// wantExit waits for an instance to end and compares the reason.
func wantExit(t *testing.T, i runtime.Instance, want runtime.Reason) runtime.Exit {
	t.Helper()
	exit := exitOf(t, i)
	if exit.Reason != want {
		t.Fatalf("exit %+v, want reason %d", exit, want)
	}
	return exit
}

// receive waits for something to happen.
func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("waited %v until %s", patience, what)
		panic("unreachable")
	}
}
