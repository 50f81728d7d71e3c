package raftfile

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func shut(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func entry(index, term uint64, size int) *raft.Log {
	return &raft.Log{Index: index, Term: term, Data: []byte(strings.Repeat(string(rune('a'+index%26)), size))}
}

func TestWhatIsStoredComesBackAfterReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, path)
	at := time.Unix(1, 2)
	want := []*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: at},
		{Index: 2, Term: 1, Type: raft.LogNoop},
	}
	if err := errors.Join(s.StoreLogs(want), s.SetUint64([]byte("term"), 7), s.Set([]byte("vote"), []byte("n1"))); err != nil {
		t.Fatal(err)
	}
	shut(t, s)
	s = open(t, path)
	defer shut(t, s)
	for _, w := range want {
		var got raft.Log
		if err := s.GetLog(w.Index, &got); err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", *w) {
			t.Errorf("entry %d: %+v, %v", w.Index, got, err)
		}
	}
	if term, err := s.GetUint64([]byte("term")); err != nil || term != 7 {
		t.Errorf("term %d, %v", term, err)
	}
	if vote, err := s.Get([]byte("vote")); err != nil || string(vote) != "n1" {
		t.Errorf("vote %q, %v", vote, err)
	}
	if _, err := s.Get([]byte("other")); err == nil || err.Error() != "not found" {
		t.Errorf("a key that was never set: %v", err)
	}
	if err := s.GetLog(3, &raft.Log{}); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("an entry that was never stored: %v", err)
	}
	if _, err := Open(path); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
}

// TestAnyHistoryReopens does what Raft does to a log, at random, and compares
// with a map after each reopening.
func TestAnyHistoryReopens(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, path)
	truth := map[uint64]uint64{} // index to term
	first, last := uint64(0), uint64(0)
	for step := range 150 {
		switch k := r.IntN(10); {
		case k < 6:
			var batch []*raft.Log
			next := last + 1
			if k == 5 && r.IntN(5) == 0 {
				next += uint64(r.IntN(3))
			}
			for i := range uint64(1 + r.IntN(30)) {
				batch = append(batch, entry(next+i, uint64(step), r.IntN(3000)))
				truth[next+i] = uint64(step)
			}
			if err := s.StoreLogs(batch); err != nil {
				t.Fatal(err)
			}
			if last = next + uint64(len(batch)) - 1; first == 0 {
				first = next
			}
		case k < 8 && last > 0:
			from, to := first, first+uint64(r.IntN(40))
			if step%37 == 0 {
				from, to = first, last
			} else if k == 7 {
				from, to = last-min(last-first, uint64(r.IntN(10))), last
			}
			if err := s.DeleteRange(from, to); err != nil {
				t.Fatal(err)
			}
			for i := from; i <= to; i++ {
				delete(truth, i)
			}
			first, last = 0, 0
			for i := range truth {
				if first == 0 || i < first {
					first = i
				}
				last = max(last, i)
			}
		default:
			if err := s.SetUint64([]byte{byte(r.IntN(4))}, r.Uint64()); err != nil {
				t.Fatal(err)
			}
		}
		if step%10 == 0 {
			shut(t, s)
			s = open(t, path)
		}
		if a, _ := s.FirstIndex(); a != first {
			t.Fatalf("step %d: first %d, want %d", step, a, first)
		}
		if b, _ := s.LastIndex(); b != last {
			t.Fatalf("step %d: last %d, want %d", step, b, last)
		}
		for i := first; i <= last && i != 0; i++ {
			var got raft.Log
			term, ok := truth[i]
			err := s.GetLog(i, &got)
			if ok && (err != nil || got.Term != term) || !ok && !errors.Is(err, raft.ErrLogNotFound) || s.Covers(i, i) != ok {
				t.Fatalf("step %d: entry %d: %v, %+v", step, i, err, got)
			}
		}
	}
	shut(t, s)
}

// TestOlderTransactionsAreNoticed puts back what bbolt itself would take for
// good: an older meta page, and pages of an earlier state of the file.
func TestOlderTransactionsAreNoticed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, path)
	var images [][]byte
	for i := range uint64(12) {
		if err := errors.Join(s.StoreLog(entry(i+1, 1, 600)), s.SetUint64([]byte("CurrentTerm"), i)); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, raw)
	}
	shut(t, s)
	now := images[len(images)-1]
	page := os.Getpagesize()
	noticed := 0
	for n, image := range images[:len(images)-1] {
		for p := 0; p < min(len(image), len(now)); p += page {
			mixed := append([]byte(nil), now...)
			copy(mixed[p:], image[p:p+page])
			// The last sector that was written, lost as a whole by a disk that said
			// that it has it, is the one thing that a file cannot know of itself.
			lostLast := n == len(images)-2 && p/page == int(s.head.tx%2)
			if string(mixed) == string(now) || lostLast {
				continue
			}
			if err := os.WriteFile(path, mixed, 0o600); err != nil {
				t.Fatal(err)
			}
			again, err := Open(path)
			if err != nil {
				if !errors.Is(err, ErrDamaged) {
					t.Fatalf("page %d of image %d: %v", p/page, n, err)
				}
				noticed++
				continue
			}
			// A page that is free now.
			if last, _ := again.LastIndex(); last != 12 {
				t.Errorf("page %d of image %d: the log ends at %d", p/page, n, last)
			}
			if term, err := again.GetUint64([]byte("CurrentTerm")); term != 11 {
				t.Errorf("page %d of image %d: term %d, %v", p/page, n, term, err)
			}
			shut(t, again)
		}
	}
	if noticed < len(images) {
		t.Errorf("only %d noticed", noticed)
	}
}

func TestMissingEntryIsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, path)
	for i := uint64(1); i <= 3; i++ {
		if err := s.StoreLog(entry(i, 1, 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketLogs).Delete(indexKey(2)) }); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(2, &raft.Log{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("read: %v", err)
	}
	shut(t, s)
	if _, err := Open(path); !errors.Is(err, ErrDamaged) {
		t.Errorf("open: %v", err)
	}
}

func TestEmptyFileIsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}

// TestNothingIsWrittenAfterAFailure closes the file under the store: the next
// write fails in the middle.
func TestNothingIsWrittenAfterAFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s := open(t, path)
	if err := s.StoreLog(entry(1, 1, 10)); err != nil {
		t.Fatal(err)
	}
	s.failed = fmt.Errorf("%w: fsync", ErrFailed)
	if err := s.StoreLog(entry(2, 1, 10)); !errors.Is(err, ErrFailed) {
		t.Error(err)
	}
	if err := s.SetUint64([]byte("term"), 1); !errors.Is(err, ErrFailed) {
		t.Error(err)
	}
	if err := s.GetLog(1, &raft.Log{}); err != nil {
		t.Error(err)
	}
	shut(t, s)
}

// FuzzCheck feeds the checker with files that are wrong in any way: it must not
// panic, loop, or take more memory than the file has.
func FuzzCheck(f *testing.F) {
	path := filepath.Join(f.TempDir(), "raft.db")
	s, err := Open(path)
	if err != nil {
		f.Fatal(err)
	}
	for i := uint64(1); i < 40; i++ {
		if err := s.StoreLog(entry(i, 1, 300)); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(0), []byte{0xff})
	f.Add(uint32(4*4096+12), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(_ *testing.T, at uint32, put []byte) {
		bent := append([]byte(nil), raw...)
		copy(bent[int(at)%len(bent):], put)
		_, _ = inspect(strings.NewReader(string(bent)), int64(len(bent)))
	})
}
