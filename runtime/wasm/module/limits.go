package module

// Limits bound what a module may hold. A module beyond one of them is refused
// with an error that names the limit, the number found and the number allowed.
// Zero means the default.
type Limits struct {
	// Bytes is the size of the whole binary.
	Bytes int
	// Types, Imports, Functions, Globals, Exports, DataSegments, ElementSegments
	// and Elements (of all segments) are numbers of entries.
	Types, Imports, Functions, Globals, Exports, DataSegments, ElementSegments, Elements int
	// FunctionBytes is the size of one function's body.
	FunctionBytes int
	// Locals is the number of a function's locals with its parameters; TotalLocals
	// that of all functions together.
	Locals, TotalLocals int
	// Nesting is the depth of blocks in a function.
	Nesting int
	// BranchTable is the number of targets of one br_table.
	BranchTable int
	// Tables is the number of tables, TableElements the size of each; a table may
	// declare a higher maximum, which is lowered to this.
	Tables, TableElements int
	// MemoryPages is the smallest memory a module may ask for, in units of 64 KiB.
	MemoryPages int
}

// defaultLimits hold every module that common toolchains make (browsers use the
// same orders of magnitude, see the WebAssembly JavaScript interface, section
// "implementation-defined limits") while the decoder of a hostile one stays
// within a few hundred megabytes.
var defaultLimits = Limits{
	Bytes:           64 << 20,
	Types:           20_000,
	Imports:         1_000,
	Functions:       100_000,
	Globals:         100_000,
	Exports:         10_000,
	DataSegments:    100_000,
	ElementSegments: 10_000,
	Elements:        1_000_000,
	FunctionBytes:   4 << 20,
	Locals:          20_000,
	TotalLocals:     4_000_000,
	Nesting:         10_000,
	BranchTable:     20_000,
	Tables:          16,
	TableElements:   128 << 10,
	MemoryPages:     65_536,
}

// DefaultLimits returns the limits that stand in for zeros.
func DefaultLimits() Limits { return defaultLimits }

func (l Limits) withDefaults() Limits {
	d := defaultLimits
	for _, f := range []struct {
		have     *int
		fallback int
	}{
		{&l.Bytes, d.Bytes},
		{&l.Types, d.Types},
		{&l.Imports, d.Imports},
		{&l.Functions, d.Functions},
		{&l.Globals, d.Globals},
		{&l.Exports, d.Exports},
		{&l.DataSegments, d.DataSegments},
		{&l.ElementSegments, d.ElementSegments},
		{&l.Elements, d.Elements},
		{&l.FunctionBytes, d.FunctionBytes},
		{&l.Locals, d.Locals},
		{&l.TotalLocals, d.TotalLocals},
		{&l.Nesting, d.Nesting},
		{&l.BranchTable, d.BranchTable},
		{&l.Tables, d.Tables},
		{&l.TableElements, d.TableElements},
		{&l.MemoryPages, d.MemoryPages},
	} {
		if *f.have == 0 {
			*f.have = f.fallback
		}
	}
	return l
}
