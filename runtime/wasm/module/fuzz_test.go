package module_test

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"

	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// FuzzMeter feeds arbitrary bytes: nothing panics, the output is of the order of
// the input, and what the engine refuses plainly it refuses metered as well.
func FuzzMeter(f *testing.F) {
	for _, h := range runtimetest.HostileModules() {
		if binary := h.Module(); len(binary) < 4096 {
			f.Add(binary)
		}
	}
	for _, binary := range programs() {
		f.Add(binary)
	}
	f.Add(runtimetest.Echo())
	f.Add(runtimetest.Caller("wasmatrix:kv/v1", "get"))
	limits := module.Limits{Bytes: 64 << 10, Locals: 1000, TotalLocals: 10_000, MemoryPages: 16, TableElements: 1000}
	f.Fuzz(func(t *testing.T, binary []byte) {
		m, err := module.Decode(binary, limits)
		if err != nil {
			return
		}
		rewritten, err := m.Meter()
		if err != nil {
			return
		}
		if len(rewritten) > 40*len(binary)+1000 {
			t.Fatalf("%d bytes became %d", len(binary), len(rewritten))
		}
		if bytes.Contains(binary, []byte("\x04name")) {
			return // the engine takes as much memory as a damaged name section claims to need
		}
		ctx := context.Background()
		r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter().WithCoreFeatures(features))
		defer func() { _ = r.Close(ctx) }()
		_, plain := r.CompileModule(ctx, binary)
		if plain != nil && (strings.Contains(plain.Error(), "unsupported misc instruction") || strings.Contains(plain.Error(), "custom")) {
			// The engine is stricter than the specification about numbers encoded
			// longer than need be and about custom sections; Meter mends both.
			return
		}
		if _, err := r.CompileModule(ctx, rewritten); (err == nil) != (plain == nil) {
			t.Fatalf("plainly %v, metered %v", plain, err)
		}
	})
}
