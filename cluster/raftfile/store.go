package raftfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

var (
	// ErrDamaged is wrapped by an error that says that the file is not what was written.
	ErrDamaged = errors.New("the raft file is damaged")
	// ErrInUse is wrapped by the error of Open when another process has the file.
	ErrInUse = errors.New("another process uses the raft file")
	// ErrFull is wrapped by the error of a write that found no room. Nothing was written, and the write may be repeated.
	ErrFull = errors.New("the disk is full")
	// ErrFailed is wrapped by the error of a write whose outcome is unknown, and by those of all writes after it:
	// only a restart, which reads the file again, tells what is on the disk.
	ErrFailed = errors.New("the disk failed during a write")
	// errNotFound is what hashicorp/raft expects for a key that was never set; it compares the text.
	errNotFound = errors.New("not found")
)

// Store is the open file. It implements raft.LogStore and raft.StableStore and
// is safe for concurrent use. Close it.
type Store struct {
	db   *bbolt.DB
	path string

	writing sync.Mutex // one write at a time; held while the disk works
	failed  error      // guarded by writing

	mu   sync.RWMutex // guards the two below; never held while the disk works
	head head
	gaps []gap
}

var (
	_ raft.LogStore    = (*Store)(nil)
	_ raft.StableStore = (*Store)(nil)
)

// Open opens the file at path after it has read and checked all of it; it makes
// the file when there is none. The error wraps ErrDamaged or ErrInUse where that is the reason.
func Open(path string) (*Store, error) {
	there, err := exists(path)
	if err != nil {
		return nil, err
	}
	if !there {
		if err := create(path); err != nil {
			return nil, err
		}
	}
	found, err := verify(path)
	if err != nil {
		return nil, err
	}
	s := &Store{path: path, head: found.head, gaps: found.gaps}
	if s.db, err = openBolt(path); err != nil {
		return nil, err
	}
	// Between the check and the lock another process may have written.
	err = s.read(func(tx *bbolt.Tx) error {
		if uint64(tx.ID()) != s.head.tx {
			return fmt.Errorf("%w: %s: it was written to while it was opened", ErrInUse, path)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	return s, nil
}

func openBolt(path string) (_ *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %s: %v", ErrDamaged, path, r)
		}
	}()
	// The free list is rebuilt at the next open; writing it with every entry
	// would cost more the older the log gets.
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("%w: %s", ErrInUse, path)
	}
	return db, err
}

// create makes a file with nothing in it, under another name first: a crash
// leaves a whole file or none.
func create(path string) error {
	fresh := sibling(path)
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	db, err := openBolt(fresh)
	if err != nil {
		return err
	}
	s := &Store{db: db, path: fresh}
	err = s.write(func(tx *bbolt.Tx, _ *head) error {
		for _, name := range [][]byte{bucketLogs, bucketConf, bucketHead} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Close closes the file.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.db.Close()
}

// FirstIndex returns the index of the first entry, 0 without any.
func (s *Store) FirstIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.head.first, nil
}

// LastIndex returns the index of the last entry, 0 without any.
func (s *Store) LastIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.head.last, nil
}

// Covers reports whether the log has every index from first to last.
func (s *Store) Covers(first, last uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if first > last {
		return true
	}
	if s.head.count == 0 || first < s.head.first || last > s.head.last {
		return false
	}
	for _, g := range s.gaps {
		if g.first <= last && first <= g.last {
			return false
		}
	}
	return true
}

// GetLog reads an entry. The error is raft.ErrLogNotFound for an index that has
// none, and wraps ErrDamaged when it should be there and is not, or is another.
func (s *Store) GetLog(index uint64, entry *raft.Log) error {
	found := false
	err := s.read(func(tx *bbolt.Tx) error {
		key := indexKey(index)
		value := tx.Bucket(bucketLogs).Get(key)
		if value == nil {
			return nil
		}
		found = true
		if err := decodeEntry(key, value, entry); err != nil {
			return fmt.Errorf("%w: %s: entry %d: %w", ErrDamaged, s.path, index, err)
		}
		return nil
	})
	if err == nil && !found {
		if s.Covers(index, index) {
			return fmt.Errorf("%w: %s: entry %d is missing", ErrDamaged, s.path, index)
		}
		return raft.ErrLogNotFound
	}
	return err
}

// StoreLog stores one entry.
func (s *Store) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries, all or none. They are on the disk when it returns nil.
func (s *Store) StoreLogs(entries []*raft.Log) error {
	var gaps []gap
	return s.writeThen(func(tx *bbolt.Tx, h *head) error {
		bucket := tx.Bucket(bucketLogs)
		for _, e := range entries {
			key := indexKey(e.Index)
			if old := bucket.Get(key); old != nil {
				h.logs -= digest(key, old)
				h.count--
			}
			value := encodeEntry(key, e)
			if err := bucket.Put(key, value); err != nil {
				return err
			}
			h.logs += digest(key, value)
			h.count++
			switch {
			case h.count == 1:
				h.first, h.last = e.Index, e.Index
			case e.Index > h.last:
				if e.Index > h.last+1 {
					gaps = append(gaps, gap{h.last + 1, e.Index - 1})
				}
				h.last = e.Index
			case e.Index < h.first:
				return fmt.Errorf("entry %d comes before the first, %d", e.Index, h.first)
			}
		}
		return nil
	}, func() { s.gaps = append(s.gaps, gaps...) })
}

