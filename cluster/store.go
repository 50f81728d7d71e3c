package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
	"github.com/wasmatrix/wasmatrix/internal/plant"
)

// ErrCorrupt is wrapped by the error of a peer that found damage in its log, its
// votes or its snapshots. Its text says what to do.
var ErrCorrupt = errors.New("the raft files are damaged")

// unsettledKey marks, in the stable store, a peer that must not vote yet: it
// has neither bootstrapped nor been made a voter since its disk was empty.
var unsettledKey = []byte("WasmatrixUnsettled")

const (
	crcSize = 4
	// logFile holds log, term and votes.
	logFile = "raft.db"
	// textNotFound is the error of a stable store for a key that was never set, as hashicorp/raft compares it.
	textNotFound = "not found"
)

// storage is where a peer keeps log, votes and snapshots.
type storage struct {
	logs      *checkedLogs
	stable    raft.StableStore
	snapshots raft.SnapshotStore
	// space is nil when the stores were injected.
	space *diskSpace
	close func() error
}

// raftDir is where a peer keeps its log, votes and snapshots.
func raftDir(dataDir string) string { return filepath.Join(dataDir, "raft") }

// openStorage opens the files and checks all of them, or takes the injected
// stores. The caller calls close.
func openStorage(cfg Config, watch *diskWatch) (_ *storage, err error) {
	if s := cfg.Seams; s.Logs != nil {
		return &storage{
			logs:      &checkedLogs{LogStore: s.Logs, watch: watch},
			stable:    &watchedStable{StableStore: s.Stable, watch: watch},
			snapshots: s.SnapshotStore,
			close:     func() error { return nil },
		}, nil
	}
	dir := raftDir(cfg.DataDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	file, err := raftfile.Open(filepath.Join(dir, logFile))
	switch {
	case errors.Is(err, raftfile.ErrDamaged):
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	case err != nil:
		return nil, fmt.Errorf("open the raft log in %s: %w", dir, err)
	}
	s := &storage{close: file.Close}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.space, err = openSpace(dir, watch, cfg.Logger); err != nil {
		return nil, err
	}
	s.close = func() error { return errors.Join(file.Close(), s.space.close()) }
	s.logs = &checkedLogs{LogStore: file, watch: watch, release: s.space.release}
	s.stable = &watchedStable{StableStore: file, watch: watch, release: s.space.release}
	s.snapshots, err = openSnapshots(cfg, file, s.stable, s.space, watch)
	return s, err
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
	if err != nil && err.Error() != textNotFound {
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
// Its error wraps ErrCorrupt for an entry that is missing and that no snapshot holds.
func (s *storage) verify() error {
	first, err := s.logs.FirstIndex()
	if err != nil {
		return fmt.Errorf("read the raft log: %w", err)
	}
	last, err := s.logs.LastIndex()
	if err != nil {
		return fmt.Errorf("read the raft log: %w", err)
	}
	snapshots, err := s.snapshots.List()
	if err != nil {
		return fmt.Errorf("list the snapshots: %w", err)
	}
	var held uint64
	if len(snapshots) > 0 {
		held = snapshots[0].Index
	}
	var entry raft.Log
	for i := first; i != 0 && i <= last; i++ {
		err := s.logs.GetLog(i, &entry)
		switch {
		case errors.Is(err, raft.ErrLogNotFound) && i <= held:
			// A restored snapshot leaves a hole in the log.
		case errors.Is(err, raft.ErrLogNotFound):
			return fmt.Errorf("%w: entry %d of %d to %d is missing from the raft log, and the newest snapshot ends at %d", ErrCorrupt, i, first, last, held)
		case err != nil:
			return err
		}
	}
	return nil
}

// checkedLogs keeps a CRC32C with each entry, at the end of its extensions. It
// is the last layer that all entries go through, whatever store is below.
type checkedLogs struct {
	raft.LogStore
	watch *diskWatch
	// release frees the space that is kept for what must be written; nil for none.
	release func() bool
	// cut is set between the deletion of a conflicting end of the log and the entries that take its place.
	cut atomic.Bool
}

// StoreLog stores one entry.
func (c *checkedLogs) StoreLog(entry *raft.Log) error { return c.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries with their checksums. An error that wraps
// syscall.ENOSPC means that nothing was stored; after any other this peer stops.
func (c *checkedLogs) StoreLogs(entries []*raft.Log) error {
	out := make([]*raft.Log, len(entries))
	for i, e := range entries {
		sealed := *e
		sealed.Extensions = binary.BigEndian.AppendUint32(slices.Clip(e.Extensions), checksum(e))
		out[i] = &sealed
	}
	err := c.watch.write(func() error { return c.LogStore.StoreLogs(out) })
	// Raft believes the end that it had deleted to be there still, and with only
	// that half done it would be stuck until a restart.
	if c.cut.Load() && isFull(err) {
		if c.release != nil && c.release() {
			err = c.watch.write(func() error { return c.LogStore.StoreLogs(out) })
		}
		if isFull(err) {
			return c.watch.ruin(fmt.Errorf("%w: no room for the entries that replace the end of the log: %w", ErrDiskFailed, err))
		}
	}
	if err == nil {
		c.cut.Store(false)
	}
	return err
}

// DeleteRange deletes entries.
func (c *checkedLogs) DeleteRange(first, last uint64) error {
	end, err := c.LastIndex()
	if err != nil {
		return err
	}
	err = c.watch.write(func() error { return c.LogStore.DeleteRange(first, last) })
	if err == nil && last >= end {
		c.cut.Store(true)
	}
	return err
}

// GetLog reads an entry and fails with ErrCorrupt when it is not what was stored.
func (c *checkedLogs) GetLog(index uint64, entry *raft.Log) error {
	if err := c.LogStore.GetLog(index, entry); err != nil {
		if errors.Is(err, raft.ErrLogNotFound) {
			return err
		}
		return c.watch.ruin(fmt.Errorf("%w: read entry %d: %w", ErrCorrupt, index, err))
	}
	n := len(entry.Extensions) - crcSize
	if n < 0 {
		return c.watch.ruin(fmt.Errorf("%w: entry %d has no checksum", ErrCorrupt, index))
	}
	want := binary.BigEndian.Uint32(entry.Extensions[n:])
	if entry.Extensions = entry.Extensions[:n:n]; n == 0 {
		entry.Extensions = nil
	}
	if entry.Index != index || checksum(entry) != want && !plant.On(plant.ChecksumOff) {
		return c.watch.ruin(fmt.Errorf("%w: the checksum of entry %d does not match", ErrCorrupt, index))
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

// watchedStable watches the writes of terms and votes. They are few and small,
// and Raft cannot go on without them: on a full disk they take the space that is
// kept for them.
type watchedStable struct {
	raft.StableStore
	watch   *diskWatch
	release func() bool
}

// Set stores a value.
func (s *watchedStable) Set(key, value []byte) error {
	return s.store(func() error { return s.StableStore.Set(key, value) })
}

// SetUint64 stores a number.
func (s *watchedStable) SetUint64(key []byte, value uint64) error {
	return s.store(func() error { return s.StableStore.SetUint64(key, value) })
}

func (s *watchedStable) store(write func() error) error {
	if plant.On(plant.VoteNotSaved) {
		return nil
	}
	err := s.watch.write(write)
	if isFull(err) && s.release != nil && s.release() {
		err = s.watch.write(write)
	}
	if isFull(err) {
		return s.watch.ruin(fmt.Errorf("%w: no room for the term or a vote: %w", ErrDiskFailed, err))
	}
	return err
}

// Get reads a value.
func (s *watchedStable) Get(key []byte) ([]byte, error) {
	value, err := s.StableStore.Get(key)
	return value, s.read(key, err)
}

// GetUint64 reads a number.
func (s *watchedStable) GetUint64(key []byte) (uint64, error) {
	value, err := s.StableStore.GetUint64(key)
	return value, s.read(key, err)
}

func (s *watchedStable) read(key []byte, err error) error {
	if err == nil || err.Error() == textNotFound {
		return err
	}
	return s.watch.ruin(fmt.Errorf("%w: read %s: %w", ErrCorrupt, key, err))
}
