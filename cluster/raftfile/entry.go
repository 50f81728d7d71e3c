package raftfile

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// entryHeader is term, time, type and the length of the data.
const entryHeader = 8 + 8 + 1 + 4

func indexKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

func encodeEntry(key []byte, e *raft.Log) []byte {
	out := make([]byte, 0, entryHeader+len(e.Data)+len(e.Extensions)+sumSize)
	out = binary.BigEndian.AppendUint64(out, e.Term)
	var at int64
	if !e.AppendedAt.IsZero() {
		at = e.AppendedAt.UnixNano()
	}
	out = binary.BigEndian.AppendUint64(out, uint64(at))
	out = append(out, byte(e.Type))
	out = binary.BigEndian.AppendUint32(out, uint32(len(e.Data)))
	out = append(out, e.Data...)
	out = append(out, e.Extensions...)
	return seal(key, out)
}

// decodeEntry fills e, which shares no memory with sealed.
func decodeEntry(key, sealed []byte, e *raft.Log) error {
	raw, err := unseal(key, sealed)
	if err != nil {
		return err
	}
	if len(raw) < entryHeader {
		return fmt.Errorf("it has only %d bytes", len(raw))
	}
	size := binary.BigEndian.Uint32(raw[17:])
	if uint64(size) > uint64(len(raw)-entryHeader) {
		return fmt.Errorf("its data has %d bytes of %d", len(raw)-entryHeader, size)
	}
	*e = raft.Log{
		Index: binary.BigEndian.Uint64(key),
		Term:  binary.BigEndian.Uint64(raw),
		Type:  raft.LogType(raw[16]),
	}
	if at := int64(binary.BigEndian.Uint64(raw[8:])); at != 0 {
		e.AppendedAt = time.Unix(0, at)
	}
	if rest := raw[entryHeader:]; len(rest) > 0 {
		rest = append([]byte(nil), rest...)
		e.Data, e.Extensions = rest[:size:size], rest[size:]
	}
	if len(e.Extensions) == 0 {
		e.Extensions = nil
	}
	return nil
}
