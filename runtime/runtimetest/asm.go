package runtimetest

import (
	"bytes"
	"encoding/binary"
)

// Value types of WebAssembly by their numbers in the binary format.
const (
	I32     byte = 0x7f
	I64     byte = 0x7e
	F32     byte = 0x7d
	F64     byte = 0x7c
	V128    byte = 0x7b
	FuncRef byte = 0x70
)

// Module builds a WebAssembly binary. The zero Module is empty. Imports must be
// added before functions, because both share one index space.
type Module struct {
	types     [][]byte
	imports   [][]byte
	functions []uint32
	bodies    [][]byte
	tables    [][]byte
	memory    []byte
	globals   [][]byte
	exports   [][]byte
	start     []byte
	elements  [][]byte
	data      [][]byte
	names     [][]byte
	imported  uint32
}

// Type returns the index of a function type.
func (m *Module) Type(params, results []byte) uint32 {
	t := Cat([]byte{0x60}, Vec(params), Vec(results))
	for i, have := range m.types {
		if bytes.Equal(have, t) {
			return uint32(i)
		}
	}
	m.types = append(m.types, t)
	return uint32(len(m.types) - 1)
}

// Import adds an imported function and returns its index.
func (m *Module) Import(module, name string, params, results []byte) uint32 {
	t := m.Type(params, results)
	m.imports = append(m.imports, Cat(Name(module), Name(name), []byte{0}, U32(t)))
	m.imported++
	return m.imported - 1
}

// ImportRaw adds an import of any kind as it is encoded after its two names;
// functions must be added with Import.
func (m *Module) ImportRaw(module, name string, desc ...byte) {
	m.imports = append(m.imports, Cat(Name(module), Name(name), desc))
}

// Func adds a function and returns its index. code is without the final end; a
// name that is not empty exports the function and names it in traps.
func (m *Module) Func(name string, params, results, locals []byte, code ...[]byte) uint32 {
	groups := make([][]byte, len(locals))
	for i, t := range locals {
		groups[i] = []byte{1, t}
	}
	return m.FuncRaw(name, params, results, Cat(Vecs(groups), Cat(code...), []byte{0x0b}))
}

// FuncRaw adds a function whose body, locals included, is given as it is encoded.
func (m *Module) FuncRaw(name string, params, results, body []byte) uint32 {
	m.functions = append(m.functions, m.Type(params, results))
	m.bodies = append(m.bodies, body)
	index := m.imported + uint32(len(m.functions)) - 1
	if name != "" {
		m.Export(name, 0, index)
		m.names = append(m.names, Cat(U32(index), Name(name)))
	}
	return index
}

// Export adds an export of kind 0 (function), 1 (table), 2 (memory) or 3 (global).
func (m *Module) Export(name string, kind byte, index uint32) {
	m.exports = append(m.exports, Cat(Name(name), []byte{kind}, U32(index)))
}

// Memory declares the memory, in pages of 64 KiB and without a maximum, and
// exports it as "memory".
func (m *Module) Memory(pages uint32) {
	m.MemoryRaw(Cat([]byte{0}, U32(pages)))
	m.Export("memory", 2, 0)
}

// MemoryRaw declares the memory by its encoded limits.
func (m *Module) MemoryRaw(limits []byte) { m.memory = Vecs([][]byte{limits}) }

// Table adds a table by its encoded type and limits.
func (m *Module) Table(encoded ...byte) { m.tables = append(m.tables, encoded) }

// Global adds a mutable global with an initial value given as constant
// expression without end, and returns its index.
func (m *Module) Global(t byte, init []byte) uint32 {
	m.globals = append(m.globals, Cat([]byte{t, 1}, init, []byte{0x0b}))
	return uint32(len(m.globals) - 1)
}

// Start makes a function run when the module is instantiated.
func (m *Module) Start(f uint32) { m.start = U32(f) }

// Elements fills table 0 from offset on with functions.
func (m *Module) Elements(offset int32, funcs ...uint32) {
	e := Cat([]byte{0}, I32Const(offset), []byte{0x0b}, U32(uint32(len(funcs))))
	for _, f := range funcs {
		e = append(e, U32(f)...)
	}
	m.elements = append(m.elements, e)
}

// Data puts bytes into memory at offset.
func (m *Module) Data(offset int32, content []byte) {
	m.data = append(m.data, Cat([]byte{0}, I32Const(offset), []byte{0x0b}, Vec(content)))
}

