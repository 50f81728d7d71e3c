package kv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func (c client) as(instance string, m provider.Mark, operation string) error {
	request := map[string][]byte{
		opSet: marshal(c, &pb.KvSetRequest{Key: []byte("k"), Value: []byte("v")}),
		opGet: marshal(c, &pb.KvGetRequest{Key: []byte("k")}),
	}[operation]
	_, err := c.p.Invoke(c.Context(), provider.Call{
		Instance: instance, Generation: m.Generation, Created: m.Created, Bucket: "b", Operation: operation, Payload: request,
	})
	return err
}

func generation(g uint64) provider.Mark { return provider.Mark{Created: 7, Generation: g} }

// The node's agent may know less after a restart than before; the store does not.
func TestBboltRefusesAnOldGenerationAfterARestart(t *testing.T) {
	for _, operation := range []string{opSet, opGet} {
		t.Run(operation, func(t *testing.T) {
			dir := t.TempDir()
			c := mustOpen(t, dir, nil)
			for _, g := range []uint64{1, 3} {
				if err := c.as("i", generation(g), operation); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.p.Close(); err != nil {
				t.Fatal(err)
			}
			c = mustOpen(t, dir, map[string]string{"verify": "always"})
			for _, again := range []string{opGet, opSet} {
				wantRefusal(t, c.as("i", generation(2), again), provider.ErrDenied, "superseded by generation 3")
			}
			for _, m := range []provider.Mark{generation(3), generation(4), {Created: 9, Generation: 1}} {
				if err := c.as("i", m, opSet); err != nil {
					t.Errorf("%v: %v", m, err)
				}
			}
		})
	}
}

// A write that failed raised nothing: the fence and the data go together.
func TestBboltRaisesTheMarkWithTheWriteOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	s, err := openBolt(boltOptions{dir: dir, sync: true, verify: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("rolled back")
	err = s.update([]*job{
		{run: func(tx txn) error {
			refused, err := s.admit(tx, &provider.Call{Instance: "i", Generation: 5, Created: 7})
			return errors.Join(refused, err)
		}},
		{run: func(txn) error { return failed }},
	})
	if !errors.Is(err, failed) && err == nil {
		t.Fatal("the transaction was not rolled back")
	}
	if got := s.marks.seen("i"); got != (provider.Mark{}) {
		t.Errorf("in memory the mark is %v", got)
	}
	w := &write{call: provider.Call{Instance: "i", Generation: 2, Created: 7}, operation: opSet, bucket: "b", key: []byte("k"), now: 1}
	if err := s.write(t.Context(), w); err != nil {
		t.Errorf("an older generation, after a newer one was rolled back: %v", err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
}

// Two generations in one batch: the order in the batch is the order of effects.
func TestBboltFencesWithinABatch(t *testing.T) {
	s, err := openBolt(boltOptions{dir: t.TempDir(), verify: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	of := func(g uint64) *write {
		return &write{
			call: provider.Call{Instance: "i", Generation: g, Created: 7}, operation: opSet, bucket: "b",
			key: fmt.Append(nil, g), now: 1,
		}
	}
	old, newer, late := of(1), of(2), of(1)
	var batch []*job
	for _, w := range []*write{old, newer, late} {
		batch = append(batch, &job{run: func(tx txn) error { return s.apply(tx, w) }})
	}
	s.commit(batch)
	if batch[0].err != nil || old.refused != nil || !newer.done || late.done || !errors.Is(late.refused, provider.ErrDenied) {
		t.Errorf("%v; the first refused: %v, the newer done: %t, the late one refused: %v", batch[0].err, old.refused, newer.done, late.refused)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
}

// Files of before have no fences; they get them.
func TestBboltTakesUpAFileWithoutFences(t *testing.T) {
	dir := t.TempDir()
	c := mustOpen(t, dir, nil)
	if err := c.set("k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := c.p.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, fileName), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket(fencesBucket()) }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	c = mustOpen(t, dir, map[string]string{"verify": "always"})
	if v, found, err := c.get("k"); err != nil || !found || string(v) != "v" {
		t.Errorf("%q, %t, %v", v, found, err)
	}
	if err := c.as("i", generation(1), opSet); err != nil {
		t.Error(err)
	}
}

func TestADamagedFenceIsNoticed(t *testing.T) {
	for name, change := range map[string]func(fences *bolt.Bucket) error{
		"a flipped bit": func(b *bolt.Bucket) error {
			v := bytes.Clone(b.Get([]byte("i")))
			v[9] ^= 1
			return b.Put([]byte("i"), v)
		},
		"gone":   func(b *bolt.Bucket) error { return b.Delete([]byte("i")) },
		"an old": func(b *bolt.Bucket) error { return b.Put([]byte("i"), encodeMark("i", generation(1))) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := mustOpen(t, dir, nil)
			if err := c.as("i", generation(5), opSet); err != nil {
				t.Fatal(err)
			}
			if err := c.p.Close(); err != nil {
				t.Fatal(err)
			}
			db, err := bolt.Open(filepath.Join(dir, fileName), 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Update(func(tx *bolt.Tx) error { return change(tx.Bucket(fencesBucket())) }); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, fileName))
			if err != nil {
				t.Fatal(err)
			}
			if err := check(b); err == nil {
				t.Error("it is not noticed")
			}
		})
	}
}

func TestTooManyMarksAreCutDownToTheNewest(t *testing.T) {
	if testing.Short() {
		t.Skip("it writes many marks")
	}
	dir := t.TempDir()
	s, err := openBolt(boltOptions{dir: dir, verify: "always"})
	if err != nil {
		t.Fatal(err)
	}
	err = s.update([]*job{{run: func(tx txn) error {
		for n := range uint64(maxMarks + 10) {
			if err := tx.putMark(fmt.Sprintf("i-%06d", n), provider.Mark{Created: n + 1, Generation: 1}); err != nil {
				return err
			}
		}
		return nil
	}}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // what was cut down is a sound file
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
		if s, err = openBolt(boltOptions{dir: dir, verify: "always"}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.marks.known); n != maxMarks/2 {
		t.Errorf("%d marks are kept", n)
	}
	if s.marks.seen(fmt.Sprintf("i-%06d", maxMarks+9)).Generation != 1 || s.marks.seen("i-000000").Generation != 0 {
		t.Error("not the newest are kept")
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
}
