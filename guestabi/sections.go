package guestabi

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Bounds of what Inspect reads into memory and of what the registry records.
const (
	maxImports = 1000
	maxExports = 10000
	// maxName is the longest name of an import or export in bytes.
	maxName = 1 << 10
	// maxNames bounds the names of all imports and exports of a module together in bytes.
	maxNames = 256 << 10
)

// errMalformed is wrapped by what the reader says of bytes that are no module.
var errMalformed = errors.New("malformed module")

// Section ids of the WebAssembly binary format.
const (
	sectionCustom = 0
	sectionImport = 2
	sectionExport = 7
)

// sectionOrder is the place of each section id in a module; custom sections may stand anywhere.
var sectionOrder = map[byte]int{
	1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 13: 6, 6: 7, 7: 8, 8: 9, 9: 10, 12: 11, 10: 12, 11: 13,
}

// External kinds of imports and exports.
const (
	kindFunction = 0
	kindMemory   = 2
	kindTag      = 4
)

var kindNames = [...]string{"function", "table", "memory", "global", "tag"}

// wasmReader reads the primitives of the binary format from a stream. Its
// memory does not depend on what the stream claims.
type wasmReader struct {
	in *bufio.Reader
	// left is what the present section still holds.
	left  uint64
	names int
}

func newWasmReader(r io.Reader) *wasmReader {
	return &wasmReader{in: bufio.NewReaderSize(r, 16<<10)}
}

// nextSection reads a section's header. It returns io.EOF at the end of the module.
func (r *wasmReader) nextSection() (id byte, err error) {
	id, err = r.in.ReadByte()
	if err != nil {
		return 0, err
	}
	// A header is at most an id and five bytes of size.
	r.left = 5
	size, err := r.u32()
	if err != nil {
		return 0, fmt.Errorf("size of section %d: %w", id, err)
	}
	r.left = uint64(size)
	return id, nil
}

// skip passes over n bytes of the present section.
func (r *wasmReader) skip(n uint64) error {
	if n > r.left {
		return fmt.Errorf("%w: section ends early", errMalformed)
	}
	r.left -= n
	for n > 0 {
		step := int(min(n, 1<<20))
		done, err := r.in.Discard(step)
		n -= uint64(done)
		if err != nil {
			return unexpected(err)
		}
	}
	return nil
}

func (r *wasmReader) byte() (byte, error) {
	if r.left == 0 {
		return 0, fmt.Errorf("%w: section ends early", errMalformed)
	}
	b, err := r.in.ReadByte()
	if err != nil {
		return 0, unexpected(err)
	}
	r.left--
	return b, nil
}

// u32 reads an unsigned LEB128 number of at most 32 bits.
func (r *wasmReader) u32() (uint32, error) {
	var n uint64
	for shift := uint(0); shift < 35; shift += 7 {
		b, err := r.byte()
		if err != nil {
			return 0, err
		}
		n |= uint64(b&0x7f) << shift
		if b < 0x80 {
			if n > 1<<32-1 {
				break
			}
			return uint32(n), nil
		}
	}
	return 0, fmt.Errorf("%w: number does not fit into 32 bits", errMalformed)
}

// name reads a string of the binary format.
func (r *wasmReader) name() (string, error) {
	size, err := r.u32()
	if err != nil {
		return "", err
	}
	r.names += int(min(size, maxName+1))
	if size > maxName || r.names > maxNames {
		return "", notAGuest("names of the module's imports and exports are longer than %d bytes, or %d bytes together",
			maxName, maxNames).Next("link without --export-all, or shorten the exported names")
	}
	if uint64(size) > r.left {
		return "", fmt.Errorf("%w: section ends early", errMalformed)
	}
	buf := make([]byte, size)
	if _, err := io.ReadFull(r.in, buf); err != nil {
		return "", unexpected(err)
	}
	r.left -= uint64(size)
	if !utf8.Valid(buf) {
		return "", fmt.Errorf("%w: a name is not UTF-8", errMalformed)
	}
	return string(buf), nil
}

// kind reads the kind of an import or export.
func (r *wasmReader) kind() (byte, error) {
	k, err := r.byte()
	if err == nil && k > kindTag {
		err = fmt.Errorf("%w: unknown kind %d of import or export", errMalformed, k)
	}
	return k, err
}

// end checks that the section was read to its end.
func (r *wasmReader) end() error {
	if r.left != 0 {
		return fmt.Errorf("%w: section holds %d bytes too many", errMalformed, r.left)
	}
	return nil
}

// unexpected turns the end of the stream inside a section into a malformed
// module and leaves failures of the stream as they are.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends in the middle of a section", errMalformed)
	}
	return err
}
