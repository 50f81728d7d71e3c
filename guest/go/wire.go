package wasmatrix

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// errWire is returned for an answer that is no protobuf message.
var errWire = errors.New("malformed message from the host")

// value is one field as it stands on the wire: a number or bytes.
type value struct {
	number uint64
	bytes  []byte
}

// fields calls f for each field of the message b in order. Bytes alias b.
func fields(b []byte, f func(protowire.Number, value)) error {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errWire
		}
		b = b[size:]
		var v value
		switch t {
		case protowire.VarintType:
			v.number, size = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			v.bytes, size = protowire.ConsumeBytes(b)
		default:
			size = protowire.ConsumeFieldValue(n, t, b)
		}
		if size < 0 {
			return errWire
		}
		b = b[size:]
		f(n, v)
	}
	return nil
}

func appendBytes(b []byte, n protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func appendString(b []byte, n protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}
