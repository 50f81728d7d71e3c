package module

// Opcodes that the rewriter treats in a special way or emits.
const (
	opUnreachable  = 0x00
	opBlock        = 0x02
	opLoop         = 0x03
	opIf           = 0x04
	opElse         = 0x05
	opEnd          = 0x0b
	opBr           = 0x0c
	opReturn       = 0x0f
	opCall         = 0x10
	opCallIndirect = 0x11
	opDrop         = 0x1a
	opLocalGet     = 0x20
	opLocalTee     = 0x22
	opGlobalGet    = 0x23
	opGlobalSet    = 0x24
	opMemoryGrow   = 0x40
	opI32Const     = 0x41
	opI64Const     = 0x42
	opF32Const     = 0x43
	opF64Const     = 0x44
	opI64LtS       = 0x53
	opI64Sub       = 0x7d
	opI64ShrU      = 0x88
	opI64ExtendU   = 0xad
	opRefNull      = 0xd0
	opRefFunc      = 0xd2
	opMisc         = 0xfc
	opVector       = 0xfd

	blockEmpty = 0x40
	vecConst   = 12
)

// immediate says what follows an opcode.
type immediate byte

const (
	immUnsupported immediate = iota
	immNone
	immBlock
	immElse
	immEnd
	immLabel
	immTable // br_table
	immCall
	immCallIndirect
	immSelect
	immLocal
	immGlobal
	immTableIndex
	immMemarg
	immMemory
	immMemoryGrow
	immI32
	immI64
	imm4
	imm8
	immRefType
	immRefFunc
	immMisc
	immVector
)

// immediates maps every opcode of one byte to what follows it.
var immediates = makeImmediates()

func makeImmediates() (t [256]immediate) {
	set := func(from, to int, k immediate) {
		for i := from; i <= to; i++ {
			t[i] = k
		}
	}
	set(0x00, 0x01, immNone) // unreachable, nop
	set(0x02, 0x04, immBlock)
	t[opElse] = immElse
	t[opEnd] = immEnd
	set(0x0c, 0x0d, immLabel)
	t[0x0e] = immTable
	t[opReturn] = immNone
	t[opCall] = immCall
	t[opCallIndirect] = immCallIndirect
	set(0x1a, 0x1b, immNone) // drop, select
	t[0x1c] = immSelect
	set(0x20, 0x22, immLocal)
	set(0x23, 0x24, immGlobal)
	set(0x25, 0x26, immTableIndex)
	set(0x28, 0x3e, immMemarg)
	t[0x3f] = immMemory
	t[opMemoryGrow] = immMemoryGrow
	t[opI32Const] = immI32
	t[opI64Const] = immI64
	t[opF32Const] = imm4
	t[opF64Const] = imm8
	set(0x45, 0xc4, immNone) // comparisons, arithmetic, conversions, sign extension
	t[opRefNull] = immRefType
	t[0xd1] = immNone // ref.is_null
	t[opRefFunc] = immRefFunc
	t[opMisc] = immMisc
	t[opVector] = immVector
	return t
}

// Instructions behind the prefix 0xfc.
const (
	miscTruncLast  = 7
	miscMemoryInit = 8
	miscDataDrop   = 9
	miscMemoryCopy = 10
	miscMemoryFill = 11
	miscTableInit  = 12
	miscElemDrop   = 13
	miscTableCopy  = 14
	miscTableGrow  = 15
	miscTableSize  = 16
	miscTableFill  = 17
)

// Kinds of immediates behind the prefix 0xfd.
type vectorImmediate byte

const (
	vecNone vectorImmediate = iota
	vecMemarg
	vecBytes16
	vecLane
	vecMemargLane
	vecUnsupported
)

func vectorKind(sub uint32) vectorImmediate {
	switch {
	case sub <= 11, sub == 92, sub == 93:
		return vecMemarg
	case sub == vecConst, sub == 13: // v128.const, i8x16.shuffle
		return vecBytes16
	case sub >= 21 && sub <= 34:
		return vecLane
	case sub >= 84 && sub <= 91:
		return vecMemargLane
	case sub > 255: // relaxed SIMD
		return vecUnsupported
	default:
		return vecNone
	}
}
