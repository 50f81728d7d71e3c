package channel

import (
	"encoding/binary"
	"fmt"
)

// encoder builds a payload: integers as 8 bytes, strings with their length before them.
type encoder struct{ b []byte }

func (e *encoder) number(v uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, v) }

func (e *encoder) bytes(v []byte) {
	e.b = binary.LittleEndian.AppendUint32(e.b, uint32(len(v)))
	e.b = append(e.b, v...)
}

func (e *encoder) text(v string) {
	e.b = binary.LittleEndian.AppendUint32(e.b, uint32(len(v)))
	e.b = append(e.b, v...)
}

// decoder takes a payload apart. After the first failure everything is zero.
type decoder struct {
	b      []byte
	failed bool
}

func (d *decoder) number() uint64 {
	if len(d.b) < 8 {
		d.fail()
		return 0
	}
	v := binary.LittleEndian.Uint64(d.b)
	d.b = d.b[8:]
	return v
}

// bytes returns a part of the payload, not a copy.
func (d *decoder) bytes() []byte {
	if len(d.b) < 4 {
		d.fail()
		return nil
	}
	n := uint64(binary.LittleEndian.Uint32(d.b))
	if n > uint64(len(d.b)-4) {
		d.fail()
		return nil
	}
	v := d.b[4 : 4+n]
	d.b = d.b[4+n:]
	return v
}

func (d *decoder) text() string { return string(d.bytes()) }

// count returns how many elements follow, of which each takes at least least bytes.
func (d *decoder) count(least int) int {
	n := d.number()
	if n > uint64(len(d.b)/least) {
		d.fail()
		return 0
	}
	return int(n)
}

// rest returns what has not been taken.
func (d *decoder) rest() []byte {
	v := d.b
	d.b = nil
	return v
}

func (d *decoder) fail() { d.b, d.failed = nil, true }

// end reports a payload that was too short or too long for what it should be.
func (d *decoder) end(what string) error {
	if d.failed || len(d.b) > 0 {
		return fmt.Errorf("%w: %s", ErrMalformed, what)
	}
	return nil
}