// DeleteRange deletes the entries from first to last, both included.
func (s *Store) DeleteRange(first, last uint64) error {
	return s.writeThen(func(tx *bbolt.Tx, h *head) error {
		bucket := tx.Bucket(bucketLogs)
		// Deleting under a cursor makes it skip, and in a bucket that was emptied it
		// runs for ever: all that a cursor can tell is asked before.
		var doomed [][]byte
		before, after := uint64(0), uint64(0)
		cursor := bucket.Cursor()
		key, value := cursor.Seek(indexKey(first))
		if previous, _ := bucket.Cursor().First(); previous != nil && binary.BigEndian.Uint64(previous) < first {
			before = neighbour(bucket.Cursor(), first)
		}
		for ; key != nil && binary.BigEndian.Uint64(key) <= last; key, value = cursor.Next() {
			h.logs -= digest(key, value)
			h.count--
			doomed = append(doomed, bytes.Clone(key))
		}
		if key != nil {
			after = binary.BigEndian.Uint64(key)
		}
		for _, key := range doomed {
			if err := bucket.Delete(key); err != nil {
				return err
			}
		}
		switch {
		case h.count == 0:
			h.first, h.last = 0, 0
		case before == 0:
			h.first = after
		case after == 0:
			h.last = before
		}
		return nil
	}, func() { s.gaps = trim(s.gaps, s.head, gap{first, last}) })
}

// neighbour returns the last index before index; there is one.
func neighbour(cursor *bbolt.Cursor, index uint64) uint64 {
	if at, _ := cursor.Seek(indexKey(index)); at == nil {
		previous, _ := cursor.Last()
		return binary.BigEndian.Uint64(previous)
	}
	previous, _ := cursor.Prev()
	return binary.BigEndian.Uint64(previous)
}

// trim returns the gaps within the bounds of the log after deleted was deleted.
func trim(gaps []gap, h head, deleted gap) []gap {
	if h.count == 0 {
		return nil
	}
	var out []gap
	for _, g := range append(gaps, deleted) {
		if g.first = max(g.first, h.first); g.last > h.last {
			g.last = h.last
		}
		if g.first <= g.last {
			out = append(out, g)
		}
	}
	return out
}

// Set stores a value under a key. It is on the disk when Set returns nil.
func (s *Store) Set(key, value []byte) error {
	return s.write(func(tx *bbolt.Tx, h *head) error {
		bucket := tx.Bucket(bucketConf)
		if old := bucket.Get(key); old != nil {
			h.conf -= digest(key, old)
		}
		sealed := seal(key, append([]byte(nil), value...))
		h.conf += digest(key, sealed)
		return bucket.Put(key, sealed)
	})
}

// Get returns the value of a key, or an error with the text "not found".
func (s *Store) Get(key []byte) ([]byte, error) {
	var out []byte
	err := s.read(func(tx *bbolt.Tx) error {
		sealed := tx.Bucket(bucketConf).Get(key)
		if sealed == nil {
			return errNotFound
		}
		value, err := unseal(key, sealed)
		if err != nil {
			return fmt.Errorf("%w: %s: the value of %s: %w", ErrDamaged, s.path, key, err)
		}
		out = append([]byte{}, value...)
		return nil
	})
	return out, err
}

// SetUint64 stores a number.
func (s *Store) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 returns a number, or an error with the text "not found".
func (s *Store) GetUint64(key []byte) (uint64, error) {
	raw, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(raw) != 8 {
		return 0, fmt.Errorf("%w: %s: the value of %s has %d bytes", ErrDamaged, s.path, key, len(raw))
	}
	return binary.BigEndian.Uint64(raw), nil
}

// read runs one read transaction. What bbolt makes of a page that went bad after
// Open, a panic or a fault, becomes an error.
func (s *Store) read(look func(*bbolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %s: %v", ErrDamaged, s.path, r)
		}
	}()
	tx, err := s.db.Begin(false)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	return look(tx)
}

func (s *Store) write(change func(*bbolt.Tx, *head) error) error {
	return s.writeThen(change, func() {})
}

// writeThen commits one change with the head that belongs to it, and then calls
// then, which may change what mu guards.
func (s *Store) writeThen(change func(*bbolt.Tx, *head) error, then func()) (err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.failed != nil {
		return s.failed
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			s.failed = fmt.Errorf("%w: %s: %v", ErrDamaged, s.path, r)
			err = s.failed
		}
	}()
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	next := s.head
	if err := change(tx, &next); err != nil {
		return err
	}
	next.tx = uint64(tx.ID())
	if err := tx.Bucket(bucketHead).Put(keyHead, next.encode()); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		if noRoom(err) {
			return fmt.Errorf("%w: write %s: %w", ErrFull, s.path, err)
		}
		s.failed = fmt.Errorf("%w: write %s: %w", ErrFailed, s.path, err)
		return s.failed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.head = next
	then()
	return nil
}

// noRoom reports whether a write found no room and nothing was changed. A sync
// that finds no room is another matter: what it should have written is lost.
func noRoom(err error) bool {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		// bbolt hides the cause.
		return strings.HasPrefix(err.Error(), "file resize error: ")
	}
	var path *fs.PathError
	return errors.As(err, &path) && path.Op == "write"
}
