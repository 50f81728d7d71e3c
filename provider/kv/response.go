package kv

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"
)

// maxPageBytes is where a page of a listing ends. One entry always fits, so a
// page has at most about 2 MiB.
const maxPageBytes = 1 << 20

// maxExamined bounds the expired keys that one page passes over.
const maxExamined = 16384

// fieldOverhead is an upper bound of tag and length of one field.
const fieldOverhead = 11

func appendBytesField(b []byte, number protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	b = protowire.AppendTag(b, number, protowire.BytesType)
	return protowire.AppendBytes(b, v)
}

func appendVarintField(b []byte, number protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	b = protowire.AppendTag(b, number, protowire.VarintType)
	return protowire.AppendVarint(b, v)
}

// encodeFound returns the KvGetResponse of a key that exists.
func encodeFound(value []byte, version uint64) []byte {
	b := make([]byte, 0, len(value)+3*fieldOverhead)
	b = appendVarintField(b, 1, 1)
	b = appendBytesField(b, 2, value)
	return appendVarintField(b, 3, version)
}

// encodeVersion returns a KvSetResponse.
func encodeVersion(version uint64) []byte {
	return appendVarintField(make([]byte, 0, fieldOverhead), 1, version)
}

// encodeExisted returns a KvDeleteResponse.
func encodeExisted(existed bool) []byte {
	return appendVarintField(nil, 1, protowire.EncodeBool(existed))
}

// encodeCas returns a KvCasResponse.
func encodeCas(swapped bool, version uint64) []byte {
	b := appendVarintField(make([]byte, 0, 2*fieldOverhead), 1, protowire.EncodeBool(swapped))
	return appendVarintField(b, 2, version)
}

// page builds a KvListResponse while a driver walks the keys in order.
type page struct {
	prefix, cursor []byte
	limit          int
	keysOnly       bool

	out      []byte
	entries  int
	examined int
	last     []byte // the last key that was looked at; a copy
	more     bool
}

// seek returns the key that the walk starts at.
func (p *page) seek() []byte {
	if bytes.Compare(p.cursor, p.prefix) > 0 {
		return p.cursor
	}
	return p.prefix
}

// visit takes the next key of the walk, alive or expired, and reports whether
// the walk goes on.
func (p *page) visit(key, value []byte, version uint64, alive bool) bool {
	if !bytes.HasPrefix(key, p.prefix) {
		return false
	}
	if len(p.cursor) > 0 && bytes.Compare(key, p.cursor) <= 0 {
		return true
	}
	if !alive {
		p.examined++
		p.last = append(p.last[:0], key...)
		p.more = p.examined >= maxExamined
		return !p.more
	}
	if p.keysOnly {
		value = nil
	}
	size := len(key) + len(value) + 3*fieldOverhead
	if p.entries == p.limit || p.entries > 0 && len(p.out)+size > maxPageBytes {
		p.more = true
		return false
	}
	entry := protowire.SizeTag(1) + protowire.SizeBytes(len(key)) + protowire.SizeTag(3) + protowire.SizeVarint(version)
	if len(value) > 0 {
		entry += protowire.SizeTag(2) + protowire.SizeBytes(len(value))
	}
	p.out = protowire.AppendTag(p.out, 1, protowire.BytesType)
	p.out = protowire.AppendVarint(p.out, uint64(entry)) //nolint:gosec // a sum of lengths
	p.out = appendBytesField(p.out, 1, key)
	p.out = appendBytesField(p.out, 2, value)
	p.out = appendVarintField(p.out, 3, version)
	p.entries++
	p.last = append(p.last[:0], key...)
	return true
}

// encode returns the finished message.
func (p *page) encode() []byte {
	if p.more {
		p.out = appendBytesField(p.out, 2, p.last)
	}
	return p.out
}
