package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"strconv"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The layout of a bbolt file (https://github.com/etcd-io/bbolt, internal/common,
// format 2), in the machine's byte order: a page is a header and its elements.
// bbolt's own check runs in a goroutine that a damaged page number crashes, with
// the whole process, and it does not notice a page that lost its last elements.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader  = 16 // id uint64, flags uint16, count uint16, overflow uint32
	pageElement = 16 // branch: pos, ksize uint32, page uint64; leaf: flags, pos, ksize, vsize uint32
	bucketValue = 16 // root page uint64, sequence uint64; then, if root is 0, the bucket's only page
	metaSum     = 56 // where a meta page's checksum stands, behind the header

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element

	minPageSize, maxPageSize = 1 << 10, 1 << 16
	maxDepth                 = 32 // of the tree; at two keys a page that is 4 G pages
)

var native = binary.NativeEndian

// checker reads a whole file and finds out whether it is what was written: the
// structure of its pages, the checksum of each record, and that no record is
// missing. It holds a page a level of the tree, and trusts no number in the file.
type checker struct {
	file     io.ReaderAt
	size     int64
	pageSize int64
	pages    uint64            // the number of pages in use or once used
	seen     map[uint64]string // what each page is part of
	found    map[string]bucketFound
}

// bucketFound is one of the file's buckets.
type bucketFound struct {
	sequence uint64
	totals   totals // of the data and the fences bucket
	stored   []byte // the record of the totals in the totals bucket
}

// boltMeta is what a meta page says.
type boltMeta struct {
	pageSize, root, freelist, pages, txid uint64
}

// corrupt is what a check found wrong.
type corrupt struct{ why, record string }

func (c *corrupt) Error() string { return c.why }

func corruptf(format string, args ...any) error { return &corrupt{why: fmt.Sprintf(format, args...)} }

// checkFile checks a bbolt file that holds our buckets. Nothing may write to it
// meanwhile.
func checkFile(file io.ReaderAt, size int64) error {
	c := &checker{file: file, size: size, seen: map[uint64]string{}, found: map[string]bucketFound{}}
	meta, err := c.meta()
	if err != nil {
		return err
	}
	c.pageSize, c.pages = int64(meta.pageSize), meta.pages //nolint:gosec // at most maxPageSize
	for id := range uint64(2) {
		c.seen[id] = "a meta page"
	}
	if err := c.freelist(meta.freelist); err != nil {
		return err
	}
	if err := c.tree(meta.root, bounds{}, 0, c.rootElement); err != nil {
		return err
	}
	return c.compare()
}

// meta returns the valid meta page of the last transaction. When the other one
// is damaged too, it may be that of the one before.
func (c *checker) meta() (boltMeta, error) {
	var best boltMeta
	for size := int64(minPageSize); size <= maxPageSize; size *= 2 {
		for _, at := range []int64{0, size} {
			var b [pageHeader + metaSum + 8]byte
			if _, err := c.file.ReadAt(b[:], at); err != nil {
				continue // shorter than that
			}
			m := b[pageHeader:]
			sum := fnv.New64a()
			_, _ = sum.Write(m[:metaSum]) // never fails
			if native.Uint32(m) != boltMagic || native.Uint32(m[4:]) != boltVersion || native.Uint64(m[metaSum:]) != sum.Sum64() {
				continue
			}
			found := boltMeta{
				pageSize: uint64(native.Uint32(m[8:])), root: native.Uint64(m[16:]),
				freelist: native.Uint64(m[32:]), pages: native.Uint64(m[40:]), txid: native.Uint64(m[48:]),
			}
			if found.pageSize == uint64(size) && (best.pageSize == 0 || found.txid > best.txid) { //nolint:gosec // positive
				best = found
			}
		}
	}
	if best.pageSize == 0 {
		return boltMeta{}, corruptf("it has no valid head")
	}
	return best, nil
}

