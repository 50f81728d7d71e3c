package module_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/tetratelabs/wazero"

	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// TestRandomProgramsDoTheSameWhenMetered makes programs with nested blocks,
// loops, branches, calls, tables of branches, memory and bulk instructions, and
// compares their results and their memory, with a budget so small that the
// checkpoint is called all the time.
func TestRandomProgramsDoTheSameWhenMetered(t *testing.T) {
	programs := 200
	if testing.Short() || raceEnabled {
		programs = 20
	}
	plainEngine, meteredEngine := newEngine(t, 0), newEngine(t, 3)
	for seed := range programs {
		g := &generator{rand: rand.New(rand.NewPCG(uint64(seed), 7))}
		binary := g.program()
		rewritten, err := metered(binary)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		want, wantMemory := execute(t, plainEngine, binary)
		got, gotMemory := execute(t, meteredEngine, rewritten)
		if want != got || wantMemory != gotMemory {
			t.Fatalf("seed %d: plainly %s, metered %s; memory equal: %v", seed, want, got, wantMemory == gotMemory)
		}
	}
}

func execute(t *testing.T, r wazero.Runtime, binary []byte) (result, memory string) {
	t.Helper()
	m, err := r.InstantiateWithConfig(context.Background(), binary, wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close(context.Background()) }()
	for _, input := range []uint64{0, 1, 12345} {
		result += outcome(m.ExportedFunction("main"), []uint64{input}) + ";"
	}
	view, _ := m.Memory().Read(0, m.Memory().Size())
	memory = string(view)
	return result, memory
}

// Locals of every generated function: the parameter, three for values, then one
// counter for each level of loops.
const (
	valueLocals = 4
	loopLevels  = 3
)

type generator struct {
	rand  *rand.Rand
	funcs uint32
	fuel  int
}

func (g *generator) program() []byte {
	var m rt.Module
	m.Memory(1)
	m.Data(0, []byte("some bytes to begin with"))
	counter := m.Global(rt.I32, rt.I32Const(0))
	locals := make([]byte, valueLocals-1+loopLevels)
	for i := range locals {
		locals[i] = rt.I32
	}
	for g.funcs = range uint32(5) {
		name := ""
		if g.funcs == 4 {
			name = "main"
		}
		g.fuel = 60
		m.Func(name, []byte{rt.I32}, []byte{rt.I32}, locals,
			g.block(0), rt.GlobalGet(counter), rt.I32Const(1), rt.I32Add, rt.GlobalSet(counter),
			g.value(2), rt.GlobalGet(counter), rt.I32Add)
	}
	return m.Bytes()
}

// block is a sequence of statements; level is the number of loops around it.
func (g *generator) block(level int) []byte {
	var out []byte
	for range 1 + g.rand.IntN(4) {
		if g.fuel--; g.fuel < 0 {
			break
		}
		out = append(out, g.statement(level)...)
	}
	return out
}

func (g *generator) statement(level int) []byte {
	local := uint32(g.rand.IntN(valueLocals))
	switch g.rand.IntN(11) {
	case 0:
		return rt.Block(g.block(level))
	case 1:
		return rt.Cat(g.value(2), rt.If(g.block(level), rt.Else, g.block(level)))
	case 2, 3:
		if level < loopLevels {
			return g.loop(level)
		}
	case 4:
		return g.branch()
	case 5:
		return rt.Cat(g.value(1), rt.I32Const(0xfff), []byte{0x71}, g.value(2), rt.I32Store)
	case 6:
		return rt.Cat(rt.I32Const(int32(g.rand.IntN(60000))), rt.I32Const(int32(g.rand.IntN(60000))), g.value(1), rt.I32Const(0xff), []byte{0x71}, rt.MemoryCopy)
	case 7:
		return rt.Cat(rt.I32Const(int32(g.rand.IntN(60000))), g.value(1), rt.I32Const(int32(g.rand.IntN(100))), rt.MemoryFill)
	case 8:
		if g.rand.IntN(4) == 0 {
			return rt.Cat(rt.I32Const(1), rt.MemoryGrow, rt.LocalSet(local))
		}
	}
	return rt.Cat(g.value(3), rt.LocalSet(local))
}

// loop runs its body a few times, counted down in the local of its level.
func (g *generator) loop(level int) []byte {
	counter := uint32(valueLocals + level)
	return rt.Cat(
		rt.I32Const(int32(1+g.rand.IntN(5))), rt.LocalSet(counter),
		rt.Loop(
			g.block(level+1),
			rt.LocalGet(counter), rt.I32Const(1), rt.I32Sub, rt.LocalTee(counter), rt.BrIf(0)))
}

// branch leaves a block by br_if and by br_table. It never goes to a loop, which
// would begin anew without counting.
func (g *generator) branch() []byte {
	return rt.Block(
		rt.Block(g.value(1), rt.BrIf(0), g.value(1), rt.BrIf(1), g.value(1), []byte{0x0e}, rt.U32(3), []byte{0, 1, 0, 1}),
		rt.I32Const(8), rt.I32Const(8), rt.I32Load, rt.I32Const(1), rt.I32Add, rt.I32Store)
}

// value is an expression of type i32.
func (g *generator) value(depth int) []byte {
	if depth > 0 && g.fuel > 0 {
		switch g.rand.IntN(7) {
		case 0:
			return rt.Cat(g.value(depth-1), g.value(depth-1), rt.I32Add)
		case 1:
			return rt.Cat(g.value(depth-1), g.value(depth-1), rt.I32Mul)
		case 2:
			// May trap by a division by zero.
			return rt.Cat(g.value(depth-1), g.value(depth-1), rt.I32Const(int32(g.rand.IntN(40))), []byte{0x72, 0x6e})
		case 3:
			return rt.Cat(g.value(depth-1), rt.I32Const(0x1ffff), []byte{0x71}, rt.I32Load)
		case 4:
			if g.funcs > 0 && g.fuel > 20 {
				g.fuel -= 20
				return rt.Cat(g.value(depth-1), rt.Call(uint32(g.rand.IntN(int(g.funcs)))))
			}
		case 5:
			return rt.Cat(g.value(depth-1), []byte{0x04, rt.I32}, g.value(depth-1), rt.Else, g.value(depth-1), []byte{0x0b})
		}
	}
	if g.rand.IntN(2) == 0 {
		return rt.I32Const(int32(g.rand.Uint32()))
	}
	return rt.LocalGet(uint32(g.rand.IntN(valueLocals)))
}
