package cluster

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
)

const (
	snapshotsDir  = "snapshots"
	snapshotMeta  = "meta.json"
	snapshotState = "state.bin"
	// unfinished ends the name of a snapshot that is being written.
	unfinished = ".tmp"
	// snapshotSyncLimit is how long the sync of a whole snapshot may take before
	// the disk counts as hanging: it may be large.
	snapshotSyncLimit = 30 * time.Second
)

// snapshotsKey is where the stable store keeps which snapshots were finished.
var snapshotsKey = []byte("WasmatrixSnapshots")

// snapshotRecord is what is known of a finished snapshot besides its own files.
type snapshotRecord struct {
	ID          string
	Index, Term uint64
	// Meta is the SHA-256 of meta.json, which holds the checksum of the state.
	Meta []byte
}

// checkedSnapshots is the snapshots of hashicorp/raft with what those leave open:
// index, term and configuration of a snapshot are in a file without a checksum,
// and a snapshot that does not open is passed over in favour of an older one,
// whether the log goes back that far or not. So the stable store, which can tell
// damage, records each finished snapshot; what it does not know was never finished.
type checkedSnapshots struct {
	*raft.FileSnapshotStore
	dir    string
	stable raft.StableStore
	space  *diskSpace
	watch  *diskWatch
	log    *slog.Logger

	mu      sync.Mutex
	records []snapshotRecord // oldest first
}

// openSnapshots opens the snapshots and checks the newest. When it is damaged,
// and the log has everything since one before it, that one takes its place.
func openSnapshots(cfg Config, file *raftfile.Store, stable raft.StableStore, space *diskSpace, watch *diskWatch) (*checkedSnapshots, error) {
	dir := raftDir(cfg.DataDir)
	log := cfg.Logger.With("component", "snapshot")
	inner, err := raft.NewFileSnapshotStoreWithLogger(dir, max(cfg.Snapshots.Retain, 2), newHCLog(log))
	if err != nil {
		return nil, fmt.Errorf("open the snapshots in %s: %w", dir, err)
	}
	s := &checkedSnapshots{FileSnapshotStore: inner, dir: filepath.Join(dir, snapshotsDir), stable: stable, space: space, watch: watch, log: log}
	raw, err := stable.Get(snapshotsKey)
	switch {
	case err != nil && err.Error() != textNotFound:
		return nil, fmt.Errorf("read which snapshots there are: %w", err)
	case err == nil:
		if err := json.Unmarshal(raw, &s.records); err != nil {
			return nil, fmt.Errorf("%w: which snapshots there are: %w", ErrCorrupt, err)
		}
	}
	has, err := raft.HasExistingState(file, stable, raft.NewDiscardSnapshotStore())
	if err != nil {
		return nil, err
	}
	if err := s.clear(has); err != nil {
		return nil, err
	}
	return s, s.verify(file)
}

// clear removes snapshots that were never finished.
func (s *checkedSnapshots) clear(has bool) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("list the snapshots: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() || s.recorded(e.Name()) != nil {
			continue
		}
		if !has && !strings.HasSuffix(e.Name(), unfinished) {
			return fmt.Errorf("%w: there is the snapshot %s, and the log that belongs to it is gone", ErrCorrupt, filepath.Join(s.dir, e.Name()))
		}
		s.log.Info("removing a snapshot that was never finished", "name", e.Name())
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return fmt.Errorf("remove an unfinished snapshot: %w", err)
		}
	}
	return nil
}

// verify leaves only records from the newest sound snapshot on.
func (s *checkedSnapshots) verify(log *raftfile.Store) error {
	if len(s.records) == 0 {
		return nil
	}
	newest := s.records[len(s.records)-1]
	var damage error
	for i := len(s.records) - 1; i >= -1; i-- {
		from := uint64(1)
		if i >= 0 {
			r := s.records[i]
			if err := s.verifyOne(r); err != nil {
				damage = errors.Join(damage, err)
				continue
			}
			if from = r.Index + 1; r.ID == newest.ID {
				return nil
			}
		}
		if !log.Covers(from, newest.Index) {
			break
		}
		s.log.Error("the newest snapshot is damaged, the log makes up for it", "error", damage, "from", from)
		return s.setAside(i + 1)
	}
	return fmt.Errorf("%w: %w; the log does not go back to a sound snapshot", ErrCorrupt, damage)
}

// verifyOne reads a snapshot and compares it with its record.
func (s *checkedSnapshots) verifyOne(r snapshotRecord) error {
	path := filepath.Join(s.dir, r.ID)
	raw, err := os.ReadFile(filepath.Join(path, snapshotMeta))
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", path, err)
	}
	if sum := sha256.Sum256(raw); !bytes.Equal(sum[:], r.Meta) {
		return fmt.Errorf("snapshot %s: %s is not what was written", path, snapshotMeta)
	}
	_, source, err := s.FileSnapshotStore.Open(r.ID)
	if err != nil {
		return fmt.Errorf("snapshot %s: %s: %w", path, snapshotState, err)
	}
	return source.Close()
}

// setAside moves the damaged snapshots, those from the given record on, out of
// the way and forgets them.
func (s *checkedSnapshots) setAside(from int) error {
	damaged := s.records[from:]
	if err := s.keep(s.records[:from]); err != nil {
		return err
	}
	for _, r := range damaged {
		aside := filepath.Join(filepath.Dir(s.dir), "damaged-"+r.ID)
		if err := os.RemoveAll(aside); err != nil {
			return fmt.Errorf("set a damaged snapshot aside: %w", err)
		}
		if err := os.Rename(filepath.Join(s.dir, r.ID), aside); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set a damaged snapshot aside: %w", err)
		}
	}
	return nil
}

