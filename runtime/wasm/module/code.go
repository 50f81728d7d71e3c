package module

import "slices"

// code writes the code section.
func (w *writer) code() error {
	if len(w.m.bodies) == 0 {
		return nil
	}
	f := function{m: w.m, counter: uint32(w.m.globalCount()), checkpoint: uint32(w.m.importedFuncs)}
	section := make([]byte, 0, w.m.codeBytes())
	section = appendU32(section, uint32(len(w.m.bodies)))
	for i := range w.m.bodies {
		var err error
		if section, err = f.rewrite(section, i); err != nil {
			return err
		}
	}
	w.out = appendU32(append(w.out, 10), uint32(len(section)))
	w.out = append(w.out, section...)
	return nil
}

// codeBytes guesses the size of the rewritten code.
func (m *Module) codeBytes() int {
	n := 0
	for _, b := range m.bodies {
		n += b.size + b.size/4 + 64
	}
	return n
}

// function rewrites one body after another.
type function struct {
	m                   *Module
	counter, checkpoint uint32
	totalLocals         int

	r      reader
	out    []byte // the instructions of the present function
	head   []byte // its declaration of locals
	locals uint32 // its locals with the parameters
	// lengths is the index of the local that holds the length of a bulk
	// instruction; it equals locals and is declared when used is true.
	used   bool
	frames []frame
	// points are the charges written so far whose cost is not final; the last is
	// not always the present one, because the end of a block goes back to the
	// charge before the block.
	points []point
	now    int // index of the present charge
	// constant is what the instruction before pushed, if that was an i32.const
	// that is not negative; -1 otherwise.
	constant int64
}

// frame is an open block.
type frame struct {
	op byte
	// point is the charge that covers what follows the block, and its second arm.
	point int
}

// point is one charge: the offset of its cost in out, and the cost.
type point struct {
	at   int
	cost uint32
}

func (f *function) rewrite(section []byte, index int) ([]byte, error) {
	f.r = f.m.bodies[index].r
	f.out, f.head = f.out[:0], f.head[:0]
	f.points, f.frames, f.used, f.constant = f.points[:0], f.frames[:0], false, -1
	f.declare(f.m.types[f.m.functions[index]])
	f.frames = append(f.frames, frame{op: opBlock})
	f.charge()
	f.points[0].cost = f.locals / 4
	for len(f.frames) > 0 && f.r.err == nil {
		f.instruction()
	}
	if f.r.err == nil && f.r.left() > 0 {
		f.r.malformed("instructions after the end of function %d", f.m.importedFuncs+index)
	}
	if f.r.err != nil {
		return section, f.r.err
	}
	for _, p := range f.points {
		putCost(f.out[p.at:], p.cost)
	}
	return f.finish(section), nil
}

// declare reads the declaration of locals.
func (f *function) declare(t FuncType) {
	f.locals = uint32(len(t.Params))
	groups := f.r.count("groups of locals", 2, f.m.limits.Locals)
	for range groups {
		n := f.r.u32()
		total := uint64(f.locals) + uint64(n)
		if f.r.err == nil && total > uint64(f.m.limits.Locals) {
			f.r.fail(ErrLimit, "%d locals in a function, at most %d allowed", total, f.m.limits.Locals)
		}
		if f.r.err != nil {
			return
		}
		f.locals = uint32(total)
		f.head = append(appendU32(f.head, n), byte(f.m.valueType(&f.r)))
	}
	f.head = slices.Insert(f.head, 0, appendU32(nil, uint32(groups))...)
	if f.totalLocals += int(f.locals); f.totalLocals > f.m.limits.TotalLocals {
		f.r.fail(ErrLimit, "%d locals in all functions, at most %d allowed", f.totalLocals, f.m.limits.TotalLocals)
	}
}

// finish appends the body with its size, and with one more local where bulk
// instructions need it.
func (f *function) finish(section []byte) []byte {
	if f.used {
		r := reader{buf: f.head}
		groups := r.u32()
		head := append(appendU32(nil, groups+1), f.head[r.pos:]...)
		head = append(head, 1, byte(I32))
		f.head = head
	}
	section = appendU32(section, uint32(len(f.head)+len(f.out)))
	return append(append(section, f.head...), f.out...)
}

