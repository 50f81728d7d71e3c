package module

import "slices"

// Version names the rewriting that Meter does; caches of what was compiled from
// its output carry it. It changes whenever the output for the same input does.
const Version = "1"

// CheckpointModule and CheckpointName name the one import that Meter adds: a
// function without parameters that returns the next budget as an i64. It is
// called whenever the budget is used up and may end the guest instead.
const (
	CheckpointModule = "wasmatrix:meter"
	CheckpointName   = "checkpoint"
)

// What instructions cost, in units of a plain instruction. They need not be
// exact: they only make the time between two checkpoints roughly even.
const (
	costCall     = 5
	costIndirect = 20
	costImport   = 50
	costGrow     = 500
	costBulk     = 10

	// maxRegion bounds what one charge covers, so that straight-line code of
	// any length meets one often. It fits the three bytes left for it.
	maxRegion = 10_000
)

// shifts of the length operand of bulk instructions: what one unit pays for.
const (
	bytesPerUnit    = 4 // 16 bytes
	elementsPerUnit = 0
)

// shift maps a function index to its index in the rewritten module, where the
// checkpoint stands after the imported functions.
func (m *Module) shift(f uint32) uint32 {
	if int(f) >= m.importedFuncs {
		return f + 1
	}
	return f
}

// Meter returns the module rewritten such that it counts down a budget at every
// function entry, every loop head and now and then in between, and calls the
// checkpoint when it is used up. Apart from that it behaves like the original.
// The budget starts used up, so the first thing a guest does is to call the
// checkpoint. Errors are those of Decode.
//
// The cost of each stretch of code is known beforehand and charged at once, by
// its length; bulk instructions are charged by the length they are given before
// they run. So the time between two checkpoints has a bound whatever the guest
// does: the budget, one stretch, and one bulk instruction.
func (m *Module) Meter() ([]byte, error) {
	w := &writer{m: m}
	w.out = append(w.out, header...)
	w.section(1, w.types)
	w.section(2, w.imports)
	w.section(3, w.functions)
	w.section(4, w.tables)
	w.section(5, w.memories)
	w.section(6, w.globals)
	w.section(7, w.exports)
	if m.start != nil {
		w.section(8, func(b []byte) []byte { return appendU32(b, m.shift(*m.start)) })
	}
	w.section(9, w.elements)
	if m.dataCount != nil {
		w.section(12, func(b []byte) []byte { return appendU32(b, *m.dataCount) })
	}
	if err := w.code(); err != nil {
		return nil, err
	}
	w.section(11, w.data)
	w.nameSection()
	return w.out, nil
}

type writer struct {
	m       *Module
	out     []byte
	scratch []byte
}

// section writes a section unless fill leaves it empty.
func (w *writer) section(id byte, fill func([]byte) []byte) {
	w.scratch = fill(w.scratch[:0])
	if len(w.scratch) == 0 {
		return
	}
	w.out = appendU32(append(w.out, id), uint32(len(w.scratch)))
	w.out = append(w.out, w.scratch...)
}

func (w *writer) types(b []byte) []byte {
	b = appendU32(b, uint32(len(w.m.types)+1))
	for _, t := range w.m.types {
		b = appendU32(append(b, 0x60), uint32(len(t.Params)))
		b = append(b, raw(t.Params)...)
		b = appendU32(b, uint32(len(t.Results)))
		b = append(b, raw(t.Results)...)
	}
	return append(b, 0x60, 0, 1, byte(I64))
}

func (w *writer) imports(b []byte) []byte {
	b = appendU32(b, uint32(len(w.m.imports)+1))
	for _, i := range w.m.imports {
		b = append(appendName(appendName(b, i.Module), i.Name), byte(i.Kind))
		switch i.Kind {
		case Function:
			b = appendU32(b, i.index)
		case Table:
			b = w.table(b, i.table)
		case Memory:
			b = i.memory.append(b)
		case Global:
			b = append(b, byte(i.global.value), i.global.mutable)
		}
	}
	b = append(appendName(appendName(b, CheckpointModule), CheckpointName), byte(Function))
	return appendU32(b, uint32(len(w.m.types)))
}