// keep records which snapshots there are.
func (s *checkedSnapshots) keep(records []snapshotRecord) error {
	raw, err := json.Marshal(records)
	if err != nil {
		return err
	}
	if err := s.stable.Set(snapshotsKey, raw); err != nil {
		return fmt.Errorf("record the snapshots: %w", err)
	}
	s.records = slices.Clip(records)
	return nil
}

// recorded returns the record of a snapshot, or nil. The caller holds mu unless it is alone.
func (s *checkedSnapshots) recorded(id string) *snapshotRecord {
	if i := slices.IndexFunc(s.records, func(r snapshotRecord) bool { return r.ID == id }); i >= 0 {
		return &s.records[i]
	}
	return nil
}

// List returns the finished snapshots, newest first.
func (s *checkedSnapshots) List() ([]*raft.SnapshotMeta, error) {
	all, err := s.FileSnapshotStore.List()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(all, func(m *raft.SnapshotMeta) bool { return s.recorded(m.ID) == nil }), nil
}

// Open opens a snapshot after it was checked. Damage stops this peer.
func (s *checkedSnapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	s.mu.Lock()
	record := s.recorded(id)
	s.mu.Unlock()
	if record == nil {
		return nil, nil, fmt.Errorf("snapshot %s is not known", id)
	}
	if err := s.verifyOne(*record); err != nil {
		if errors.Is(err, os.ErrNotExist) && s.reaped(id) {
			return nil, nil, err
		}
		return nil, nil, s.watch.ruin(fmt.Errorf("%w: %w", ErrCorrupt, err))
	}
	return s.FileSnapshotStore.Open(id)
}

// reaped reports whether a newer snapshot has taken the place of this one.
func (s *checkedSnapshots) reaped(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.recorded(id) == nil
}

// Create begins a snapshot. On a disk that is nearly full it fails, because the
// log needs what is left more.
func (s *checkedSnapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration, configurationIndex uint64, trans raft.Transport) (raft.SnapshotSink, error) {
	if err := s.room(); err != nil {
		return nil, err
	}
	var inner raft.SnapshotSink
	err := s.watch.timed(s.watch.limit, func() (err error) {
		inner, err = s.FileSnapshotStore.Create(version, index, term, configuration, configurationIndex, trans)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &checkedSink{SnapshotSink: inner, store: s, index: index, term: term}, nil
}

// room reports whether another snapshot of the size of the last one fits.
func (s *checkedSnapshots) room() error {
	all, err := s.FileSnapshotStore.List()
	if err != nil || len(all) == 0 {
		return err
	}
	free, _, err := diskFree(s.dir)
	if err != nil {
		return err
	}
	if want := s.space.low/2 + uint64(all[0].Size)*5/4; free < want {
		return fmt.Errorf("%w: %d bytes are free, a snapshot needs %d", raftfile.ErrFull, free, want)
	}
	return nil
}

// finish records a snapshot whose files are complete, and forgets those that went for it.
func (s *checkedSnapshots) finish(id string, index, term uint64) error {
	dir := filepath.Join(s.dir, id)
	raw, err := os.ReadFile(filepath.Join(dir, snapshotMeta))
	if err != nil {
		return err
	}
	if err := syncPath(dir); err != nil {
		return err
	}
	sum := sha256.Sum256(raw)
	s.mu.Lock()
	defer s.mu.Unlock()
	records := slices.DeleteFunc(slices.Clone(s.records), func(r snapshotRecord) bool {
		_, err := os.Stat(filepath.Join(s.dir, r.ID))
		return errors.Is(err, os.ErrNotExist)
	})
	return s.keep(append(records, snapshotRecord{ID: id, Index: index, Term: term, Meta: sum[:]}))
}

func syncPath(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// checkedSink is a snapshot that is being written.
type checkedSink struct {
	raft.SnapshotSink
	store       *checkedSnapshots
	index, term uint64
	once        sync.Once
	err         error
}

// Write writes a piece.
func (k *checkedSink) Write(p []byte) (n int, err error) {
	err = k.store.watch.timed(k.store.watch.limit, func() (err error) {
		n, err = k.SnapshotSink.Write(p)
		return err
	})
	return n, err
}

// Close makes the snapshot durable. It may be called more than once.
func (k *checkedSink) Close() error {
	k.once.Do(func() {
		k.err = k.store.watch.timed(snapshotSyncLimit, func() error {
			if err := k.SnapshotSink.Close(); err != nil {
				return err
			}
			return k.store.finish(k.ID(), k.index, k.term)
		})
		if k.err != nil {
			k.err = errors.Join(k.err, k.remove())
		}
	})
	return k.err
}

// Cancel gives the snapshot up. On a full disk hashicorp/raft would leave its files.
func (k *checkedSink) Cancel() error {
	err := k.SnapshotSink.Cancel()
	k.once.Do(func() { k.err = errors.New("the snapshot was given up") })
	return errors.Join(err, k.remove())
}

func (k *checkedSink) remove() error {
	return errors.Join(
		os.RemoveAll(filepath.Join(k.store.dir, k.ID()+unfinished)),
		k.removeFinished(),
	)
}

func (k *checkedSink) removeFinished() error {
	if !k.store.reaped(k.ID()) {
		return nil
	}
	return os.RemoveAll(filepath.Join(k.store.dir, k.ID()))
}