// page reads a page with its overflow, which belong to nothing else.
func (c *checker) page(id uint64, owner string) (page []byte, flags, count uint16, err error) {
	inFile := min(c.pages, uint64(c.size/c.pageSize)) //nolint:gosec // never negative
	if id < 2 || id >= inFile {
		return nil, 0, 0, corruptf("%s names page %d of %d", owner, id, inFile)
	}
	var head [pageHeader]byte
	if _, err := c.file.ReadAt(head[:], int64(id)*c.pageSize); err != nil { //nolint:gosec // below pages
		return nil, 0, 0, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(native.Uint32(head[12:]))
	if got := native.Uint64(head[:]); got != id || overflow >= inFile-id {
		return nil, 0, 0, corruptf("page %d calls itself %d and has %d more of %d", id, got, overflow, inFile)
	}
	for n := id; n <= id+overflow; n++ {
		if other, taken := c.seen[n]; taken {
			return nil, 0, 0, corruptf("page %d is part of %s and of %s", n, other, owner)
		}
		c.seen[n] = owner
	}
	page = make([]byte, int64(overflow+1)*c.pageSize)                    //nolint:gosec // within the file
	if _, err := c.file.ReadAt(page, int64(id)*c.pageSize); err != nil { //nolint:gosec // below pages
		return nil, 0, 0, fmt.Errorf("read page %d: %w", id, err)
	}
	return page, native.Uint16(page[8:]), native.Uint16(page[10:]), nil
}

// freelist notes the free pages, so that none can be part of the tree as well.
func (c *checker) freelist(id uint64) error {
	b, flags, short, err := c.page(id, "the list of free pages")
	if err != nil {
		return err
	}
	ids, count := b[pageHeader:], uint64(short)
	if short == 0xFFFF { // too many for the header
		count, ids = native.Uint64(ids), ids[8:]
	}
	if flags != flagFreelist || count > uint64(len(ids)/8) {
		return corruptf("page %d is no list of free pages", id)
	}
	for i := range count {
		free := native.Uint64(ids[i*8:])
		if other, taken := c.seen[free]; taken || free >= c.pages {
			return corruptf("page %d of %d is free and part of %s", free, c.pages, other)
		}
		c.seen[free] = "the free pages"
	}
	return nil
}

// bounds are what the keys of a page must lie between: from the first, which may
// be it, to the last, which may not. Nil is no bound.
type bounds struct{ from, to []byte }

// element is one entry of a leaf.
type element struct {
	flags      uint32
	key, value []byte
}

func (c *checker) tree(id uint64, in bounds, depth int, visit func(element) error) error {
	if depth > maxDepth {
		return corruptf("the tree is deeper than %d pages", maxDepth)
	}
	b, flags, count, err := c.page(id, "the tree")
	if err != nil {
		return err
	}
	if flags == flagLeaf {
		return leaf(b, count, in, visit)
	}
	if flags != flagBranch || count == 0 {
		return corruptf("page %d with %d elements is of no kind that belongs into the tree", id, count)
	}
	keys, children := make([][]byte, count), make([]uint64, count)
	for i := range count {
		at := pageHeader + int(i)*pageElement
		if at+pageElement > len(b) {
			return corruptf("page %d has no room for %d elements", id, count)
		}
		children[i] = native.Uint64(b[at+8:])
		if keys[i], _, err = slots(b, at, native.Uint32(b[at:]), native.Uint32(b[at+4:]), 0); err != nil {
			return err
		}
	}
	for i := range keys {
		next := in.to
		if i+1 < len(keys) {
			next = keys[i+1]
		}
		if err := inOrder(keys[i], bounds{in.from, next}); err != nil {
			return err
		}
		if err := c.tree(children[i], bounds{keys[i], next}, depth+1, visit); err != nil {
			return err
		}
	}
	return nil
}

// leaf visits the elements of a leaf page.
func leaf(b []byte, count uint16, in bounds, visit func(element) error) error {
	for i := range int(count) {
		at := pageHeader + i*pageElement
		if at+pageElement > len(b) {
			return corruptf("a page has no room for %d elements", count)
		}
		key, value, err := slots(b, at, native.Uint32(b[at+4:]), native.Uint32(b[at+8:]), native.Uint32(b[at+12:]))
		if err == nil {
			err = inOrder(key, in)
		}
		if err == nil {
			err = visit(element{flags: native.Uint32(b[at:]), key: key, value: value})
		}
		if err != nil {
			return err
		}
		in.from = append(bytes.Clone(key), 0) // the next must be higher
	}
	return nil
}

// slots returns the key and the value that an element at some place of a page points to.
func slots(b []byte, at int, pos, ksize, vsize uint32) (key, value []byte, err error) {
	start := uint64(at) + uint64(pos) //nolint:gosec // an index
	end := start + uint64(ksize) + uint64(vsize)
	if ksize == 0 || end > uint64(len(b)) {
		return nil, nil, corruptf("an element lies outside its page")
	}
	return b[start : start+uint64(ksize)], b[start+uint64(ksize) : end], nil
}

func inOrder(key []byte, in bounds) error {
	if in.from != nil && bytes.Compare(key, in.from) < 0 || in.to != nil && bytes.Compare(key, in.to) >= 0 {
		return &corrupt{why: "its keys are out of order", record: strconv.Quote(string(key))}
	}
	return nil
}

// rootElement walks one bucket.
func (c *checker) rootElement(e element) error {
	if e.flags != flagBucket || len(e.value) < bucketValue {
		return corruptf("%q is no bucket", e.key)
	}
	root, name := native.Uint64(e.value), string(e.key)
	b := bucketFound{sequence: native.Uint64(e.value[8:])}
	visit := func(element) error { return nil }
	switch name {
	case string(dataBucket()):
		visit = b.record
	case string(fencesBucket()):
		visit = func(e element) error {
			if _, ok := decodeMark(e.key, e.value); !ok || e.flags != 0 {
				return &corrupt{why: "a fence does not match its checksum", record: strconv.Quote(string(e.key))}
			}
			b.totals.add(e.value)
			return nil
		}
	case string(totalsBucket()):
		visit = func(e element) error {
			b.stored = bytes.Clone(e.value)
			return nil
		}
	}
	var err error
	if root != 0 {
		err = c.tree(root, bounds{}, 1, visit)
	} else if inline := e.value[bucketValue:]; len(inline) < pageHeader || native.Uint16(inline[8:]) != flagLeaf {
		err = corruptf("bucket %q has no page", name)
	} else {
		err = leaf(inline, native.Uint16(inline[10:]), bounds{}, visit)
	}
	c.found[name] = b
	return err
}

func (b *bucketFound) record(e element) error {
	r, ok := decodeRecord(e.key, e.value)
	if !ok || e.flags != 0 || r.version > b.sequence {
		return &corrupt{why: "a record does not match its checksum", record: strconv.Quote(string(e.key))}
	}
	b.totals.add(e.value)
	return nil
}

// compare holds what was found to what was stored about the whole.
func (c *checker) compare() error {
	if len(c.found) == 0 {
		return nil // a new file
	}
	for _, name := range [][]byte{dataBucket(), expiryBucket(), totalsBucket()} {
		if _, ok := c.found[string(name)]; !ok {
			return corruptf("it has no bucket %q", name)
		}
	}
	want, ok := decodeTotals(c.found[string(totalsBucket())].stored)
	got := c.found[string(dataBucket())].totals
	marks := c.found[string(fencesBucket())].totals
	got.count, got.sum = got.count+marks.count, got.sum+marks.sum
	if !ok || got != want {
		return corruptf("it holds %d records where %d are expected, or others than were written", got.count, want.count)
	}
	return nil
}

// checkError gives what a check found our shape.
func checkError(path string, err error) error {
	if c, ok := err.(*corrupt); ok { //nolint:errorlint // checkFile returns it unwrapped
		e := damaged(path, c.why)
		if c.record != "" {
			e = e.With("record", c.record)
		}
		return e
	}
	if err != nil {
		return provider.Errorf(provider.ErrInternal, "%s cannot be read: %s", path, err).With("file", path).
			NextStep("check the disk: dmesg | tail").Because(err)
	}
	return nil
}
