package module

import (
	"bytes"
	"fmt"
)

// ValueType is a type of WebAssembly values by its number in the binary format.
type ValueType byte

// The value types.
const (
	I32       ValueType = 0x7f
	I64       ValueType = 0x7e
	F32       ValueType = 0x7d
	F64       ValueType = 0x7c
	V128      ValueType = 0x7b
	FuncRef   ValueType = 0x70
	ExternRef ValueType = 0x6f
)

// Kind is what an import or export stands for.
type Kind byte

// The kinds of imports and exports.
const (
	Function Kind = 0
	Table    Kind = 1
	Memory   Kind = 2
	Global   Kind = 3
)

// String returns the kind's name in the text format.
func (k Kind) String() string {
	switch k {
	case Function:
		return "func"
	case Table:
		return "table"
	case Memory:
		return "memory"
	case Global:
		return "global"
	default:
		return fmt.Sprintf("kind %d", byte(k))
	}
}

// FuncType is the type of a function.
type FuncType struct {
	Params, Results []ValueType
}

// Equal reports whether both types have the same parameters and results.
func (t FuncType) Equal(o FuncType) bool {
	return bytes.Equal(raw(t.Params), raw(o.Params)) && bytes.Equal(raw(t.Results), raw(o.Results))
}

// String returns the type like "(i32 i32) -> i64".
func (t FuncType) String() string {
	var b bytes.Buffer
	list := func(types []ValueType) {
		b.WriteByte('(')
		for i, v := range types {
			if i > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(v.String())
		}
		b.WriteByte(')')
	}
	list(t.Params)
	b.WriteString(" -> ")
	if len(t.Results) == 1 {
		b.WriteString(t.Results[0].String())
	} else {
		list(t.Results)
	}
	return b.String()
}

// String returns the type's name in the text format.
func (v ValueType) String() string {
	switch v {
	case I32:
		return "i32"
	case I64:
		return "i64"
	case F32:
		return "f32"
	case F64:
		return "f64"
	case V128:
		return "v128"
	case FuncRef:
		return "funcref"
	case ExternRef:
		return "externref"
	default:
		return fmt.Sprintf("type %#x", byte(v))
	}
}

func raw(types []ValueType) []byte {
	b := make([]byte, len(types))
	for i, t := range types {
		b[i] = byte(t)
	}
	return b
}

// Import is one entry of the import section.
type Import struct {
	// Module and Name are the two parts of the imported name.
	Module, Name string
	// Kind is what is imported.
	Kind Kind
	// Type is the function's type when Kind is Function.
	Type FuncType

	table  table
	memory limits
	global globalType
	index  uint32
}

// Export is one entry of the export section.
type Export struct {
	// Name is the exported name.
	Name string
	// Kind is what is exported.
	Kind Kind
	// Type is the function's type when Kind is Function.
	Type FuncType

	index uint32
}

type limits struct {
	min, max uint32
	bounded  bool
}

type table struct {
	element ValueType
	size    limits
}

type globalType struct {
	value   ValueType
	mutable byte
}

type global struct {
	globalType
	init []byte
}

type segment struct {
	flags  uint32
	index  uint32 // table or memory
	offset []byte
	// kind is the element kind or type where the flags ask for one.
	kind byte
	// count is the number of elements; data holds them, or the bytes of a data segment.
	count int
	data  []byte
}

type body struct {
	r    reader
	size int
}

// Module is a decoded module: everything but the instructions, which Meter reads.
type Module struct {
	limits    Limits
	types     []FuncType
	imports   []Import
	functions []uint32
	tables    []table
	memories  []limits
	globals   []global
	exports   []Export
	start     *uint32
	elements  []segment
	dataCount *uint32
	bodies    []body
	data      []segment
	names     []byte

	importedFuncs, importedGlobals, importedTables, importedMemories int

	elementCount int
}

// Imports returns the import section; it must not be changed.
func (m *Module) Imports() []Import { return m.imports }

// Exports returns the export section; it must not be changed.
func (m *Module) Exports() []Export { return m.exports }

// Export returns the export with this name and kind.
func (m *Module) Export(name string, kind Kind) (Export, bool) {
	for _, e := range m.exports {
		if e.Name == name && e.Kind == kind {
			return e, true
		}
	}
	return Export{}, false
}

// MemoryBytes returns the size that the module's own memory starts with; 0 when
// it has none.
func (m *Module) MemoryBytes() uint64 {
	if len(m.memories) == 0 {
		return 0
	}
	return uint64(m.memories[0].min) << 16
}

// HasStart reports whether instantiating the module runs code of it.
func (m *Module) HasStart() bool { return m.start != nil }

var header = []byte{0, 'a', 's', 'm', 1, 0, 0, 0}

