package agent

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// errNotModule is wrapped by the errors of inspect.
var errNotModule = errors.New("not a WebAssembly module")

// Bounds of what inspect reads into memory.
const (
	maxImportsExports = 100_000
	maxNameBytes      = 64 << 10
	maxInspectedNames = 16 << 20
)

// The sections and kinds of the binary format that inspect looks at.
const (
	sectionImport = 2
	sectionExport = 7

	externFunc   = 0
	externTable  = 1
	externMemory = 2
	externGlobal = 3
	externTag    = 4
)

// moduleInfo is what the import and export sections of a module tell.
type moduleInfo struct {
	// imports are the imported functions as "module name", exports the exported
	// functions; both sorted.
	imports, exports []string
}

// command reports whether the module runs to completion.
func (i moduleInfo) command() bool {
	_, ok := slices.BinarySearch(i.exports, "_start")
	return ok
}

func (i moduleInfo) kind() pb.ModuleKind {
	if i.command() {
		return pb.ModuleKind_MODULE_KIND_COMMAND
	}
	return pb.ModuleKind_MODULE_KIND_REACTOR
}

// inspect reads the imports and exports of a core module. It checks no more than
// it must to find them: whether the module is valid is for the executor to say.
func inspect(src io.Reader) (moduleInfo, error) {
	r := &moduleReader{Reader: bufio.NewReader(src)}
	var header [8]byte
	if _, err := io.ReadFull(r, header[:]); err != nil || string(header[:4]) != "\x00asm" {
		return moduleInfo{}, fmt.Errorf("%w: it does not begin with \\0asm", errNotModule)
	}
	switch version := binary.LittleEndian.Uint32(header[4:]); version {
	case 1:
	case 0x1000d:
		return moduleInfo{}, fmt.Errorf("%w: it is a component; build a core module (wasm32-wasip1)", errNotModule)
	default:
		return moduleInfo{}, fmt.Errorf("%w: binary version %#x, want 1", errNotModule, version)
	}
	var info moduleInfo
	for {
		id, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			break
		}
		size := r.u32()
		if err != nil || r.err != nil {
			return moduleInfo{}, fmt.Errorf("%w: it ends within a section header", errNotModule)
		}
		section := &moduleReader{Reader: bufio.NewReader(io.LimitReader(r, int64(size))), names: r.names}
		switch id {
		case sectionImport:
			info.imports = section.imports()
		case sectionExport:
			info.exports = section.exports()
		}
		if section.err != nil {
			return moduleInfo{}, fmt.Errorf("%w: section %d: %w", errNotModule, id, section.err)
		}
		r.names = section.names
		if err := section.drain(id, size); err != nil {
			return moduleInfo{}, err
		}
	}
	slices.Sort(info.imports)
	slices.Sort(info.exports)
	return info, nil
}

// moduleReader reads the primitives of the binary format; its first error sticks.
type moduleReader struct {
	*bufio.Reader
	read  int64
	names int // bytes of names so far
	err   error
}

// drain skips what is left of a section.
func (r *moduleReader) drain(id byte, size uint32) error {
	n, err := io.Copy(io.Discard, r.Reader)
	if err != nil {
		return fmt.Errorf("reading section %d: %w", id, err)
	}
	if r.read+n != int64(size) {
		return fmt.Errorf("%w: section %d is cut off", errNotModule, id)
	}
	return nil
}

func (r *moduleReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *moduleReader) byte() byte {
	if r.err != nil {
		return 0
	}
	b, err := r.ReadByte()
	if err != nil {
		r.fail(io.ErrUnexpectedEOF)
		return 0
	}
	r.read++
	return b
}

// leb reads an unsigned LEB128 number of at most bits bits.
func (r *moduleReader) leb(bits int) uint64 {
	var v uint64
	for shift := 0; shift < bits; shift += 7 {
		b := r.byte()
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v
		}
	}
	r.fail(errors.New("number too long"))
	return 0
}

func (r *moduleReader) u32() uint32 {
	v := r.leb(35)
	if v > 1<<32-1 {
		r.fail(errors.New("number out of range"))
		return 0
	}
	return uint32(v)
}

func (r *moduleReader) name() string {
	n := int(r.u32())
	if r.names += n; n > maxNameBytes || r.names > maxInspectedNames {
		r.fail(errors.New("names too long"))
	}
	if r.err != nil {
		return ""
	}
	buf := make([]byte, n)
	if _, err := io.ReadFull(r.Reader, buf); err != nil {
		r.fail(io.ErrUnexpectedEOF)
		return ""
	}
	r.read += int64(n)
	return string(buf)
}

func (r *moduleReader) count() int {
	n := r.u32()
	if n > maxImportsExports {
		r.fail(fmt.Errorf("%d entries", n))
		return 0
	}
	return int(n)
}

func (r *moduleReader) exports() []string {
	var out []string
	for n := r.count(); n > 0 && r.err == nil; n-- {
		name, kind := r.name(), r.byte()
		r.u32()
		if kind == externFunc {
			out = append(out, name)
		}
	}
	return out
}

func (r *moduleReader) imports() []string {
	var out []string
	for n := r.count(); n > 0 && r.err == nil; n-- {
		module, name := r.name(), r.name()
		switch kind := r.byte(); kind {
		case externFunc:
			r.u32()
			out = append(out, module+" "+name)
		case externTable:
			r.byte()
			r.limits()
		case externMemory:
			r.limits()
		case externGlobal:
			r.byte()
			r.byte()
		case externTag:
			r.byte()
			r.u32()
		default:
			r.fail(fmt.Errorf("import kind %d", kind))
		}
	}
	return out
}

func (r *moduleReader) limits() {
	flags := r.byte()
	r.leb(70)
	if flags&1 != 0 {
		r.leb(70)
	}
}
