package wasm_test

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

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

func TestConformance(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtime.Runtime { return open(t) })
}
