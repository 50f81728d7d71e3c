package module

// charge writes a charge whose cost is filled in at the end of the function, and
// makes it the present one:
//
//	global.set $counter (i64.sub (global.get $counter) (i64.const cost))
//	check
func (f *function) charge() {
	f.out = appendU32(append(f.out, opGlobalGet), f.counter)
	f.out = append(f.out, opI64Const)
	f.now = len(f.points)
	f.points = append(f.points, point{at: len(f.out)})
	f.out = append(f.out, 0, 0, 0, opI64Sub)
	f.check()
}

// check stores the number on the stack as the budget and calls the checkpoint
// when it is below zero:
//
//	global.set $counter
//	if (i64.lt_s (global.get $counter) (i64.const 0)) then
//	  global.set $counter (call $checkpoint)
//	end
func (f *function) check() {
	f.out = appendU32(append(f.out, opGlobalSet), f.counter)
	f.out = appendU32(append(f.out, opGlobalGet), f.counter)
	f.out = append(f.out, opI64Const, 0, opI64LtS, opIf, blockEmpty)
	f.out = appendU32(append(f.out, opCall), f.checkpoint)
	f.out = appendU32(append(f.out, opGlobalSet), f.counter)
	f.out = append(f.out, opEnd)
}

// putCost writes a cost in the three bytes that charge left for it.
func putCost(b []byte, cost uint32) {
	b[0] = byte(cost&0x7f) | 0x80
	b[1] = byte(cost>>7&0x7f) | 0x80
	b[2] = byte(cost >> 14 & 0x3f)
}

// pay adds to the cost of the present stretch of code, and begins a new one when
// it has become long. A charge covers only what it dominates: the code up to the
// end of the block it stands in.
func (f *function) pay(cost uint32) {
	p := &f.points[f.now]
	p.cost += cost
	if p.cost >= maxRegion {
		f.charge()
	}
}

// maxConstant is the longest bulk instruction whose length is a constant that is
// charged beforehand like any other instruction, in the units of its cost.
const maxConstant = 1 << 16

// bulk writes the charge of an instruction whose work grows with the i32 on top
// of the stack, before the instruction: base and one for every 2^shift of it.
// Most lengths in compiled code are small constants, which need no code.
func (f *function) bulk(base uint32, shift byte) {
	f.pay(base)
	if f.constant >= 0 && f.constant>>shift < maxConstant {
		f.pay(uint32(f.constant >> shift))
		return
	}
	f.used = true
	f.out = appendU32(append(f.out, opLocalTee), f.locals)
	f.out = appendU32(append(f.out, opGlobalGet), f.counter)
	f.out = appendU32(append(f.out, opLocalGet), f.locals)
	f.out = append(f.out, opI64ExtendU)
	if shift > 0 {
		f.out = append(f.out, opI64Const, shift, opI64ShrU)
	}
	f.out = append(f.out, opI64Sub)
	f.check()
}

// misc reads an instruction behind the prefix 0xfc. Those that work on a range
// all take its length from the top of the stack.
func (f *function) misc() {
	r := &f.r
	sub := r.u32()
	switch sub {
	case miscMemoryInit, miscMemoryCopy, miscMemoryFill:
		f.bulk(costBulk, bytesPerUnit)
	case miscTableInit, miscTableCopy, miscTableFill:
		f.bulk(costBulk, elementsPerUnit)
	case miscTableGrow:
		f.bulk(costGrow, elementsPerUnit)
	}
	f.constant = -1
	f.out = appendU32(append(f.out, opMisc), sub)
	switch {
	case sub <= miscTruncLast:
	case sub == miscMemoryInit:
		f.out = append(appendU32(f.out, r.u32()), 0)
		r.zero("memory index")
	case sub == miscDataDrop, sub == miscElemDrop:
		f.out = appendU32(f.out, r.u32())
	case sub == miscMemoryCopy:
		r.zero("memory index")
		r.zero("memory index")
		f.out = append(f.out, 0, 0)
	case sub == miscMemoryFill:
		r.zero("memory index")
		f.out = append(f.out, 0)
	case sub == miscTableInit:
		f.out = appendU32(f.out, r.index("element segment", len(f.m.elements)))
		f.out = appendU32(f.out, r.index("table", f.m.tableCount()))
	case sub == miscTableCopy:
		f.out = appendU32(f.out, r.index("table", f.m.tableCount()))
		f.out = appendU32(f.out, r.index("table", f.m.tableCount()))
	case sub <= miscTableFill:
		f.out = appendU32(f.out, r.index("table", f.m.tableCount()))
	default:
		r.fail(ErrUnsupported, "instruction 0xfc %d", sub)
	}
}

// vector reads an instruction behind the prefix 0xfd.
func (f *function) vector() {
	r := &f.r
	sub := r.u32()
	f.out = appendU32(append(f.out, opVector), sub)
	switch vectorKind(sub) {
	case vecNone:
	case vecMemarg:
		f.alignment()
	case vecBytes16:
		f.out = append(f.out, r.bytes(16)...)
	case vecLane:
		f.out = append(f.out, r.byte())
	case vecMemargLane:
		f.alignment()
		f.out = append(f.out, r.byte())
	default:
		r.fail(ErrUnsupported, "vector instruction %d (relaxed SIMD is not supported)", sub)
	}
}
