package runtimetest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// refused prepares a module that must be refused with a message that holds all
// of these words.
func refused(t *testing.T, r runtime.Runtime, spec runtime.Spec, words ...string) {
	t.Helper()
	i, err := r.Prepare(t.Context(), spec, NoHost(t))
	if err == nil {
		_ = i.Close(context.WithoutCancel(t.Context()))
		t.Fatal("the module was not refused")
	}
	if !errors.Is(err, runtime.ErrModuleInvalid) {
		t.Fatalf("error %v, want ErrModuleInvalid", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("the message %q does not say %q", err, w)
		}
	}
}

var refusalTests = []conformance{
	{"a component", func(t *testing.T, r runtime.Runtime) {
		refused(t, r, Spec(t, []byte{0, 'a', 's', 'm', 0x0d, 0, 1, 0}), "component", "core module")
	}},
	{"no module at all", func(t *testing.T, r runtime.Runtime) {
		refused(t, r, Spec(t, nil), "empty")
		refused(t, r, Spec(t, []byte("hello, world")), "no WebAssembly")
	}},
	{"another version of the guest interface", func(t *testing.T, r runtime.Runtime) {
		refused(t, r, Spec(t, Caller("wasmatrix:kv/v2", "get")), "wasmatrix:kv/v2", "v1")
	}},
	{"an unknown import", func(t *testing.T, r runtime.Runtime) {
		refused(t, r, Spec(t, Caller("wasmatrix:kv/v1", "drop_all")), "drop_all")
		refused(t, r, Spec(t, Caller("wasmatrix:gpu/v1", "run")), "wasmatrix:gpu/v1")
		refused(t, r, Spec(t, Caller("env", "memcpy")), "env", "memcpy")
		refused(t, r, Spec(t, Caller("wasi_snapshot_preview1", "fd_teleport")), "fd_teleport")
	}},
	{"an import with another type", func(t *testing.T, r runtime.Runtime) {
		var m Module
		m.Import("wasmatrix:kv/v1", "get", []byte{I32}, []byte{I32})
		reactor(&m)
		m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, I64Const(0))
		refused(t, r, Spec(t, m.Bytes()), "(i32) -> i32", "(i32 i32 i32 i32) -> i64")
	}},
	{"an imported memory", func(t *testing.T, r runtime.Runtime) {
		var m Module
		m.ImportRaw("wasmatrix:kv/v1", "get", 2, 0, 1)
		m.Export("memory", 2, 0)
		m.Func("_start", nil, nil, nil)
		refused(t, r, Spec(t, m.Bytes()), "memory", "functions only")
	}},
	{"missing exports", func(t *testing.T, r runtime.Runtime) {
		var nothing, noAlloc, noMemory Module
		nothing.Memory(1)
		refused(t, r, Spec(t, nothing.Bytes()), "_start", "wasmatrix_on_invoke")
		noAlloc.Memory(1)
		noAlloc.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, I64Const(0))
		refused(t, r, Spec(t, noAlloc.Bytes()), "wasmatrix_alloc")
		noMemory.Func("wasmatrix_alloc", []byte{I32}, []byte{I32}, nil, I32Const(0))
		noMemory.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, I64Const(0))
		refused(t, r, Spec(t, noMemory.Bytes()), "memory")
	}},
	{"a handler with another type", func(t *testing.T, r runtime.Runtime) {
		var m Module
		reactor(&m)
		m.Func("wasmatrix_on_http", nil, nil, nil)
		refused(t, r, Spec(t, m.Bytes()), "wasmatrix_on_http", "() -> ()", "(i32 i32) -> i64")
	}},
	{"command and reactor at once", func(t *testing.T, r runtime.Runtime) {
		var m Module
		reactor(&m)
		m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, I64Const(0))
		m.Func("_start", nil, nil, nil)
		refused(t, r, Spec(t, m.Bytes()), "_start", "wasmatrix_on_invoke")
	}},
	{"more memory than the instance may have", func(t *testing.T, r runtime.Runtime) {
		spec := Spec(t, Echo())
		spec.MemoryBytes = 64 << 10
		refused(t, r, spec, "128 KiB", "64 KiB")
	}},
}
