package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	bolt "go.etcd.io/bbolt"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// churned returns a file with several levels of pages, large values, free pages
// and, if asked for, keys that expire.
func churned(t testing.TB, records int, expiring bool) []byte {
	t.Helper()
	dir := t.TempDir()
	c := mustOpen(t, dir, map[string]string{"fsync": "false"})
	random := rand.New(rand.NewPCG(3, 4))
	for i := range records {
		value := make([]byte, random.IntN(300))
		if i%97 == 0 {
			value = make([]byte, 9000)
		}
		request := &pb.KvSetRequest{Key: fmt.Appendf(nil, "key-%06d", random.IntN(records)), Value: value}
		if expiring && i%3 == 0 {
			request.TtlMs = 1 << 40
		}
		if _, err := c.call(t.Context(), opSet, request); err != nil {
			t.Fatal(err)
		}
		if i%5 == 0 {
			if _, err := c.call(t.Context(), opDelete, &pb.KvDeleteRequest{Key: fmt.Appendf(nil, "key-%06d", random.IntN(records))}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.p.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func check(b []byte) error { return checkFile(bytes.NewReader(b), int64(len(b))) }

func TestCheckAcceptsWhatWasWritten(t *testing.T) {
	for _, records := range []int{0, 1, 50, 1200} {
		for _, expiring := range []bool{false, true} {
			if err := check(churned(t, records, expiring)); err != nil {
				t.Errorf("%d records, expiring %v: %v", records, expiring, err)
			}
		}
	}
}

// treePages returns the pages of the tree, without those of their overflow.
func treePages(t *testing.T, b []byte) []int64 {
	t.Helper()
	c := &checker{file: bytes.NewReader(b), size: int64(len(b)), seen: map[uint64]string{}, found: map[string]bucketFound{}}
	meta, err := c.meta()
	if err != nil {
		t.Fatal(err)
	}
	c.pageSize, c.pages = int64(meta.pageSize), meta.pages
	if err := c.tree(meta.root, bounds{}, 0, c.rootElement); err != nil {
		t.Fatal(err)
	}
	var out []int64
	for id := range c.seen {
		if at := int64(id) * c.pageSize; native.Uint64(b[at:]) == id {
			out = append(out, at)
		}
	}
	slices.Sort(out)
	return out
}

// Every flipped bit in the head of a page of the tree (its number, kind and
// number of elements), in the place of a record and in the number of a child is
// noticed. A branch's own keys may become lower without harm.
func TestCheckNoticesEveryFlippedBitOfTheStructure(t *testing.T) {
	good := churned(t, 800, false)
	pages := treePages(t, good)
	branches, leaves := 0, 0
	for _, at := range pages {
		offsets := []int64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}
		count := int64(native.Uint16(good[at+10:]))
		for _, i := range []int64{0, count - 1} {
			element := pageHeader + i*pageElement
			for b := range int64(pageElement) {
				if native.Uint16(good[at+8:]) == flagLeaf || b >= 8 {
					offsets = append(offsets, element+b)
				}
			}
		}
		if native.Uint16(good[at+8:]) == flagBranch {
			branches++
		} else if leaves++; leaves > 5 {
			continue
		}
		for _, offset := range offsets {
			for bit := range 8 {
				good[at+offset] ^= 1 << bit
				if err := check(good); err == nil {
					t.Errorf("page at %d, byte %d, bit %d: not noticed", at, offset, bit)
				}
				good[at+offset] ^= 1 << bit
			}
		}
	}
	if branches == 0 || leaves < 5 {
		t.Errorf("%d branches and %d leaves; the file is too simple for the test", branches, leaves)
	}
	if err := check(good); err != nil {
		t.Errorf("the test broke its own file: %v", err)
	}
}

// A page of an old transaction in the place of the present one is sound in
// itself; only the totals give it away.
func TestCheckNoticesAnOldPage(t *testing.T) {
	dir := t.TempDir()
	c := mustOpen(t, dir, map[string]string{"fsync": "false"})
	for i := range 2 {
		if err := c.set("k", fmt.Appendf(nil, "value %d", i)); err != nil {
			t.Fatal(err)
		}
	}
	s, ok := c.p.(*service).store.(*boltStore)
	if !ok {
		t.Fatal("not the bbolt driver")
	}
	// What an old page would do: a record that is valid and was replaced.
	err := s.db.Update(func(tx *bolt.Tx) error {
		k := encodeKey("b", []byte("k"))
		return tx.Bucket(dataBucket()).Put(k, encodeRecord(k, &record{version: 1, value: []byte("value 0")}))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.p.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	if err := check(b); err == nil {
		t.Error("an old record in the place of a new one is not noticed")
	}
}

// A record that is damaged and then overwritten leaves a file that is sound, and
// a forgotten expiry that must not take the new record with it.
func TestOverwritingADamagedRecordMendsTheFile(t *testing.T) {
	dir := t.TempDir()
	s, err := openBolt(boltOptions{dir: dir, verify: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	set := func(value string, expires int64) {
		t.Helper()
		w := &write{operation: opSet, bucket: "b", key: []byte("k"), value: []byte(value), now: 1, expires: expires}
		if err := s.write(t.Context(), w); err != nil {
			t.Fatal(err)
		}
	}
	set("old", 100)
	err = s.db.Update(func(tx *bolt.Tx) error {
		k := encodeKey("b", []byte("k"))
		v := bytes.Clone(tx.Bucket(dataBucket()).Get(k))
		v[crcOffset] ^= 1
		return tx.Bucket(dataBucket()).Put(k, v)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.get(t.Context(), provider.Call{Bucket: "b"}, []byte("k"), 1, encodeFound); err == nil {
		t.Error("the damage is not noticed")
	}
	set("new", 0)
	if _, err := s.sweep(t.Context(), 1000, 10); err != nil {
		t.Error(err)
	}
	if got, err := s.get(t.Context(), provider.Call{Bucket: "b"}, []byte("k"), 2000, encodeFound); err != nil || got == nil {
		t.Errorf("the new record was swept with the old one's expiry: %v", err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err == nil {
		err = check(b)
	}
	if err != nil {
		t.Errorf("the file afterwards: %v", err)
	}
}

// FuzzCheckFile changes a sound file in a few places: the check ends, takes a
// bounded amount of memory, and does not panic.
func FuzzCheckFile(f *testing.F) {
	good := churned(f, 400, true)
	f.Add([]byte{0, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 0x20, 10, 0xff, 0, 0, 0x20, 11, 0xff})
	f.Fuzz(func(t *testing.T, edits []byte) {
		b := bytes.Clone(good)
		for len(edits) >= 5 && len(edits) < 500 {
			b[int(binary.BigEndian.Uint32(edits))%len(b)] ^= edits[4]
			edits = edits[5:]
		}
		err := check(b)
		var c *corrupt
		if err != nil && !errors.As(err, &c) {
			t.Fatalf("a change of the content led to %v", err)
		}
	})
}

func TestCheckOfRandomAndTruncatedFiles(t *testing.T) {
	good := churned(t, 400, true)
	for n := 0; n < len(good)/2; n += 512 {
		if err := check(good[:n]); err == nil {
			t.Errorf("the first %d bytes pass", n)
		}
	}
	random := rand.New(rand.NewPCG(5, 6))
	for range 20 {
		noise := bytes.Clone(good)
		for i := 8192; i < len(noise); i++ {
			noise[i] = byte(random.Uint32())
		}
		if err := check(noise); err == nil {
			t.Error("noise passes")
		}
	}
}

// A page that is in use and free at once is overwritten some day; a child that
// holds keys of its neighbour hides them from every lookup. Neither changes any
// record.
func TestCheckNoticesDamageThatChangesNoRecord(t *testing.T) {
	good := churned(t, 800, false)
	reader := &checker{file: bytes.NewReader(good), size: int64(len(good)), seen: map[uint64]string{}, found: map[string]bucketFound{}}
	meta, err := reader.meta()
	if err != nil {
		t.Fatal(err)
	}
	pages := treePages(t, good)
	t.Run("a page in use is free", func(t *testing.T) {
		bad := bytes.Clone(good)
		at := int64(meta.freelist) * int64(meta.pageSize)
		if native.Uint16(bad[at+10:]) == 0 {
			t.Fatal("no page is free; the file is too simple for the test")
		}
		native.PutUint64(bad[at+pageHeader:], uint64(pages[0])/meta.pageSize)
		if err := check(bad); err == nil {
			t.Error("not noticed")
		}
	})
	t.Run("a key is in its neighbour's page", func(t *testing.T) {
		bad := bytes.Clone(good)
		for _, at := range pages {
			if native.Uint16(bad[at+8:]) != flagBranch || native.Uint16(bad[at+10:]) < 2 {
				continue
			}
			// The second child's key becomes lower than the first child's keys.
			second := at + pageHeader + pageElement
			start := second + int64(native.Uint32(bad[second:]))
			end := start + int64(native.Uint32(bad[second+4:]))
			first := at + pageHeader
			copy(bad[start:end], bad[first+int64(native.Uint32(bad[first:])):][:native.Uint32(bad[first+4:])])
			bad[end-1]++
			if err := check(bad); err == nil {
				t.Error("not noticed")
			}
			return
		}
		t.Fatal("no branch; the file is too simple for the test")
	})
}
