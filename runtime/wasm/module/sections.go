package module

// maxArity bounds parameters and results of one function; browsers allow 1000 of each.
const maxArity = 1000

// maxTotalArity bounds the parameters and results of all types together.
const maxTotalArity = 1 << 20

func (m *Module) valueType(r *reader) ValueType {
	switch t := ValueType(r.byte()); t {
	case I32, I64, F32, F64, V128, FuncRef, ExternRef:
		return t
	default:
		r.fail(ErrUnsupported, "value type %#x", byte(t))
		return I32
	}
}

func (m *Module) refType(r *reader) ValueType {
	switch t := ValueType(r.byte()); t {
	case FuncRef, ExternRef:
		return t
	default:
		r.fail(ErrUnsupported, "reference type %#x", byte(t))
		return FuncRef
	}
}

func (m *Module) typeSection(r *reader) {
	total := 0
	for range r.count("types", 3, m.limits.Types) {
		if form := r.byte(); form != 0x60 {
			r.fail(ErrUnsupported, "type of form %#x", form)
			return
		}
		var t FuncType
		for range r.count("parameters", 1, maxArity) {
			t.Params = append(t.Params, m.valueType(r))
		}
		for range r.count("results", 1, maxArity) {
			t.Results = append(t.Results, m.valueType(r))
		}
		if total += len(t.Params) + len(t.Results); total > maxTotalArity {
			r.fail(ErrLimit, "more than %d parameters and results in all types", maxTotalArity)
			return
		}
		m.types = append(m.types, t)
	}
}

func (m *Module) importSection(r *reader) {
	for range r.count("imports", 4, m.limits.Imports) {
		i := Import{Module: r.name(), Name: r.name(), Kind: Kind(r.byte())}
		switch i.Kind {
		case Function:
			i.index = r.index("type", len(m.types))
			if r.err == nil {
				i.Type = m.types[i.index]
			}
			m.importedFuncs++
		case Table:
			i.table = m.table(r)
			m.importedTables++
		case Memory:
			i.memory = m.memory(r)
			m.importedMemories++
		case Global:
			i.global = m.globalType(r)
			m.importedGlobals++
		default:
			r.fail(ErrUnsupported, "import of kind %d", byte(i.Kind))
		}
		if r.err != nil {
			return
		}
		m.imports = append(m.imports, i)
	}
}

func (m *Module) size(r *reader) limits {
	var l limits
	switch flags := r.byte(); flags {
	case 0:
		l.min = r.u32()
	case 1:
		l.min, l.max, l.bounded = r.u32(), r.u32(), true
		if l.max < l.min {
			r.malformed("maximum %d below minimum %d", l.max, l.min)
		}
	default:
		r.fail(ErrUnsupported, "shared or 64-bit limits (flags %d)", flags)
	}
	return l
}

func (m *Module) table(r *reader) table {
	t := table{element: m.refType(r), size: m.size(r)}
	if limit := uint32(m.limits.TableElements); r.err == nil && t.size.min > limit {
		r.fail(ErrLimit, "table of %d elements, at most %d allowed", t.size.min, limit)
	}
	return t
}

func (m *Module) memory(r *reader) limits {
	l := m.size(r)
	switch limit := uint32(m.limits.MemoryPages); {
	case r.err != nil:
	case l.min > limit:
		r.fail(ErrLimit, "memory of %d pages of 64 KiB, at most %d allowed", l.min, limit)
	case l.max > 1<<16:
		r.malformed("memory of up to %d pages of 64 KiB", l.max)
	}
	return l
}

func (m *Module) globalType(r *reader) globalType {
	g := globalType{value: m.valueType(r), mutable: r.byte()}
	if g.mutable > 1 {
		r.malformed("mutability %d", g.mutable)
	}
	return g
}

