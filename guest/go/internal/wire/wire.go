// Package wire reads and writes protobuf messages field by field. It imports
// nothing of this module.
package wire

import (
	"errors"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// ErrMalformed is returned for bytes that are no protobuf message.
var ErrMalformed = errors.New("malformed message from the host")

// Value is one field as it stands on the wire: a number or bytes.
type Value struct {
	// Number is that of a varint field.
	Number uint64
	// Bytes are those of a length-delimited field; they alias the message.
	Bytes []byte
}

// Fields calls f for each field of the message b in order. Fixed-width fields
// and groups come with an empty Value: no message of the host has any.
func Fields(b []byte, f func(protowire.Number, Value)) error {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return ErrMalformed
		}
		b = b[size:]
		var v Value
		switch t {
		case protowire.VarintType:
			v.Number, size = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			v.Bytes, size = protowire.ConsumeBytes(b)
		default:
			size = protowire.ConsumeFieldValue(n, t, b)
		}
		if size < 0 {
			return ErrMalformed
		}
		b = b[size:]
		f(n, v)
	}
	return nil
}

// Pair reads a message of two strings with the field numbers 1 and 2: an entry
// of a map, or a header field.
func Pair(b []byte) (first, second string, err error) {
	err = Fields(b, func(n protowire.Number, v Value) {
		switch n {
		case 1:
			first = string(v.Bytes)
		case 2:
			second = string(v.Bytes)
		}
	})
	return first, second, err
}

// AppendBytes appends field n unless v is empty.
func AppendBytes(b []byte, n protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
}

// AppendString appends field n unless v is empty.
func AppendString(b []byte, n protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
}

// AppendUint appends field n unless v is 0.
func AppendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

// AppendBool appends field n unless v is false.
func AppendBool(b []byte, n protowire.Number, v bool) []byte {
	if !v {
		return b
	}
	return AppendUint(b, n, 1)
}

// AppendPair appends field n, a message of two strings, also when both are
// empty: an element of a list counts whatever is in it.
func AppendPair(b []byte, n protowire.Number, first, second string) []byte {
	pair := AppendString(AppendString(nil, 1, first), 2, second)
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), pair)
}

// Milliseconds rounds up to whole milliseconds. 0 stays 0, which stands for a
// default; a time that has passed becomes the shortest there is.
func Milliseconds(d time.Duration) uint64 {
	if d == 0 {
		return 0
	}
	return uint64(max(1, (d+time.Millisecond-1)/time.Millisecond))
}

// AppendError appends field n, a wasmatrix.v1.Error.
func AppendError(b []byte, n protowire.Number, code uint32, message string, details map[string]string) []byte {
	e := AppendString(AppendUint(nil, 1, uint64(code)), 2, message)
	for _, key := range slices.Sorted(maps.Keys(details)) {
		e = AppendPair(e, 3, key, details[key])
	}
	return AppendBytes(b, n, e)
}
