package kv

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strconv"
	"sync"

	bolt "go.etcd.io/bbolt"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The fences bucket holds the newest placement of each instance that ever called,
// so that no older one is let in after a restart either, whatever the node's
// agent knows by then. A mark goes to disk with the first write of a placement, or
// before its first read. The key is the instance's id, the value is
//
//	byte 0      format, 1
//	bytes 1-8   the Raft index at which the instance was accepted, big endian
//	bytes 9-16  generation, big endian
//	bytes 17-20 CRC32C of the key and bytes 0-16, where a record has its own
const (
	markFormat = 1
	markSize   = 21
	markSum    = 17
)

// maxMarks is how many marks are kept when a file is opened; those of the
// instances that are longest in the cluster go first. One takes about 150 bytes.
const maxMarks = 1 << 17

func encodeMark(instance string, m provider.Mark) []byte {
	b := make([]byte, markSum, markSize)
	b[0] = markFormat
	binary.BigEndian.PutUint64(b[1:], m.Created)
	binary.BigEndian.PutUint64(b[9:], m.Generation)
	return binary.BigEndian.AppendUint32(b, markChecksum([]byte(instance), b))
}

func markChecksum(key, head []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli()), castagnoli(), head[:markSum])
}

// decodeMark reports false for a damaged mark.
func decodeMark(key, b []byte) (provider.Mark, bool) {
	if len(b) != markSize || b[0] != markFormat || binary.BigEndian.Uint32(b[markSum:]) != markChecksum(key, b) {
		return provider.Mark{}, false
	}
	return provider.Mark{Created: binary.BigEndian.Uint64(b[1:]), Generation: binary.BigEndian.Uint64(b[9:])}, true
}

// marks are those of the fences bucket, as of the last commit.
type marks struct {
	mu    sync.RWMutex
	known map[string]provider.Mark
}

func (m *marks) seen(instance string) provider.Mark {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.known[instance]
}

// admit refuses a call that cannot be let in any more.
func (m *marks) admit(call *provider.Call) error {
	if newest := m.seen(call.Instance); call.Mark().Before(newest) {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	return call.Admit()
}

func (m *marks) raise(raised map[string]provider.Mark) {
	if len(raised) == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for instance, mark := range raised {
		if m.known[instance].Before(mark) {
			m.known[instance] = mark
		}
	}
}

// admit admits a call inside a transaction, and raises its instance's mark. It
// answers with a refusal, or with an error of the file.
func (s *boltStore) admit(tx txn, call *provider.Call) (refusal, err error) {
	if refusal := call.Admit(); refusal != nil || call.Instance == "" {
		return refusal, nil
	}
	newest, have := provider.Mark{}, call.Mark()
	if raw := tx.fences.Get([]byte(call.Instance)); raw != nil {
		var ok bool
		if newest, ok = decodeMark([]byte(call.Instance), raw); !ok {
			return nil, damaged(s.path, "the fence of instance "+strconv.Quote(call.Instance)+" does not match its checksum")
		}
	}
	if seen := s.marks.seen(call.Instance); newest.Before(seen) {
		newest = seen // one that found no room on the disk
	}
	switch {
	case have.Before(newest):
		return provider.Superseded(call.Instance, have, newest), nil
	case newest.Before(have):
		tx.raised[call.Instance] = have
		return nil, tx.putMark(call.Instance, have)
	default:
		return nil, nil
	}
}

// putMark replaces the mark of an instance.
func (t txn) putMark(instance string, m provider.Mark) error {
	key, after := []byte(instance), encodeMark(instance, m)
	if before := t.fences.Get(key); before != nil {
		t.totals.remove(before)
	}
	t.totals.add(after)
	return t.fences.Put(key, after)
}

// enter lets a read in: the first one of a placement raises the mark before it.
// Where the disk is full the mark is raised in memory only, because a read leaves
// nothing behind that a later one of an older placement could contradict.
func (s *boltStore) enter(ctx context.Context, call *provider.Call) error {
	if err := s.usable(); err != nil {
		return err
	}
	if !s.marks.seen(call.Instance).Before(call.Mark()) {
		return nil
	}
	var refused error
	kept := *call
	kept.Payload = nil
	err := s.commits.do(ctx, len(kept.Instance)+markSize, func(tx txn) (err error) {
		refused, err = s.admit(tx, &kept)
		return err
	})
	switch {
	case errors.Is(err, provider.ErrExhausted):
		s.marks.raise(map[string]provider.Mark{call.Instance: call.Mark()})
		return nil
	case err != nil:
		return err
	default:
		return refused
	}
}

// loadMarks reads the marks, and removes the oldest when there are too many.
func (s *boltStore) loadMarks(tx *bolt.Tx) error {
	s.marks.known = map[string]provider.Mark{}
	fences := tx.Bucket(fencesBucket())
	err := fences.ForEach(func(k, v []byte) error {
		mark, ok := decodeMark(k, v)
		if !ok {
			return damaged(s.path, "the fence of instance "+strconv.Quote(string(bytes.Clone(k)))+" does not match its checksum")
		}
		s.marks.known[string(k)] = mark
		return nil
	})
	if err != nil || len(s.marks.known) <= maxMarks {
		return err
	}
	return s.pruneMarks(tx)
}

// pruneMarks removes the oldest marks.
func (s *boltStore) pruneMarks(tx *bolt.Tx) error {
	stored, fences := tx.Bucket(totalsBucket()), tx.Bucket(fencesBucket())
	sum, ok := decodeTotals(stored.Get(totalsKey()))
	if !ok {
		return damaged(s.path, "its totals do not match their checksum")
	}
	ids := make([]string, 0, len(s.marks.known))
	for id := range s.marks.known {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(cmp.Compare(s.marks.known[a].Created, s.marks.known[b].Created), cmp.Compare(a, b))
	})
	for _, id := range ids[:len(ids)-maxMarks/2] {
		sum.remove(fences.Get([]byte(id)))
		if err := fences.Delete([]byte(id)); err != nil {
			return err
		}
		delete(s.marks.known, id)
	}
	return stored.Put(totalsKey(), sum.encode())
}