func (m *Module) exportSection(r *reader) {
	seen := map[string]bool{}
	for range r.count("exports", 3, m.limits.Exports) {
		e := Export{Name: r.name(), Kind: Kind(r.byte())}
		switch e.Kind {
		case Function:
			e.index = r.index("function", m.functionCount())
		case Table:
			e.index = r.index("table", m.tableCount())
		case Memory:
			e.index = r.index("memory", m.memoryCount())
		case Global:
			e.index = r.index("global", m.globalCount())
		default:
			r.fail(ErrUnsupported, "export of kind %d", byte(e.Kind))
		}
		if r.err == nil && seen[e.Name] {
			r.malformed("two exports named %q", e.Name)
		}
		if r.err != nil {
			return
		}
		if e.Kind == Function {
			e.Type = m.functionType(e.index)
		}
		seen[e.Name] = true
		m.exports = append(m.exports, e)
	}
}

// constant reads a constant expression and returns it encoded for the rewritten
// module.
func (m *Module) constant(r *reader) []byte {
	var out []byte
	for r.err == nil {
		op := r.byte()
		out = append(out, op)
		switch op {
		case opEnd:
			return out
		case opI32Const:
			out = appendSigned(out, r.signed(32))
		case opI64Const:
			out = appendSigned(out, r.signed(64))
		case opF32Const:
			out = append(out, r.bytes(4)...)
		case opF64Const:
			out = append(out, r.bytes(8)...)
		case opGlobalGet:
			out = appendU32(out, r.index("global", m.globalCount()))
		case opRefNull:
			out = append(out, byte(m.refType(r)))
		case opRefFunc:
			out = appendU32(out, m.shift(r.index("function", m.functionCount())))
		case opVector:
			if sub := r.u32(); sub != vecConst {
				r.fail(ErrUnsupported, "vector instruction %d in a constant", sub)
			}
			out = append(append(out, vecConst), r.bytes(16)...)
		default:
			r.fail(ErrUnsupported, "instruction %#x in a constant", op)
		}
	}
	return nil
}

// element reads an element segment; the eight encodings are told apart by flags.
func (m *Module) element(r *reader) segment {
	s := segment{flags: r.u32()}
	if s.flags > 7 {
		r.malformed("element segment with flags %d", s.flags)
		return s
	}
	const passive, explicit, expressions = 1, 2, 4
	if s.flags&passive == 0 {
		if s.flags&explicit != 0 {
			s.index = r.index("table", m.tableCount())
		} else if m.tableCount() == 0 && r.err == nil {
			r.malformed("element segment without a table")
		}
		s.offset = m.constant(r)
	}
	if s.flags&(passive|explicit) != 0 {
		if s.flags&expressions != 0 {
			s.kind = byte(m.refType(r))
		} else {
			r.zero("element kind")
		}
	}
	s.count = r.count("elements", 1, m.limits.Elements-m.elementCount)
	m.elementCount += s.count
	for range s.count {
		if s.flags&expressions != 0 {
			s.data = append(s.data, m.constant(r)...)
		} else {
			s.data = appendU32(s.data, m.shift(r.index("function", m.functionCount())))
		}
		if r.err != nil {
			break
		}
	}
	return s
}

func (m *Module) dataSegment(r *reader) segment {
	s := segment{flags: r.u32()}
	switch s.flags {
	case 0, 2:
		if s.flags == 2 {
			s.index = r.index("memory", m.memoryCount())
		} else if m.memoryCount() == 0 && r.err == nil {
			r.malformed("data segment without a memory")
		}
		s.offset = m.constant(r)
	case 1:
	default:
		r.malformed("data segment with flags %d", s.flags)
	}
	s.data = r.bytes(r.u32())
	return s
}

// custom keeps the function names of the first name section; everything else in
// custom sections is of no use to a running guest. Damaged names are dropped,
// as the format asks for.
func (m *Module) custom(r *reader) {
	if r.name() != "name" || r.err != nil || m.names != nil {
		return
	}
	for r.left() > 0 {
		id := r.byte()
		s := r.section(r.u32())
		if s.err != nil {
			r.err = nil
			return
		}
		if id == 1 {
			m.names = s.buf
			return
		}
	}
}