// Decode reads a module and checks it against limits (see ErrMalformed,
// ErrLimit and ErrUnsupported). It takes time linear in the length of binary
// and memory in the order of it. The result refers to binary.
func Decode(binary []byte, l Limits) (*Module, error) {
	l = l.withDefaults()
	if err := checkHeader(binary, l); err != nil {
		return nil, err
	}
	m := &Module{limits: l}
	r := &reader{buf: binary, pos: len(header)}
	last := 0
	for r.left() > 0 && r.err == nil {
		id := r.byte()
		s := r.section(r.u32())
		if s.err != nil {
			return nil, s.err
		}
		if id == 0 {
			m.custom(&s)
			if s.err != nil {
				return nil, s.err
			}
			continue
		}
		rank := sectionRank(id)
		if rank == 0 || rank <= last {
			r.malformed("section %d out of place", id)
			break
		}
		last = rank
		m.section(id, &s)
		if s.err == nil && s.left() > 0 {
			s.malformed("%d bytes left at the end of section %d", s.left(), id)
		}
		if s.err != nil {
			return nil, s.err
		}
	}
	if r.err == nil && len(m.functions) != len(m.bodies) {
		r.malformed("%d functions but %d bodies", len(m.functions), len(m.bodies))
	}
	return m, r.err
}

func checkHeader(binary []byte, l Limits) error {
	switch {
	case len(binary) == 0:
		return fmt.Errorf("%w: the file is empty", ErrMalformed)
	case len(binary) > l.Bytes:
		return fmt.Errorf("%w: %d bytes, at most %d allowed", ErrLimit, len(binary), l.Bytes)
	case len(binary) < len(header) || !bytes.Equal(binary[:4], header[:4]):
		return fmt.Errorf("%w: this is no WebAssembly file", ErrMalformed)
	case bytes.Equal(binary[4:8], header[4:8]):
		return nil
	case binary[6] == 1 && binary[7] == 0:
		return fmt.Errorf("%w: this is a component; build a core module for target wasm32-wasip1 (WASI preview 1) instead", ErrUnsupported)
	default:
		return fmt.Errorf("%w: binary version %d, want 1", ErrUnsupported, uint32(binary[4])|uint32(binary[5])<<8|uint32(binary[6])<<16|uint32(binary[7])<<24)
	}
}

// sectionRank orders the known sections; 0 is an unknown one.
func sectionRank(id byte) int {
	switch {
	case id >= 1 && id <= 9:
		return int(id)
	case id == 12: // data count stands before the code
		return 10
	case id == 10, id == 11:
		return int(id) + 1
	default:
		return 0
	}
}

func (m *Module) section(id byte, r *reader) {
	switch id {
	case 1:
		m.typeSection(r)
	case 2:
		m.importSection(r)
	case 3:
		for range r.count("functions", 1, m.limits.Functions) {
			m.functions = append(m.functions, r.index("type", len(m.types)))
		}
	case 4:
		for range r.count("tables", 3, m.limits.Tables) {
			m.tables = append(m.tables, m.table(r))
		}
	case 5:
		for range r.count("memories", 2, 1) {
			m.memories = append(m.memories, m.memory(r))
		}
	case 6:
		for range r.count("globals", 3, m.limits.Globals) {
			g := global{globalType: m.globalType(r)}
			g.init = m.constant(r)
			m.globals = append(m.globals, g)
		}
	case 7:
		m.exportSection(r)
	case 8:
		f := r.index("function", m.functionCount())
		m.start = &f
	case 9:
		for range r.count("element segments", 2, m.limits.ElementSegments) {
			m.elements = append(m.elements, m.element(r))
			if r.err != nil {
				return
			}
		}
	case 12:
		n := r.u32()
		m.dataCount = &n
	case 10:
		for range r.count("function bodies", 3, m.limits.Functions) {
			size := r.u32()
			if r.err == nil && uint64(size) > uint64(m.limits.FunctionBytes) {
				r.fail(ErrLimit, "function %d has %d bytes, at most %d allowed", m.importedFuncs+len(m.bodies), size, m.limits.FunctionBytes)
			}
			m.bodies = append(m.bodies, body{r: r.section(size), size: int(size)})
			if r.err != nil {
				return
			}
		}
	case 11:
		for range r.count("data segments", 2, m.limits.DataSegments) {
			m.data = append(m.data, m.dataSegment(r))
			if r.err != nil {
				return
			}
		}
	}
}

func (m *Module) functionCount() int { return m.importedFuncs + len(m.functions) }
func (m *Module) globalCount() int   { return m.importedGlobals + len(m.globals) }
func (m *Module) tableCount() int    { return m.importedTables + len(m.tables) }
func (m *Module) memoryCount() int   { return m.importedMemories + len(m.memories) }

// functionType returns the type of any function, imported ones first.
func (m *Module) functionType(f uint32) FuncType {
	if int(f) >= m.importedFuncs {
		return m.types[m.functions[int(f)-m.importedFuncs]]
	}
	for _, i := range m.imports {
		if i.Kind == Function {
			if f == 0 {
				return i.Type
			}
			f--
		}
	}
	return FuncType{}
}
