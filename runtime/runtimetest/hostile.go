package runtimetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Hostile is a module made to do harm.
type Hostile struct {
	// Name says what it tries.
	Name string
	// Module returns the binary.
	Module func() []byte
	// Refused is true for a module that must not get as far as Start. Others may
	// be refused as well, but what runs has to end by its time limit at the latest.
	Refused bool
}

// hostileTime is the time limit under which hostile modules run.
const hostileTime = 200 * time.Millisecond

// RunHostile is the part of Run about HostileModules: each is refused or ended by
// its time limit, and the executor goes on to serve others.
func RunHostile(t *testing.T, open func(t *testing.T) runtime.Runtime) {
	for _, h := range HostileModules() {
		t.Run(h.Name, func(t *testing.T) {
			r := open(t)
			spec := Spec(t, h.Module())
			spec.Timeout = hostileTime
			i, err := r.Prepare(t.Context(), spec, NoHost(t))
			if err != nil {
				if !errors.Is(err, runtime.ErrModuleInvalid) {
					t.Fatalf("Prepare: %v, want ErrModuleInvalid", err)
				}
				return
			}
			defer func() {
				if err := i.Close(context.WithoutCancel(t.Context())); err != nil {
					t.Errorf("Close: %v", err)
				}
			}()
			if h.Refused {
				t.Fatal("the module was not refused")
			}
			ctx, cancel := context.WithTimeout(t.Context(), hostileTime+patience)
			defer cancel()
			if err := i.Start(ctx); err == nil {
				if _, err := i.Wait(ctx); err != nil {
					t.Fatalf("it runs on after its time limit of %v", hostileTime)
				}
			}
			// The executor goes on to serve others.
			if got := invoke(t, Started(t, r, Spec(t, Echo()), NoHost(t)), "well"); got != "well" {
				t.Fatalf("another guest answered %q", got)
			}
		})
	}
}

// command is a command without imports whose _start runs code.
func command(code ...[]byte) []byte {
	var m Module
	m.Memory(1)
	m.Func("_start", nil, nil, nil, code...)
	return m.Bytes()
}

// HostileModules returns the known ways to do harm, all of them commands.
func HostileModules() []Hostile {
	return append(append(append(spinners(), hogs()...), compilerBombs()...), malformed()...)
}

// spinners never end by themselves.
func spinners() []Hostile {
	return []Hostile{
		{Name: "endless loop", Module: func() []byte { return command(Loop(Br(0))) }},
		{Name: "endless loop in the start function", Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Start(m.Func("", nil, nil, nil, Loop(Br(0))))
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "endless loop by br_table", Module: func() []byte {
			return command(Loop(I32Const(0), []byte{0x0e, 1, 0, 0}))
		}},
		{Name: "endless loop with a result", Module: func() []byte {
			return command([]byte{0x03, I32}, Br(0), []byte{0x0b}, Drop)
		}},
		{Name: "exponential calls without a loop", Module: func() []byte {
			var m Module
			m.Memory(1)
			f := m.Func("", nil, nil, nil)
			for range 60 {
				f = m.Func("", nil, nil, nil, Call(f), Call(f))
			}
			m.Func("_start", nil, nil, nil, Call(f))
			return m.Bytes()
		}},
		{Name: "exponential calls through a table", Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Table(FuncRef, 0, 61)
			t := m.Type(nil, nil)
			funcs := []uint32{m.Func("", nil, nil, nil)}
			for n := range int32(60) {
				funcs = append(funcs, m.Func("", nil, nil, nil, I32Const(n), CallIndirect(t), I32Const(n), CallIndirect(t)))
			}
			m.Elements(0, funcs...)
			m.Func("_start", nil, nil, nil, Call(funcs[60]))
			return m.Bytes()
		}},
		{Name: "endless recursion", Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Func("_start", nil, nil, nil, Call(0))
			return m.Bytes()
		}},
		{Name: "deep recursion and then an endless loop", Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Func("f", []byte{I32}, nil, nil,
				LocalGet(0), I32Eqz, If(Loop(Br(0))), LocalGet(0), I32Const(1), I32Sub, Call(0))
			m.Func("_start", nil, nil, nil, I32Const(200_000), Call(0))
			return m.Bytes()
		}},
		{Name: "filling memory for ever", Module: func() []byte {
			return command(I32Const(200), MemoryGrow, Drop,
				Loop(I32Const(0), I32Const(7), I32Const(200<<16), MemoryFill, Br(0)))
		}},
		{Name: "copying memory in a long straight line", Module: func() []byte {
			one := Cat(I32Const(0), I32Const(64), I32Const(200<<16), MemoryCopy)
			return command(I32Const(201), MemoryGrow, Drop, Repeat(1000, one))
		}},
		{Name: "a long straight line of calls", Module: func() []byte {
			var m Module
			m.Memory(1)
			leaf := m.Func("", nil, nil, nil, I32Const(0), I32Const(7), I32Const(65536), MemoryFill)
			m.Func("_start", nil, nil, nil, Repeat(500_000, Call(leaf)))
			return m.Bytes()
		}},
		{Name: "sleeping for years", Module: func() []byte { return Sleeper(1 << 62) }},
		{Name: "sleeping in a loop", Module: func() []byte {
			return Command(nil,
				store32(64+16, 1),
				Loop(I32Const(64), I32Const(128), I32Const(1), I32Const(256), Call(pollOneoff), Drop, Br(0)))
		}},
		{Name: "subscribing four thousand million times", Module: func() []byte {
			return Command(nil, Loop(I32Const(0), I32Const(0), I32Const(-1), I32Const(256), Call(pollOneoff), Drop, Br(0)))
		}},
	}
}