// instruction reads one instruction and writes it with what metering adds. Every
// immediate is encoded anew.
func (f *function) instruction() {
	op := f.r.byte()
	if f.r.err != nil {
		return
	}
	f.pay(1)
	r := &f.r
	if immediates[op] != immMisc && op != opMemoryGrow {
		f.constant = -1
	}
	switch immediates[op] {
	case immNone:
		f.out = append(f.out, op)
	case immBlock:
		f.block(op)
	case immElse:
		f.otherwise()
	case immEnd:
		f.end()
	case immLabel:
		f.out = appendU32(append(f.out, op), r.index("label", len(f.frames)))
	case immTable:
		f.branchTable()
	case immCall:
		f.call()
	case immCallIndirect:
		f.pay(costIndirect)
		f.out = appendU32(append(f.out, op), r.index("type", len(f.m.types)))
		f.out = appendU32(f.out, r.index("table", f.m.tableCount()))
	case immSelect:
		if n := r.u32(); n != 1 {
			r.malformed("select with %d types", n)
		}
		f.out = append(f.out, op, 1, byte(f.m.valueType(r)))
	case immLocal:
		f.out = appendU32(append(f.out, op), r.index("local", int(f.locals)))
	case immGlobal:
		f.out = appendU32(append(f.out, op), r.index("global", f.m.globalCount()))
	case immTableIndex:
		f.out = appendU32(append(f.out, op), r.index("table", f.m.tableCount()))
	case immMemarg:
		f.memarg(op)
	case immMemory:
		r.zero("memory index")
		f.out = append(f.out, op, 0)
	case immMemoryGrow:
		r.zero("memory index")
		f.bulk(costGrow, elementsPerUnit)
		f.constant = -1
		f.out = append(f.out, op, 0)
	case immMisc:
		f.misc()
	case immVector:
		f.vector()
	default:
		f.push(op)
	}
}

// push writes an instruction that pushes a constant.
func (f *function) push(op byte) {
	r := &f.r
	switch immediates[op] {
	case immI32:
		f.constant = r.signed(32)
		f.out = appendSigned(append(f.out, op), f.constant)
	case immI64:
		f.out = appendSigned(append(f.out, op), r.signed(64))
	case imm4:
		f.out = append(append(f.out, op), r.bytes(4)...)
	case imm8:
		f.out = append(append(f.out, op), r.bytes(8)...)
	case immRefType:
		f.out = append(f.out, op, byte(f.m.refType(r)))
	case immRefFunc:
		f.out = appendU32(append(f.out, op), f.m.shift(r.index("function", f.m.functionCount())))
	default:
		r.fail(ErrUnsupported, "instruction %#x (%s)", op, feature(op))
	}
}

func feature(op byte) string {
	switch {
	case op == 0x12 || op == 0x13:
		return "tail calls are not supported"
	case op >= 0x06 && op <= 0x0a, op == 0x18, op == 0x19, op == 0x1f:
		return "exceptions are not supported"
	case op == 0xfe:
		return "threads are not supported"
	case op == 0x14 || op == 0x15 || op >= 0xd3 && op <= 0xd6 || op == 0xfb:
		return "typed references and garbage collection are not supported"
	default:
		return "unknown"
	}
}

func (f *function) block(op byte) {
	if len(f.frames) >= f.m.limits.Nesting {
		f.r.fail(ErrLimit, "blocks nested %d deep, at most %d allowed", len(f.frames)+1, f.m.limits.Nesting)
		return
	}
	f.out = append(f.out, op)
	if b := f.r.peek(); b == blockEmpty {
		f.out = append(f.out, f.r.byte())
	} else if b&0xc0 == 0x40 {
		f.out = append(f.out, byte(f.m.valueType(&f.r)))
	} else if t := f.r.signed(33); t < 0 || t >= int64(len(f.m.types)) {
		f.r.malformed("block of type %d, there are %d types", t, len(f.m.types))
	} else {
		f.out = appendSigned(f.out, t)
	}
	f.frames = append(f.frames, frame{op: op, point: f.now})
	if op == opLoop {
		f.charge()
	}
}

func (f *function) otherwise() {
	top := &f.frames[len(f.frames)-1]
	if top.op != opIf {
		f.r.malformed("else without if")
		return
	}
	top.op = opElse
	f.out = append(f.out, opElse)
	f.now = top.point
}

func (f *function) end() {
	top := f.frames[len(f.frames)-1]
	f.frames = f.frames[:len(f.frames)-1]
	f.out = append(f.out, opEnd)
	f.now = top.point
}

func (f *function) branchTable() {
	r := &f.r
	n := r.count("targets of br_table", 1, f.m.limits.BranchTable)
	f.out = appendU32(append(f.out, 0x0e), uint32(n))
	for range n + 1 {
		f.out = appendU32(f.out, r.index("label", len(f.frames)))
		if r.err != nil {
			return
		}
	}
}

func (f *function) call() {
	callee := f.r.index("function", f.m.functionCount())
	if int(callee) < f.m.importedFuncs {
		f.pay(costImport)
	} else {
		f.pay(costCall)
	}
	f.out = appendU32(append(f.out, opCall), f.m.shift(callee))
}

// memarg writes an access to memory. Flags in the alignment mean several
// memories, which the compiler refuses as a wrong alignment.
func (f *function) memarg(op byte) {
	f.out = append(f.out, op)
	f.alignment()
}

func (f *function) alignment() {
	align := f.r.u32()
	if align >= 32 && f.r.err == nil {
		f.r.fail(ErrUnsupported, "alignment %d", align)
	}
	f.out = appendU32(appendU32(f.out, align), f.r.u32())
}
