package wasm_test

import (
	"context"
	goruntime "runtime"
	"runtime/metrics"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/wasmatrix/wasmatrix/runtime"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// calls is how many host calls one invocation of hostCaller makes.
const calls = 1000

// hostCaller calls "wasmatrix:kv/v1" get in a loop with 16 bytes in and room for
// 64 bytes out.
func hostCaller() []byte {
	var m rt.Module
	get := m.Import("wasmatrix:kv/v1", "get", []byte{rt.I32, rt.I32, rt.I32, rt.I32}, []byte{rt.I64})
	m.Memory(1)
	m.Func("wasmatrix_alloc", []byte{rt.I32}, []byte{rt.I32}, nil, rt.I32Const(1024))
	m.Func("wasmatrix_on_invoke", []byte{rt.I32, rt.I32}, []byte{rt.I64}, []byte{rt.I32},
		rt.I32Const(calls), rt.LocalSet(2),
		rt.Loop(
			rt.I32Const(0), rt.I32Const(16), rt.I32Const(256), rt.I32Const(64), rt.Call(get), rt.Drop,
			rt.LocalGet(2), rt.I32Const(1), rt.I32Sub, rt.LocalTee(2), rt.BrIf(0)),
		rt.I64Const(0))
	return m.Bytes()
}

var answer = make([]byte, 16)

// BenchmarkHostCall measures one capability call from guest to host and back: as
// wazero makes it at best, and as guests make it.
func BenchmarkHostCall(b *testing.B) {
	perCall := func(b *testing.B) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/calls, "ns/call")
	}
	b.Run("bare wazero", func(b *testing.B) {
		ctx := context.Background()
		r := wazero.NewRuntime(ctx)
		b.Cleanup(func() { _ = r.Close(ctx) })
		i32, i64 := api.ValueTypeI32, api.ValueTypeI64
		_, err := r.NewHostModuleBuilder("wasmatrix:kv/v1").NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(func(_ context.Context, _ api.Module, stack []uint64) { stack[0] = 0 }),
				[]api.ValueType{i32, i32, i32, i32}, []api.ValueType{i64}).Export("get").Instantiate(ctx)
		if err != nil {
			b.Fatal(err)
		}
		m, err := r.Instantiate(ctx, hostCaller())
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
	b.Run("capability", func(b *testing.B) {
		host := rt.HostFunc(func(context.Context, string, string, []byte) ([]byte, error) { return answer, nil })
		spec := rt.Spec(b, hostCaller())
		spec.Timeout = time.Minute
		i := rt.Started(b, open(b), spec, host)
		for b.Loop() {
			if _, err := i.Invoke(b.Context(), runtime.HandlerInvoke, nil); err != nil {
				b.Fatal(err)
			}
		}
		perCall(b)
	})
}

// BenchmarkInvoke measures the round trip of a call of 100 bytes.
func BenchmarkInvoke(b *testing.B) {
	for name, timeout := range map[string]time.Duration{"without time limit": 0, "with time limit": time.Minute} {
		b.Run(name, func(b *testing.B) {
			spec := rt.Spec(b, rt.Echo())
			spec.Timeout = timeout
			i := rt.Started(b, open(b), spec, quiet())
			payload := make([]byte, 100)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := i.Invoke(b.Context(), runtime.HandlerInvoke, payload); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStart measures an instance from Prepare to Close.
func BenchmarkStart(b *testing.B) {
	cycle := func(b *testing.B, r runtime.Runtime, spec runtime.Spec) {
		i, err := r.Prepare(b.Context(), spec, quiet())
		if err == nil {
			err = i.Start(b.Context())
		}
		if err == nil {
			err = i.Close(b.Context())
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	for name, binary := range map[string][]byte{"echo": rt.Echo(), "Go guest": buildGuest(b, true)} {
		spec := rt.Spec(b, binary)
		spec.MemoryBytes = 64 << 20
		b.Run(name+"/module in memory", func(b *testing.B) {
			r := open(b)
			cycle(b, r, spec)
			b.ReportAllocs()
			for b.Loop() {
				cycle(b, r, spec)
			}
		})
		b.Run(name+"/module on disk", func(b *testing.B) {
			dir := b.TempDir()
			cycle(b, open(b, onDisk(dir)), spec)
			for b.Loop() {
				cycle(b, open(b, onDisk(dir)), spec)
			}
		})
	}
}

// BenchmarkGarbageCollectionBesideSpinners tells how long a collection takes, and
// how long at most it took to stop the world for it, while a guest spins on every
// processor; and how long Stop takes.
func BenchmarkGarbageCollectionBesideSpinners(b *testing.B) {
	spec := rt.Spec(b, rt.SpinCommand())
	r := open(b)
	var guests []runtime.Instance
	for range goruntime.GOMAXPROCS(0) {
		guests = append(guests, rt.Started(b, r, spec, quiet()))
	}
	var longest time.Duration
	for b.Loop() {
		began := time.Now()
		goruntime.GC()
		longest = max(longest, time.Since(began))
	}
	b.ReportMetric(float64(longest.Microseconds()), "µs-longest")
	b.ReportMetric(longestStop()*1e6, "µs-to-stop-the-world")
	began := time.Now()
	for _, g := range guests {
		if err := g.Stop(b.Context(), 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(time.Since(began).Microseconds())/float64(len(guests)), "µs/stop")
}

// longestStop returns the upper end of the slowest stop of the world for the
// collector so far, in seconds.
func longestStop() float64 {
	sample := []metrics.Sample{{Name: "/sched/pauses/stopping/gc:seconds"}}
	metrics.Read(sample)
	h := sample[0].Value.Float64Histogram()
	slowest := 0.0
	for i, n := range h.Counts {
		if n > 0 && i+1 < len(h.Buckets) {
			slowest = h.Buckets[i+1]
		}
	}
	return slowest
}

func quiet() runtime.Host {
	return rt.HostFunc(func(context.Context, string, string, []byte) ([]byte, error) { return nil, nil })
}
