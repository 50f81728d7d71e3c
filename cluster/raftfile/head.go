package raftfile

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"hash/crc64"
)

// The buckets of the file. There are no others.
var (
	bucketLogs = []byte("logs")
	bucketConf = []byte("conf")
	bucketHead = []byte("head")
	keyHead    = []byte("head")
)

const (
	sumSize  = 4
	headSize = 8*6 + sumSize
)

// head is what the file must hold after one transaction.
type head struct {
	// tx is the number of the transaction that wrote it.
	tx uint64
	// first and last are the bounds of the log, count the number of entries between them; 0 without any.
	first, last, count uint64
	// logs and conf are sums over what the two buckets hold.
	logs, conf uint64
}

func (h head) encode() []byte {
	out := make([]byte, 0, headSize)
	for _, v := range []uint64{h.tx, h.first, h.last, h.count, h.logs, h.conf} {
		out = binary.BigEndian.AppendUint64(out, v)
	}
	return binary.BigEndian.AppendUint32(out, crc32.Checksum(out, castagnoli()))
}

func decodeHead(raw []byte) (head, error) {
	if len(raw) != headSize {
		return head{}, fmt.Errorf("the head has %d bytes, not %d", len(raw), headSize)
	}
	body, sum := raw[:headSize-sumSize], raw[headSize-sumSize:]
	if crc32.Checksum(body, castagnoli()) != binary.BigEndian.Uint32(sum) {
		return head{}, fmt.Errorf("the checksum of the head does not match")
	}
	at := func(i int) uint64 { return binary.BigEndian.Uint64(body[8*i:]) }
	return head{tx: at(0), first: at(1), last: at(2), count: at(3), logs: at(4), conf: at(5)}, nil
}

// digest stands for one key and value in a sum. Sums wrap around, so that what
// is deleted can be taken out again.
func digest(key, value []byte) uint64 {
	table := crc64.MakeTable(crc64.ECMA)
	low := crc64.Update(crc64.Checksum(key, table), table, value)
	high := uint64(crc32.Update(crc32.Checksum(key, castagnoli()), castagnoli(), value))
	// The finalizer of splitmix64: neighbours get far apart, so that a sum of
	// many does not cancel out what a linear code would let cancel out.
	x := low ^ high<<32 ^ uint64(len(value))
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// seal appends a checksum over key and value.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(value, sum(key, value))
}

// unseal checks and strips what seal appended. The result shares memory with sealed.
func unseal(key, sealed []byte) ([]byte, error) {
	n := len(sealed) - sumSize
	if n < 0 {
		return nil, fmt.Errorf("it has no checksum")
	}
	if sum(key, sealed[:n]) != binary.BigEndian.Uint32(sealed[n:]) {
		return nil, fmt.Errorf("its checksum does not match")
	}
	return sealed[:n:n], nil
}

func sum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli()), castagnoli(), value)
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
