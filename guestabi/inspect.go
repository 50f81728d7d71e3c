package guestabi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	headerSize = 8
	// wasmVersion is the version field of a core module; a component has version 13 and layer 1.
	wasmVersion    = 1
	componentLayer = 1
)

var wasmMagic = []byte("\x00asm")

// Inspect reads a wasm binary to its end and returns what the registry records
// of it: kind, imports and exports. Digest, size and name are left to the
// caller. A binary that cannot be a guest is refused with an INVALID_REQUEST
// *apierror.Error that says what was found and what to do; a failure of r comes
// back wrapped. Function bodies are passed over: whether they are valid is for
// the executor to say. Memory use does not depend on the size of the binary.
func Inspect(r io.Reader) (*pb.Module, error) {
	m, err := inspect(r)
	if errors.Is(err, errMalformed) {
		return nil, notAGuest("%s", err).Next("build the module again; wasm-validate tells more")
	}
	return m, err
}

func inspect(r io.Reader) (*pb.Module, error) {
	if err := readHeader(r); err != nil {
		return nil, err
	}
	in := newWasmReader(r)
	m := &pb.Module{}
	hasMemory, order := false, 0
	for {
		id, err := in.nextSection()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read module: %w", err)
		}
		if id != sectionCustom {
			place, known := sectionOrder[id]
			if !known || place <= order {
				return nil, fmt.Errorf("%w: section %d is unknown, repeated or out of order", errMalformed, id)
			}
			order = place
		}
		switch id {
		case sectionCustom:
			err = in.customSection()
		case sectionImport:
			m.Imports, err = in.imports()
		case sectionExport:
			m.Exports, hasMemory, err = in.exports()
		default:
			err = in.skip(in.left)
		}
		if err != nil {
			return nil, err
		}
	}
	kind, err := kindOf(m.Imports, m.Exports, hasMemory)
	if err != nil {
		return nil, err
	}
	m.Kind = kind
	return m, nil
}

// readHeader checks the first eight bytes.
func readHeader(r io.Reader) error {
	var header [headerSize]byte
	n, err := io.ReadFull(r, header[:])
	switch {
	case errors.Is(err, io.EOF):
		return Empty()
	case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("read module: %w", err)
	case n < headerSize || !bytes.Equal(header[:4], wasmMagic):
		return notAGuest("the file is not a wasm binary").
			With("first_bytes", fmt.Sprintf("%x", header[:n])).
			Next("give the binary (.wasm), not text (.wat) or source; compile text with wat2wasm")
	}
	version := binary.LittleEndian.Uint16(header[4:6])
	layer := binary.LittleEndian.Uint16(header[6:8])
	switch {
	case layer == componentLayer:
		return notAGuest("the file is a wasm component, and this cluster runs core modules").
			With("found", fmt.Sprintf("component binary, layer %d, version %d", layer, version)).
			Next(wasmCore)
	case version != wasmVersion || layer != 0:
		return notAGuest("the file has wasm version %d, layer %d, which is not known", version, layer).
			With("offered_version", "1").Next(wasmCore)
	}
	return nil
}

// customSection checks a custom section's name and passes over the rest.
func (r *wasmReader) customSection() error {
	size, err := r.u32()
	if err != nil {
		return err
	}
	if err := r.skip(uint64(size)); err != nil {
		return err
	}
	return r.skip(r.left)
}

// imports reads the import section. Only functions can be imported, so the
// descriptions of other kinds need not be understood.
func (r *wasmReader) imports() ([]string, error) {
	count, err := r.u32()
	if err != nil {
		return nil, err
	}
	if count > maxImports {
		return nil, notAGuest("module has %d imports, at most %d are allowed", count, maxImports).
			Next("import each function once")
	}
	var imports []string
	for range count {
		module, name, err := r.importedFunction()
		if err != nil {
			return nil, err
		}
		if err := checkImport(module, name); err != nil {
			return nil, err
		}
		imports = append(imports, module+" "+name)
	}
	slices.Sort(imports)
	// A toolchain may import one function under several types or twice.
	return slices.Compact(imports), r.end()
}

func (r *wasmReader) importedFunction() (module, name string, err error) {
	if module, err = r.name(); err != nil {
		return "", "", err
	}
	if name, err = r.name(); err != nil {
		return "", "", err
	}
	kind, err := r.kind()
	if err != nil {
		return "", "", err
	}
	if kind != kindFunction {
		return "", "", notAGuest("module imports the %s %s %s, and hosts offer functions only", kindNames[kind], module, name).
			With("import", module+" "+name).
			Next("define and export it in the module; for a memory, link without --import-memory")
	}
	_, err = r.u32()
	return module, name, err
}

// exports reads the export section. It returns the functions, sorted, and
// whether a memory is exported under the name that hosts look for.
func (r *wasmReader) exports() (functions []string, hasMemory bool, err error) {
	count, err := r.u32()
	if err != nil {
		return nil, false, err
	}
	if count > maxExports {
		return nil, false, notAGuest("module has %d exports, at most %d are allowed", count, maxExports).
			Next("link without --export-all")
	}
	seen := map[string]struct{}{}
	for range count {
		name, err := r.name()
		if err != nil {
			return nil, false, err
		}
		kind, err := r.kind()
		if err != nil {
			return nil, false, err
		}
		if _, err := r.u32(); err != nil {
			return nil, false, err
		}
		if _, twice := seen[name]; twice {
			return nil, false, fmt.Errorf("%w: %q is exported twice", errMalformed, name)
		}
		seen[name] = struct{}{}
		switch kind {
		case kindFunction:
			functions = append(functions, name)
		case kindMemory:
			hasMemory = hasMemory || name == Memory
		}
	}
	slices.Sort(functions)
	return functions, hasMemory, r.end()
}