func (w *writer) functions(b []byte) []byte {
	if len(w.m.functions) == 0 {
		return b
	}
	b = appendU32(b, uint32(len(w.m.functions)))
	for _, t := range w.m.functions {
		b = appendU32(b, t)
	}
	return b
}

func (l limits) append(b []byte) []byte {
	if !l.bounded {
		return appendU32(append(b, 0), l.min)
	}
	return appendU32(appendU32(append(b, 1), l.min), l.max)
}

// table lowers the maximum to the limit: the engine bounds the growth of tables
// by nothing else.
func (w *writer) table(b []byte, t table) []byte {
	limit := uint32(w.m.limits.TableElements)
	if !t.size.bounded || t.size.max > limit {
		t.size.bounded, t.size.max = true, limit
	}
	return t.size.append(append(b, byte(t.element)))
}

func (w *writer) tables(b []byte) []byte {
	if len(w.m.tables) == 0 {
		return b
	}
	b = appendU32(b, uint32(len(w.m.tables)))
	for _, t := range w.m.tables {
		b = w.table(b, t)
	}
	return b
}

func (w *writer) memories(b []byte) []byte {
	if len(w.m.memories) == 0 {
		return b
	}
	b = appendU32(b, uint32(len(w.m.memories)))
	for _, l := range w.m.memories {
		b = l.append(b)
	}
	return b
}

func (w *writer) globals(b []byte) []byte {
	b = appendU32(b, uint32(len(w.m.globals)+1))
	for _, g := range w.m.globals {
		b = append(append(b, byte(g.value), g.mutable), g.init...)
	}
	return append(b, byte(I64), 1, opI64Const, 0, opEnd)
}

func (w *writer) exports(b []byte) []byte {
	if len(w.m.exports) == 0 {
		return b
	}
	b = appendU32(b, uint32(len(w.m.exports)))
	for _, e := range w.m.exports {
		b = append(appendName(b, e.Name), byte(e.Kind))
		if e.Kind == Function {
			b = appendU32(b, w.m.shift(e.index))
		} else {
			b = appendU32(b, e.index)
		}
	}
	return b
}

func (w *writer) elements(b []byte) []byte {
	if len(w.m.elements) == 0 {
		return b
	}
	b = appendU32(b, uint32(len(w.m.elements)))
	for _, s := range w.m.elements {
		b = appendU32(b, s.flags)
		if s.flags&1 == 0 {
			if s.flags&2 != 0 {
				b = appendU32(b, s.index)
			}
			b = append(b, s.offset...)
		}
		if s.flags&3 != 0 {
			b = append(b, s.kind)
		}
		b = append(appendU32(b, uint32(s.count)), s.data...)
	}
	return b
}

func (w *writer) data(b []byte) []byte {
	if len(w.m.data) == 0 {
		return b
	}
	b = slices.Grow(b, w.m.dataBytes())
	b = appendU32(b, uint32(len(w.m.data)))
	for _, s := range w.m.data {
		b = appendU32(b, s.flags)
		if s.flags == 2 {
			b = appendU32(b, s.index)
		}
		b = append(b, s.offset...)
		b = append(appendU32(b, uint32(len(s.data))), s.data...)
	}
	return b
}

func (m *Module) dataBytes() int {
	n := 0
	for _, s := range m.data {
		n += len(s.data) + len(s.offset) + 16
	}
	return n
}

// nameSection writes the names of functions under their new indices, so that
// traps tell where they happened. Names that are damaged are left out.
func (w *writer) nameSection() {
	if w.m.names == nil {
		return
	}
	r := &reader{buf: w.m.names}
	n := r.count("names", 2, w.m.functionCount())
	sub := appendU32(nil, uint32(n))
	for range n {
		f := w.m.shift(r.index("function", w.m.functionCount()))
		sub = appendName(appendU32(sub, f), r.name())
	}
	if r.err != nil || r.left() > 0 {
		return
	}
	w.section(0, func(b []byte) []byte {
		b = append(appendName(b, "name"), 1)
		return append(appendU32(b, uint32(len(sub))), sub...)
	})
}
