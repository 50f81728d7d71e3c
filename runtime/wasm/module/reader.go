package module

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// ErrMalformed is wrapped by every error about bytes that are no module this
// package can read.
var ErrMalformed = errors.New("malformed WebAssembly")

// ErrLimit is wrapped by every error about a module that is too large in some way.
var ErrLimit = errors.New("module exceeds a limit")

// ErrUnsupported is wrapped by every error about a feature of WebAssembly that
// guests may not use.
var ErrUnsupported = errors.New("unsupported WebAssembly feature")

// reader is a cursor over a part of the binary. The first failure sticks, every
// later read returns zero, and loops over counts end because a count is checked
// against the bytes that are left. So callers check err once per unit of work.
type reader struct {
	buf []byte
	pos int
	// base is the offset of buf in the binary, for messages.
	base int
	err  error
}

func (r *reader) fail(kind error, format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s at offset %d", kind, fmt.Sprintf(format, args...), r.base+r.pos)
		r.pos = len(r.buf)
	}
}

func (r *reader) malformed(format string, args ...any) { r.fail(ErrMalformed, format, args...) }

func (r *reader) left() int { return len(r.buf) - r.pos }

func (r *reader) byte() byte {
	if r.pos >= len(r.buf) {
		r.malformed("unexpected end")
		return 0
	}
	b := r.buf[r.pos]
	r.pos++
	return b
}

func (r *reader) peek() byte {
	if r.pos >= len(r.buf) {
		return 0
	}
	return r.buf[r.pos]
}

func (r *reader) bytes(n uint32) []byte {
	if uint64(n) > uint64(r.left()) {
		r.malformed("unexpected end")
		return nil
	}
	b := r.buf[r.pos : r.pos+int(n)]
	r.pos += int(n)
	return b
}

func (r *reader) u32() uint32 {
	if r.pos < len(r.buf) && r.buf[r.pos] < 0x80 {
		r.pos++
		return uint32(r.buf[r.pos-1])
	}
	var v uint64
	for shift := 0; shift < 35; shift += 7 {
		b := r.byte()
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			if v > 0xffffffff {
				break
			}
			return uint32(v)
		}
	}
	r.malformed("integer too large")
	return 0
}

// signed reads a signed LEB128 integer of the given width in bits.
func (r *reader) signed(bits int) int64 {
	var v int64
	for shift := 0; shift < bits; shift += 7 {
		b := r.byte()
		v |= int64(b&0x7f) << shift
		if b < 0x80 {
			if shift+7 < 64 && b&0x40 != 0 {
				v |= -1 << (shift + 7)
			}
			if low := int64(-1) << (bits - 1); bits < 64 && (v < low || v > ^low) {
				break
			}
			// In the tenth byte of a 64-bit integer only the sign is left.
			if shift == 63 && b != 0 && b != 0x7f {
				break
			}
			return v
		}
	}
	r.malformed("integer too large")
	return 0
}

// count reads the length of a vector whose entries take at least size bytes each.
func (r *reader) count(what string, size, limit int) int {
	n := r.u32()
	if r.err == nil && uint64(n)*uint64(size) > uint64(r.left()) {
		r.malformed("%d %s do not fit into the section", n, what)
	}
	if r.err == nil && int64(n) > int64(limit) {
		r.fail(ErrLimit, "%d %s, at most %d allowed", n, what, limit)
	}
	if r.err != nil {
		return 0
	}
	return int(n)
}

func (r *reader) name() string {
	b := r.bytes(r.u32())
	if !utf8.Valid(b) {
		r.malformed("name is not UTF-8")
		return ""
	}
	return string(b)
}

// index reads an index that must be below limit.
func (r *reader) index(what string, limit int) uint32 {
	n := r.u32()
	if r.err == nil && int64(n) >= int64(limit) {
		r.malformed("%s index %d out of range, there are %d", what, n, limit)
		return 0
	}
	return n
}

func (r *reader) zero(what string) {
	if b := r.byte(); b != 0 && r.err == nil {
		r.fail(ErrUnsupported, "%s %d", what, b)
	}
}

// section returns a reader over the next n bytes.
func (r *reader) section(n uint32) reader {
	base := r.base + r.pos
	return reader{buf: r.bytes(n), base: base, err: r.err}
}

func appendU32(b []byte, v uint32) []byte {
	return binary.AppendUvarint(b, uint64(v))
}

func appendSigned(b []byte, v int64) []byte {
	for {
		c := byte(v & 0x7f)
		v >>= 7
		if (v == 0 && c&0x40 == 0) || (v == -1 && c&0x40 != 0) {
			return append(b, c)
		}
		b = append(b, c|0x80)
	}
}

func appendName(b []byte, s string) []byte {
	return append(appendU32(b, uint32(len(s))), s...)
}