// Bytes returns the binary.
func (m *Module) Bytes() []byte {
	out := []byte{0, 'a', 's', 'm', 1, 0, 0, 0}
	vec := func(id byte, entries [][]byte) {
		if len(entries) > 0 {
			out = append(out, Section(id, Vecs(entries))...)
		}
	}
	vec(1, m.types)
	vec(2, m.imports)
	if len(m.functions) > 0 {
		indices := make([][]byte, len(m.functions))
		for i, t := range m.functions {
			indices[i] = U32(t)
		}
		vec(3, indices)
	}
	vec(4, m.tables)
	if m.memory != nil {
		out = append(out, Section(5, m.memory)...)
	}
	vec(6, m.globals)
	vec(7, m.exports)
	if m.start != nil {
		out = append(out, Section(8, m.start)...)
	}
	vec(9, m.elements)
	bodies := make([][]byte, len(m.bodies))
	for i, b := range m.bodies {
		bodies[i] = Vec(b)
	}
	vec(10, bodies)
	vec(11, m.data)
	if len(m.names) > 0 {
		names := Vecs(m.names)
		out = append(out, Section(0, Cat(Name("name"), []byte{1}, Vec(names)))...)
	}
	return out
}

// U32 encodes an unsigned number.
func U32(v uint32) []byte { return binary.AppendUvarint(nil, uint64(v)) }

// S64 encodes a signed number.
func S64(v int64) []byte {
	var b []byte
	for {
		c := byte(v & 0x7f)
		v >>= 7
		if (v == 0 && c&0x40 == 0) || (v == -1 && c&0x40 != 0) {
			return append(b, c)
		}
		b = append(b, c|0x80)
	}
}

// Cat joins encoded parts.
func Cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// Vec encodes bytes with their number before them.
func Vec(content []byte) []byte { return append(U32(uint32(len(content))), content...) }

// Vecs encodes entries with their number before them.
func Vecs(entries [][]byte) []byte {
	return append(U32(uint32(len(entries))), bytes.Join(entries, nil)...)
}

// Name encodes a name.
func Name(s string) []byte { return Vec([]byte(s)) }

// Section encodes a section.
func Section(id byte, content []byte) []byte { return append([]byte{id}, Vec(content)...) }

// Instructions without immediates.
var (
	Unreachable = []byte{0x00}
	Else        = []byte{0x05}
	Return      = []byte{0x0f}
	Drop        = []byte{0x1a}
	I32Eqz      = []byte{0x45}
	I32Add      = []byte{0x6a}
	I32Sub      = []byte{0x6b}
	I32Mul      = []byte{0x6c}
	I32Shl      = []byte{0x74}
	I32ShrU     = []byte{0x76}
	I32GtU      = []byte{0x4b}
	I64Add      = []byte{0x7c}
	I64Shl      = []byte{0x86}
	I64ShrU     = []byte{0x88}
	I64Or       = []byte{0x84}
	I64ExtendU  = []byte{0xad}
	I32Wrap     = []byte{0xa7}
	MemorySize  = []byte{0x3f, 0}
	MemoryGrow  = []byte{0x40, 0}
	MemoryCopy  = []byte{0xfc, 10, 0, 0}
	MemoryFill  = []byte{0xfc, 11, 0}
	I32Store    = []byte{0x36, 2, 0}
	I32Load     = []byte{0x28, 2, 0}
)

// I32Const pushes a number.
func I32Const(v int32) []byte { return append([]byte{0x41}, S64(int64(v))...) }

// I64Const pushes a number.
func I64Const(v int64) []byte { return append([]byte{0x42}, S64(v)...) }

// LocalGet pushes a local.
func LocalGet(i uint32) []byte { return append([]byte{0x20}, U32(i)...) }

// LocalSet pops a local.
func LocalSet(i uint32) []byte { return append([]byte{0x21}, U32(i)...) }

// LocalTee stores a local and leaves it on the stack.
func LocalTee(i uint32) []byte { return append([]byte{0x22}, U32(i)...) }

// GlobalGet pushes a global.
func GlobalGet(i uint32) []byte { return append([]byte{0x23}, U32(i)...) }

// GlobalSet pops a global.
func GlobalSet(i uint32) []byte { return append([]byte{0x24}, U32(i)...) }

// Call calls a function.
func Call(f uint32) []byte { return append([]byte{0x10}, U32(f)...) }

// CallIndirect calls through table 0.
func CallIndirect(t uint32) []byte { return Cat([]byte{0x11}, U32(t), []byte{0}) }

// Br branches.
func Br(depth uint32) []byte { return append([]byte{0x0c}, U32(depth)...) }

// BrIf branches when the number on the stack is not zero.
func BrIf(depth uint32) []byte { return append([]byte{0x0d}, U32(depth)...) }

// Block is a block without a result.
func Block(code ...[]byte) []byte { return Cat([]byte{0x02, 0x40}, Cat(code...), []byte{0x0b}) }

// Loop is a loop without a result.
func Loop(code ...[]byte) []byte { return Cat([]byte{0x03, 0x40}, Cat(code...), []byte{0x0b}) }

// If runs code when the number on the stack is not zero; code may hold Else.
func If(code ...[]byte) []byte { return Cat([]byte{0x04, 0x40}, Cat(code...), []byte{0x0b}) }

// Repeat is code n times over.
func Repeat(n int, code ...[]byte) []byte { return bytes.Repeat(Cat(code...), n) }
