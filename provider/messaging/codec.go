package messaging

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protowire"
)

// message is one message on its way to a handler.
type message struct {
	subject    string // as guests name it
	payload    []byte
	headers    nats.Header
	wantsReply bool
	sequence   uint64
	delivery   uint32
}

// maxKept is the largest buffer that is kept for other messages.
const maxKept = 64 << 10

// buffers hold encoded messages, which handlers get for the time of a delivery.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

func takeBuffer() *[]byte {
	b, _ := buffers.Get().(*[]byte)
	return b
}

func giveBuffer(b *[]byte) {
	if cap(*b) <= maxKept {
		buffers.Put(b)
	}
}

// encode appends the wasmatrix.v1.Message that a handler gets to b.
func (m *message) encode(b []byte, subscription, provider string) []byte {
	size := len(m.subject) + len(m.payload) + len(subscription) + len(provider) + 48
	for name, values := range m.headers {
		for _, v := range values {
			size += len(name) + len(v) + 12
		}
	}
	b = slices.Grow(b, size)
	b = appendString(b, 1, m.subject)
	b = appendBytes(b, 2, m.payload)
	b = appendHeaders(b, 3, m.headers)
	b = appendString(b, 4, subscription)
	b = appendString(b, 5, provider)
	b = appendUint(b, 6, uint64(m.delivery))
	if m.wantsReply {
		b = appendUint(b, 7, 1)
	}
	return appendUint(b, 8, m.sequence)
}

// appendHeaders writes the fields that are the sender's own, in the order of their
// names. A value that is no text is mended, for a guest could not read the message.
func appendHeaders(b []byte, number protowire.Number, headers nats.Header) []byte {
	if len(headers) == 0 {
		return b
	}
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		if ownHeader(name) || !utf8.ValidString(name) {
			continue
		}
		for _, v := range headers[name] {
			field := appendString(nil, 1, name)
			field = appendString(field, 2, strings.ToValidUTF8(v, "\uFFFD"))
			b = protowire.AppendTag(b, number, protowire.BytesType)
			b = protowire.AppendBytes(b, field)
		}
	}
	return b
}

func encodeSequence(sequence uint64) []byte { return appendUint([]byte{}, 1, sequence) }

func encodeExisted(existed bool) []byte {
	if existed {
		return appendUint(nil, 1, 1)
	}
	return []byte{}
}

// encodeReply writes a MsgRequestResponse.
func encodeReply(m *nats.Msg) []byte {
	return appendHeaders(appendBytes(make([]byte, 0, len(m.Data)+16), 1, m.Data), 2, m.Header)
}

func appendString(b []byte, number protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}

func appendBytes(b []byte, number protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), v)
}

func appendUint(b []byte, number protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), v)
}
