package kv

import (
	"encoding/binary"
	"hash/crc32"
)

// A record's key in the file is one byte with the length of the bucket's name,
// the name, and the key: so no key of one bucket is ever a key or a prefix of
// one of another. Its value is
//
//	byte 0      format, 1
//	bytes 1-8   version, big endian
//	bytes 9-16  expiry in nanoseconds since 1970, big endian; 0 is never
//	bytes 17-20 CRC32C of the record's key, bytes 0-16 and the value
//	the rest    the value
const (
	recordFormat = 1
	recordHeader = 21
	crcOffset    = 17
)

// appendKey appends the key of a record.
func appendKey(b []byte, bucket string, key []byte) []byte {
	b = append(b, byte(len(bucket)))
	b = append(b, bucket...)
	return append(b, key...)
}

func encodeKey(bucket string, key []byte) []byte {
	return appendKey(make([]byte, 0, 1+len(bucket)+len(key)), bucket, key)
}

// splitKey is the inverse of encodeKey.
func splitKey(b []byte) (bucket string, key []byte, ok bool) {
	if len(b) < 1 || len(b) < 1+int(b[0]) {
		return "", nil, false
	}
	n := 1 + int(b[0])
	return string(b[1:n]), b[n:], true
}

// record is a decoded record; value points into the encoded one.
type record struct {
	version uint64
	expires int64
	value   []byte
}

func (r *record) alive(now int64) bool { return r.expires == 0 || r.expires > now }

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func checksum(key, encoded []byte) uint32 {
	table := castagnoli()
	sum := crc32.Update(0, table, key)
	sum = crc32.Update(sum, table, encoded[:crcOffset])
	return crc32.Update(sum, table, encoded[recordHeader:])
}

func encodeRecord(key []byte, r *record) []byte {
	b := make([]byte, recordHeader+len(r.value))
	b[0] = recordFormat
	binary.BigEndian.PutUint64(b[1:], r.version)
	binary.BigEndian.PutUint64(b[9:], uint64(r.expires)) //nolint:gosec // never negative
	copy(b[recordHeader:], r.value)
	binary.BigEndian.PutUint32(b[crcOffset:], checksum(key, b))
	return b
}

// decodeRecord reports false for a damaged record.
func decodeRecord(key, b []byte) (record, bool) {
	if len(b) < recordHeader || b[0] != recordFormat || binary.BigEndian.Uint32(b[crcOffset:]) != checksum(key, b) {
		return record{}, false
	}
	return record{
		version: binary.BigEndian.Uint64(b[1:]),
		expires: int64(binary.BigEndian.Uint64(b[9:])), //nolint:gosec // written from an int64
		value:   b[recordHeader:],
	}, true
}

// encodeExpiry returns the key of the expiry index: when, then the record's key.
func encodeExpiry(expires int64, key []byte) []byte {
	b := make([]byte, 8, 8+len(key))
	binary.BigEndian.PutUint64(b, uint64(expires)) //nolint:gosec // never negative
	return append(b, key...)
}

func splitExpiry(b []byte) (expires int64, key []byte, ok bool) {
	if len(b) < 8 {
		return 0, nil, false
	}
	return int64(binary.BigEndian.Uint64(b)), b[8:], true //nolint:gosec // written from an int64
}

// totals are the number and the sum of the checksums of all records and marks of a file.
// They are kept up to date by every transaction, so that a record which is
// missing, or an old one in its place, is noticed by a check of the whole file.
type totals struct {
	count, sum uint64
}

// crcOf returns the checksum that an encoded record says it has.
func crcOf(encoded []byte) uint64 {
	if len(encoded) < recordHeader {
		return 0
	}
	return uint64(binary.BigEndian.Uint32(encoded[crcOffset:]))
}

func (t *totals) add(encoded []byte) {
	t.count++
	t.sum += crcOf(encoded)
}

func (t *totals) remove(encoded []byte) {
	t.count--
	t.sum -= crcOf(encoded)
}

// encode returns the totals with a CRC32C of their own.
func (t *totals) encode() []byte {
	b := make([]byte, 16, 20)
	binary.BigEndian.PutUint64(b, t.count)
	binary.BigEndian.PutUint64(b[8:], t.sum)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli()))
}

func decodeTotals(b []byte) (totals, bool) {
	if len(b) != 20 || binary.BigEndian.Uint32(b[16:]) != crc32.Checksum(b[:16], castagnoli()) {
		return totals{}, false
	}
	return totals{count: binary.BigEndian.Uint64(b), sum: binary.BigEndian.Uint64(b[8:])}, true
}
