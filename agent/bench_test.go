package agent

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// getsPerCall is how many gets one call of getter makes.
const getsPerCall = 1000

// getter makes gets of "kv" with a request at address 0, with room for an answer
// of 2 KiB.
func getter(request []byte) []byte {
	const i32, i64 = runtimetest.I32, runtimetest.I64
	var m runtimetest.Module
	get := m.Import("wasmatrix:kv/v1", "get", []byte{i32, i32, i32, i32}, []byte{i64})
	m.Memory(1)
	m.Data(0, request)
	m.Func("wasmatrix_alloc", []byte{i32}, []byte{i32}, nil, runtimetest.I32Const(8192))
	m.Func("wasmatrix_on_invoke", []byte{i32, i32}, []byte{i64}, []byte{i32},
		runtimetest.I32Const(getsPerCall), runtimetest.LocalSet(2),
		runtimetest.Loop(
			runtimetest.I32Const(0), runtimetest.I32Const(int32(len(request))), runtimetest.I32Const(1024), runtimetest.I32Const(2048),
			runtimetest.Call(get), runtimetest.Drop,
			runtimetest.LocalGet(2), runtimetest.I32Const(1), runtimetest.I32Sub, runtimetest.LocalTee(2), runtimetest.BrIf(0)),
		runtimetest.I64Const(0))
	return m.Bytes()
}

// BenchmarkGuestGet is a guest's get of 1 KiB from a provider in memory on its own
// node, with all that lies between, beside the bare host call of wazero.
func BenchmarkGuestGet(b *testing.B) {
	request, err := proto.Marshal(&pb.KvGetRequest{Key: []byte("orders/00500")})
	if err != nil {
		b.Fatal(err)
	}
	perCall := func(b *testing.B) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/getsPerCall, "ns/call")
	}
	b.Run("bare wazero", func(b *testing.B) {
		ctx := b.Context()
		r := wazero.NewRuntime(ctx)
		b.Cleanup(func() { _ = r.Close(context.WithoutCancel(ctx)) })
		i32, i64 := api.ValueTypeI32, api.ValueTypeI64
		_, err := r.NewHostModuleBuilder("wasmatrix:kv/v1").NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(func(_ context.Context, _ api.Module, stack []uint64) { stack[0] = 0 }),
				[]api.ValueType{i32, i32, i32, i32}, []api.ValueType{i64}).Export("get").Instantiate(ctx)
		if err != nil {
			b.Fatal(err)
		}
		m, err := r.Instantiate(ctx, getter(request))
		if err != nil {
			b.Fatal(err)
		}
		f := m.ExportedFunction("wasmatrix_on_invoke")
		for b.Loop() {
			if _, err := f.Call(ctx, 0, 0); err != nil {
				b.Fatal(err)
			}
		}
		perCall(b)
	})
	b.Run("memory", func(b *testing.B) {
		port := portTo(b)
		set, err := proto.Marshal(&pb.KvSetRequest{Key: []byte("orders/00500"), Value: make([]byte, 1<<10)})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := port.Call(b.Context(), permission.KV, "set", set); err != nil {
			b.Fatal(err)
		}
		executor, err := wasm.New(b.Context(), wasm.Config{CacheDir: b.TempDir(), Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = executor.Close(context.WithoutCancel(b.Context())) })
		spec := runtimetest.Spec(b, getter(request))
		spec.Timeout = time.Minute
		guest := runtimetest.Started(b, executor, spec, &host{inst: &pb.Instance{Id: "web-1"}, port: port})
		ctx := correlation.With(b.Context(), "c") // as a call of the API has
		for b.Loop() {
			if _, err := guest.Invoke(ctx, runtime.HandlerInvoke, nil); err != nil {
				b.Fatal(err)
			}
		}
		perCall(b)
	})
}

// portTo is the way of instance web-1 to a provider in memory on its node.
func portTo(b *testing.B) *provider.Port {
	b.Helper()
	permissions, err := permission.ParseSet([]string{"kv:read:orders/", "kv:write:orders/"})
	if err != nil {
		b.Fatal(err)
	}
	d := provider.NewDirectory("n1")
	d.Replace(provider.Records{
		Instances:   []provider.InstanceRecord{{ID: "web-1", Name: "web", Node: "n1", Generation: 1, Created: 1}},
		Providers:   []provider.ProviderRecord{{ID: "kv", Type: "kv", Node: "n1", Generation: 1, Running: true}},
		Assignments: []provider.Assignment{{Instance: "web-1", Provider: "kv", Bucket: "web", Permissions: permissions}},
	})
	kind := kv.New(kv.Options{})
	h := provider.NewHost(slog.New(slog.DiscardHandler), kind)
	if err := h.Start(b.Context(), "kv", provider.Config{ID: "kv", Driver: "memory"}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = h.Close(context.WithoutCancel(b.Context())) })
	router, err := provider.NewRouter(provider.RouterConfig{Directory: d, Host: h, Kinds: []provider.Kind{kind}})
	if err != nil {
		b.Fatal(err)
	}
	return router.Port("web-1", 1, 0)
}
