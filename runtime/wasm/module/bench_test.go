package module_test

import (
	"context"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// programs are small loads with an exported "run" that takes a number of turns.
func programs() map[string][]byte {
	turn := rt.Cat(rt.LocalGet(0), rt.I32Const(1), rt.I32Sub, rt.LocalTee(0), rt.BrIf(0))
	var empty, work, fib rt.Module
	empty.Func("run", []byte{rt.I32}, nil, nil, rt.Loop(turn))
	work.Memory(1)
	work.Func("run", []byte{rt.I32}, nil, []byte{rt.I32}, rt.Loop(
		rt.LocalGet(0), rt.I32Const(0xfffc), []byte{0x71}, rt.LocalTee(1), rt.LocalGet(1), rt.I32Load,
		rt.LocalGet(0), rt.I32Mul, rt.I32Const(77), rt.I32Add, rt.I32Store, turn))
	f := fib.Func("fib", []byte{rt.I32}, []byte{rt.I32}, nil,
		rt.LocalGet(0), rt.I32Const(2), []byte{0x49},
		[]byte{0x04, rt.I32}, rt.LocalGet(0), rt.Else,
		rt.LocalGet(0), rt.I32Const(1), rt.I32Sub, rt.Call(0),
		rt.LocalGet(0), rt.I32Const(2), rt.I32Sub, rt.Call(0), rt.I32Add, []byte{0x0b})
	fib.Func("run", []byte{rt.I32}, nil, nil, rt.Loop(rt.I32Const(20), rt.Call(f), rt.Drop, turn))
	return map[string][]byte{"empty loop": empty.Bytes(), "loop with memory": work.Bytes(), "fib(20)": fib.Bytes()}
}

// BenchmarkMetering compares one turn of each program with and without metering.
func BenchmarkMetering(b *testing.B) {
	for name, binary := range programs() {
		for _, how := range []string{"plain", "metered"} {
			b.Run(name+"/"+how, func(b *testing.B) {
				f := load(b, binary, how == "metered").ExportedFunction("run")
				b.ResetTimer()
				if _, err := f.Call(context.Background(), uint64(uint32(b.N))); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

func load(b *testing.B, binary []byte, meter bool) api.Module {
	b.Helper()
	if meter {
		var err error
		if binary, err = metered(binary); err != nil {
			b.Fatal(err)
		}
	}
	m, err := newEngine(b, 200_000).InstantiateWithConfig(context.Background(), binary, wazero.NewModuleConfig())
	if err != nil {
		b.Fatal(err)
	}
	return m
}

// BenchmarkMeter measures the rewriting itself.
func BenchmarkMeter(b *testing.B) {
	var m rt.Module
	m.Memory(1)
	for range 1000 {
		m.Func("", []byte{rt.I32}, nil, nil, rt.Repeat(100, rt.Loop(rt.LocalGet(0), rt.I32Eqz, rt.BrIf(0))))
	}
	binary := m.Bytes()
	b.SetBytes(int64(len(binary)))
	for b.Loop() {
		if _, err := metered(binary); err != nil {
			b.Fatal(err)
		}
	}
}
