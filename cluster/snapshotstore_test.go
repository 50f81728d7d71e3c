package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// disksOf opens the files in dir as a peer does.
func disksOf(t *testing.T, dir string) (*storage, error) {
	t.Helper()
	s, err := openStorage(Config{DataDir: dir}.withDefaults(), testWatch())
	if err == nil {
		t.Cleanup(func() { _ = s.close() })
	}
	return s, err
}

func snap(t *testing.T, s *storage, index uint64) string {
	t.Helper()
	_, trans := raft.NewInmemTransport("a")
	sink, err := s.snapshots.Create(1, index, 1, raft.Configuration{}, 1, trans)
	if err == nil {
		_, err = sink.Write([]byte(strings.Repeat("state", 100)))
	}
	if err == nil {
		err = sink.Close()
	}
	if err == nil {
		err = sink.Close() // as hashicorp/raft does
	}
	if err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func newest(t *testing.T, s *storage) string {
	t.Helper()
	all, err := s.snapshots.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		return ""
	}
	return all[0].ID
}

func fillLog(t *testing.T, s *storage, from, to uint64) {
	t.Helper()
	for i := from; i <= to; i++ {
		if err := s.logs.StoreLog(&raft.Log{Index: i, Term: 1, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDamagedSnapshotIsReplacedByAnOlderOneOnlyWhenTheLogGoesBackThatFar(t *testing.T) {
	damage := map[string]func(dir string) error{
		"meta":    func(dir string) error { return flipByte(filepath.Join(dir, snapshotMeta)) },
		"state":   func(dir string) error { return flipByte(filepath.Join(dir, snapshotState)) },
		"cut":     func(dir string) error { return os.Truncate(filepath.Join(dir, snapshotState), 3) },
		"missing": os.RemoveAll,
	}
	for name, harm := range damage {
		for _, compacted := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				s, err := disksOf(t, dir)
				if err != nil {
					t.Fatal(err)
				}
				fillLog(t, s, 1, 30)
				older := snap(t, s, 10)
				newer := snap(t, s, 20)
				if compacted {
					if err := s.logs.DeleteRange(1, 15); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.close(); err != nil {
					t.Fatal(err)
				}
				if err := harm(filepath.Join(raftDir(dir), snapshotsDir, newer)); err != nil {
					t.Fatal(err)
				}
				s, err = disksOf(t, dir)
				switch {
				case compacted && !errors.Is(err, ErrCorrupt):
					t.Errorf("it starts without what is lost: %v", err)
				case !compacted && err != nil:
					t.Error(err)
				case !compacted && newest(t, s) != older:
					t.Errorf("it starts from %q, want %q", newest(t, s), older)
				}
			})
		}
	}
}

func TestUnfinishedSnapshotIsNotTaken(t *testing.T) {
	dir := t.TempDir()
	s, err := disksOf(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	fillLog(t, s, 1, 30)
	first := snap(t, s, 10)
	second := snap(t, s, 20)
	// A crash before the second was recorded.
	store, ok := s.snapshots.(*checkedSnapshots)
	if !ok {
		t.Fatalf("snapshots are %T", s.snapshots)
	}
	if err := errors.Join(store.keep(store.records[:1]), s.close()); err != nil {
		t.Fatal(err)
	}
	if s, err = disksOf(t, dir); err != nil {
		t.Fatal(err)
	}
	if got := newest(t, s); got != first {
		t.Errorf("it starts from %q", got)
	}
	if _, err := os.Stat(filepath.Join(raftDir(dir), snapshotsDir, second)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unfinished one is still there: %v", err)
	}
}

func TestSnapshotThatWasGivenUpLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s, err := disksOf(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	_, trans := raft.NewInmemTransport("a")
	sink, err := s.snapshots.Create(1, 5, 1, raft.Configuration{}, 1, trans)
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Cancel(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Join(raftDir(dir), snapshotsDir)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestLogThatIsGoneBesideSnapshotsIsDamage(t *testing.T) {
	dir := t.TempDir()
	s, err := disksOf(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	fillLog(t, s, 1, 5)
	snap(t, s, 5)
	if err := errors.Join(s.close(), os.Remove(filepath.Join(raftDir(dir), logFile))); err != nil {
		t.Fatal(err)
	}
	if _, err := disksOf(t, dir); !errors.Is(err, ErrCorrupt) {
		t.Errorf("it starts as if it were new: %v", err)
	}
}

func flipByte(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	raw[len(raw)/2] ^= 4
	return os.WriteFile(path, raw, 0o600)
}