// hogs take more than they should.
func hogs() []Hostile {
	return []Hostile{
		{Name: "growing memory for ever", Module: func() []byte { return command(Loop(I32Const(16), MemoryGrow, Drop, Br(0))) }},
		{Name: "4 GiB of memory from the start", Refused: true, Module: func() []byte {
			var m Module
			m.Memory(65536)
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "a table of 2^27 elements", Refused: true, Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Table(Cat([]byte{FuncRef, 0}, U32(1<<27))...)
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "a hundred tables", Refused: true, Module: func() []byte {
			var m Module
			m.Memory(1)
			for range 100 {
				m.Table(Cat([]byte{FuncRef, 0}, U32(1<<17))...)
			}
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "growing a table for ever", Module: func() []byte {
			var m Module
			m.Memory(1)
			m.Table(FuncRef, 0, 1)
			m.Func("_start", nil, nil, nil,
				Loop([]byte{0xd0, FuncRef}, I32Const(1<<16), []byte{0xfc, 15, 0}, Drop, Br(0)))
			return m.Bytes()
		}},
		{Name: "writing all of memory to stdout in one call, for ever", Module: func() []byte {
			// All of memory holds vectors that each name all of memory.
			return Command([]byte{I32}, I32Const(198), MemoryGrow, Drop,
				Loop(
					LocalGet(0), I32Const(0), I32Store,
					LocalGet(0), I32Const(200<<16), []byte{0x36, 2, 4},
					LocalGet(0), I32Const(8), I32Add, LocalTee(0),
					I32Const(200<<16-16), []byte{0x49}, BrIf(0)),
				Loop(I32Const(1), I32Const(0), I32Const((200<<16)/8-4), I32Const(200<<16-4), Call(fdWrite), Drop, Br(0)))
		}},
		{Name: "random numbers for all of memory, for ever", Module: func() []byte {
			var m Module
			m.Import("wasi_snapshot_preview1", "random_get", []byte{I32, I32}, []byte{I32})
			m.Memory(200)
			m.Func("_start", nil, nil, nil, Loop(I32Const(0), I32Const(200<<16), Call(0), Drop, Br(0)))
			return m.Bytes()
		}},
	}
}

// compilerBombs are small and take long or much to compile.
func compilerBombs() []Hostile {
	raw := func(body ...[]byte) func() []byte {
		return func() []byte {
			var m Module
			m.Memory(1)
			m.FuncRaw("_start", nil, nil, Cat(body...))
			return m.Bytes()
		}
	}
	end := []byte{0x0b}
	return []Hostile{
		{Name: "2^31 locals", Refused: true, Module: raw([]byte{1}, U32(1<<31), []byte{I32}, end)},
		{Name: "2^32 locals in two groups", Refused: true, Module: raw([]byte{2}, U32(1<<31), []byte{I32}, U32(1<<31), []byte{I64}, end)},
		{Name: "a thousand functions of 20,000 locals", Refused: true, Module: func() []byte {
			var m Module
			m.Memory(1)
			for range 1000 {
				m.FuncRaw("", nil, nil, Cat([]byte{1}, U32(20_000), []byte{I32}, end))
			}
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "a million nested blocks", Refused: true, Module: func() []byte {
			const n = 1_000_000
			return raw([]byte{0}, Repeat(n, []byte{0x02, 0x40}), Repeat(n, end), end)()
		}},
		{Name: "a br_table of a million targets", Refused: true, Module: func() []byte {
			const n = 1_000_000
			return raw([]byte{0, 0x02, 0x40, 0x41, 0, 0x0e}, U32(n), Repeat(n+1, []byte{0}), end, end)()
		}},
		{Name: "a function of 8 MiB", Refused: true, Module: func() []byte {
			return raw([]byte{0}, Repeat(8<<20/3, []byte{0x41, 1, 0x1a}), end)()
		}},
		{Name: "a memory that claims 2^32 data segments", Refused: true, Module: func() []byte {
			return Cat(command(), Section(11, U32(0xffffffff)))
		}},
	}
}

// malformed are no modules at all, or were damaged on purpose.
func malformed() []Hostile {
	cut := func(n int) func() []byte {
		return func() []byte { b := Echo(); return b[:len(b)-n] }
	}
	bytesOf := func(b ...byte) func() []byte { return func() []byte { return b } }
	return []Hostile{
		{Name: "no bytes", Refused: true, Module: bytesOf()},
		{Name: "a text file", Refused: true, Module: func() []byte { return []byte("#!/bin/sh\nexit 0\n") }},
		{Name: "only a header", Refused: true, Module: bytesOf(0, 'a', 's', 'm', 1, 0, 0, 0)},
		{Name: "a component", Refused: true, Module: bytesOf(0, 'a', 's', 'm', 0x0d, 0, 1, 0)},
		{Name: "cut off", Refused: true, Module: cut(40)},
		{Name: "setting a global that metering adds", Refused: true, Module: func() []byte {
			return command(I64Const(1<<62), GlobalSet(0), Loop(Br(0)))
		}},
		{Name: "calling a function that metering adds", Refused: true, Module: func() []byte {
			return command(Call(1))
		}},
		{Name: "an import of the checkpoint", Refused: true, Module: func() []byte {
			var m Module
			m.Import("wasmatrix:meter", "checkpoint", nil, []byte{I64})
			m.Memory(1)
			m.Func("_start", nil, nil, nil)
			return m.Bytes()
		}},
		{Name: "an instruction encoded longer than it should be", Module: func() []byte {
			// memory.fill as 0xfc 0x8b 0x00, which other decoders may read as two instructions.
			return command(I32Const(0), I32Const(0), I32Const(0), []byte{0xfc, 0x8b, 0, 0})
		}},
		{Name: "a tail call", Refused: true, Module: func() []byte { return command([]byte{0x12, 0}) }},
		{Name: "atomics", Refused: true, Module: func() []byte { return command([]byte{0xfe, 3, 0}) }},
		{Name: "an exception", Refused: true, Module: func() []byte { return command([]byte{0x08, 0}) }},
		{Name: "code after the end of a function", Refused: true, Module: func() []byte {
			return command([]byte{0x0b, 0x01})
		}},
		{Name: "a type error", Refused: true, Module: func() []byte { return command(I64Const(0), I32Eqz, Drop) }},
	}
}
