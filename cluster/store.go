package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

// ErrCorrupt is wrapped by the error of a peer that found a damaged log entry.
var ErrCorrupt = errors.New("raft log is damaged")

// unsettledKey marks, in the stable store, a peer that must not vote yet: it
// has neither bootstrapped nor been made a voter since its disk was empty.
var unsettledKey = []byte("WasmatrixUnsettled")

const crcSize = 4

// storage is where a peer keeps log, votes and snapshots.
type storage struct {
	logs      *checkedLogs
	stable    raft.StableStore
	snapshots raft.SnapshotStore
	close     func() error
}

// openStorage opens the files, or takes the injected stores. The caller calls close.
func openStorage(cfg Config, watch *diskWatch) (*storage, error) {
	if s := cfg.Seams; s.Logs != nil {
		return &storage{
			logs:      &checkedLogs{LogStore: s.Logs, watch: watch},
			stable:    &watchedStable{StableStore: s.Stable, watch: watch},
			snapshots: s.SnapshotStore,
			close:     func() error { return nil },
		}, nil
	}
	dir := filepath.Join(cfg.DataDir, "raft")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	bolt, err := raftboltdb.New(raftboltdb.Options{
		Path: filepath.Join(dir, "raft.db"),
		// The free list is rebuilt at the next open; writing it with every
		// entry would cost more the older the log gets.
		BoltOptions: &bbolt.Options{Timeout: 2 * time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType},
	})
	if err != nil {
		return nil, fmt.Errorf("open the raft log in %s (does another process use it?): %w", dir, err)
	}
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(dir, cfg.Snapshots.Retain, newHCLog(cfg.Logger.With("component", "snapshot")))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the snapshots in %s: %w", dir, err), bolt.Close())
	}
	return &storage{
		logs:      &checkedLogs{LogStore: bolt, watch: watch},
		stable:    &watchedStable{StableStore: bolt, watch: watch},
		snapshots: snapshots,
		close:     bolt.Close,
	}, nil
}

// hasHistory reports whether the peer ever had a leader: more than the entry
// that a bootstrap writes.
func (s *storage) hasHistory() (bool, error) {
	last, err := s.logs.LastIndex()
	if err != nil {
		return false, fmt.Errorf("read the raft log: %w", err)
	}
	snapshots, err := s.snapshots.List()
	if err != nil {
		return false, fmt.Errorf("list the snapshots: %w", err)
	}
	return last > 1 || len(snapshots) > 0, nil
}

// unsettled reports whether the peer must not vote yet. A disk without any
// state gets the mark, so that it survives a crash.
func (s *storage) unsettled() (bool, error) {
	has, err := raft.HasExistingState(s.logs, s.stable, s.snapshots)
	if err != nil {
		return false, fmt.Errorf("look for raft state: %w", err)
	}
	if !has {
		return true, s.markUnsettled(1)
	}
	mark, err := s.stable.GetUint64(unsettledKey)
	if err != nil && err.Error() != raftboltdb.ErrKeyNotFound.Error() {
		return false, fmt.Errorf("read the voting mark: %w", err)
	}
	return mark != 0, nil
}

func (s *storage) markUnsettled(mark uint64) error {
	if err := s.stable.SetUint64(unsettledKey, mark); err != nil {
		return fmt.Errorf("write the voting mark: %w", err)
	}
	return nil
}

// verify reads the whole log once, so that damage is reported before Raft starts.
func (s *storage) verify() error {
	first, err := s.logs.FirstIndex()
	if err != nil {
		return fmt.Errorf("read the raft log: %w", err)
	}
	last, err := s.logs.LastIndex()
	if err != nil {
		return fmt.Errorf("read the raft log: %w", err)
	}
	var entry raft.Log
	for i := first; i != 0 && i <= last; i++ {
		// A restored snapshot leaves a hole in the log.
		if err := s.logs.GetLog(i, &entry); err != nil && !errors.Is(err, raft.ErrLogNotFound) {
			return err
		}
	}
	return nil
}

// checkedLogs keeps a CRC32C with each entry, at the end of its extensions.
type checkedLogs struct {
	raft.LogStore
	watch *diskWatch
}

// StoreLog stores one entry.
func (c *checkedLogs) StoreLog(entry *raft.Log) error { return c.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries with their checksums.
func (c *checkedLogs) StoreLogs(entries []*raft.Log) error {
	defer c.watch.begin()()
	out := make([]*raft.Log, len(entries))
	for i, e := range entries {
		sealed := *e
		sealed.Extensions = binary.BigEndian.AppendUint32(slices.Clip(e.Extensions), checksum(e))
		out[i] = &sealed
	}
	return c.LogStore.StoreLogs(out)
}

// DeleteRange deletes entries.
func (c *checkedLogs) DeleteRange(first, last uint64) error {
	defer c.watch.begin()()
	return c.LogStore.DeleteRange(first, last)
}

// GetLog reads an entry and fails with ErrCorrupt when it is not what was stored.
func (c *checkedLogs) GetLog(index uint64, entry *raft.Log) error {
	if err := c.LogStore.GetLog(index, entry); err != nil {
		if errors.Is(err, raft.ErrLogNotFound) {
			return err
		}
		return c.watch.corrupt(fmt.Errorf("%w: read entry %d: %w", ErrCorrupt, index, err))
	}
	n := len(entry.Extensions) - crcSize
	if n < 0 {
		return c.watch.corrupt(fmt.Errorf("%w: entry %d has no checksum", ErrCorrupt, index))
	}
	want := binary.BigEndian.Uint32(entry.Extensions[n:])
	if entry.Extensions = entry.Extensions[:n:n]; n == 0 {
		entry.Extensions = nil
	}
	if entry.Index != index || checksum(entry) != want {
		return c.watch.corrupt(fmt.Errorf("%w: the checksum of entry %d does not match", ErrCorrupt, index))
	}
	return nil
}

func checksum(e *raft.Log) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	head := make([]byte, 0, 32)
	head = binary.BigEndian.AppendUint64(head, e.Index)
	head = binary.BigEndian.AppendUint64(head, e.Term)
	head = append(head, byte(e.Type))
	head = binary.BigEndian.AppendUint64(head, uint64(len(e.Data)))
	sum := crc32.Update(0, table, head)
	sum = crc32.Update(sum, table, e.Data)
	return crc32.Update(sum, table, e.Extensions)
}

// watchedStable watches the time of writes of terms and votes.
type watchedStable struct {
	raft.StableStore
	watch *diskWatch
}

// Set stores a value.
func (s *watchedStable) Set(key, value []byte) error {
	defer s.watch.begin()()
	return s.StableStore.Set(key, value)
}

// SetUint64 stores a number.
func (s *watchedStable) SetUint64(key []byte, value uint64) error {
	defer s.watch.begin()()
	return s.StableStore.SetUint64(key, value)
}

// diskWatch notices writes that take too long, and damage.
type diskWatch struct {
	limit time.Duration
	// slow is called when a write exceeds the limit, recovered when that write returned.
	slow, recovered func()
	// damaged is called once with the first ErrCorrupt.
	damaged func(error)
	once    sync.Once
}

// begin watches one write; call what it returns when the write returned.
func (w *diskWatch) begin() func() {
	fired := make(chan struct{})
	timer := time.AfterFunc(w.limit, func() {
		w.slow()
		close(fired)
	})
	return func() {
		if !timer.Stop() {
			<-fired
			w.recovered()
		}
	}
}

func (w *diskWatch) corrupt(err error) error {
	w.once.Do(func() { w.damaged(err) })
	return err
}
