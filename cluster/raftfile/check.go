package raftfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/bits"
)

// The layout of a bbolt file, format version 2, in the byte order of the machine.
const (
	magic          = 0xED0CDAED
	formatVersion  = 2
	pageHeaderSize = 16
	metaSize       = 64
	elementSize    = 16
	bucketSize     = 16
	noFreelist     = ^uint64(0)
	flagBranch     = 0x01
	flagLeaf       = 0x02
	flagMeta       = 0x04
	flagBucket     = 0x01
	// maxDepth is more than a tree of any size that fits on a disk has.
	maxDepth = 48
)

// checker reads a whole file without trusting anything in it. It reads each page
// once, so it ends, and it holds at most one path of pages in memory.
type checker struct {
	file     io.ReaderAt
	size     int64
	pageSize int64
	pages    uint64 // the high-water mark of page numbers
	seen     []uint64
	visit    func(bucket string, key, value []byte) error
}

// meta is a meta page.
type meta struct {
	pageSize       uint32
	root, sequence uint64
	freelist       uint64
	pages          uint64
	tx             uint64
}

// check reads the file and calls visit with everything in its buckets, in order.
// It returns the number of the transaction that the file is of.
func check(file io.ReaderAt, size int64, visit func(bucket string, key, value []byte) error) (tx uint64, err error) {
	c := &checker{file: file, size: size, visit: visit}
	newest, err := c.metas()
	if err != nil {
		return 0, err
	}
	c.pageSize, c.pages = int64(newest.pageSize), newest.pages
	if c.pages > uint64(size/c.pageSize) {
		return 0, fmt.Errorf("the file has %d bytes and %d pages of %d bytes: its end is missing", size, c.pages, c.pageSize)
	}
	c.seen = make([]uint64, c.pages/64+1)
	var found []string
	err = c.tree(newest.root, func(flags uint32, key, value []byte) error {
		if flags != flagBucket {
			return fmt.Errorf("%q is not a bucket", key)
		}
		name := string(key)
		found = append(found, name)
		return c.bucket(name, value)
	})
	if err != nil {
		return 0, err
	}
	// In the order of their names.
	if want := []string{string(bucketConf), string(bucketHead), string(bucketLogs)}; fmt.Sprint(found) != fmt.Sprint(want) {
		return 0, fmt.Errorf("the file has the buckets %q, want %q", found, want)
	}
	return newest.tx, nil
}

// metas reads both meta pages and returns the newer one.
func (c *checker) metas() (meta, error) {
	first, err := c.meta(0, 0)
	if err != nil {
		return meta{}, err
	}
	second, err := c.meta(1, int64(first.pageSize))
	if err != nil {
		return meta{}, err
	}
	if first.pageSize != second.pageSize {
		return meta{}, errors.New("the meta pages differ in the size of pages")
	}
	newer, older := first, second
	if second.tx > first.tx {
		newer, older = second, first
	}
	if newer.tx != older.tx+1 {
		return meta{}, fmt.Errorf("the meta pages are of the transactions %d and %d: a write in between is missing", older.tx, newer.tx)
	}
	if newer.freelist != noFreelist {
		return meta{}, errors.New("the meta page names a free list")
	}
	return newer, nil
}

func (c *checker) meta(page uint64, at int64) (meta, error) {
	raw := make([]byte, pageHeaderSize+metaSize)
	if err := c.read(raw, at); err != nil {
		return meta{}, fmt.Errorf("meta page %d: %w", page, err)
	}
	order := binary.NativeEndian
	m := raw[pageHeaderSize:]
	sum := fnv.New64a()
	_, _ = sum.Write(m[:56])
	out := meta{
		pageSize: order.Uint32(m[8:]), root: order.Uint64(m[16:]), sequence: order.Uint64(m[24:]),
		freelist: order.Uint64(m[32:]), pages: order.Uint64(m[40:]), tx: order.Uint64(m[48:]),
	}
	switch {
	case order.Uint64(raw) != page || order.Uint16(raw[8:]) != flagMeta:
		return meta{}, fmt.Errorf("meta page %d: it is another page", page)
	case order.Uint32(m) != magic || order.Uint32(m[4:]) != formatVersion:
		return meta{}, fmt.Errorf("meta page %d: it is not of this format", page)
	case order.Uint64(m[56:]) != sum.Sum64():
		return meta{}, fmt.Errorf("meta page %d: its checksum does not match", page)
	case out.pageSize < 1024 || out.pageSize > 1<<24 || bits.OnesCount32(out.pageSize) != 1:
		return meta{}, fmt.Errorf("meta page %d: pages of %d bytes", page, out.pageSize)
	case out.tx%2 != page:
		return meta{}, fmt.Errorf("meta page %d: it is of transaction %d", page, out.tx)
	}
	return out, nil
}

// bucket walks one bucket, which lies in pages of its own or in its value.
func (c *checker) bucket(name string, value []byte) error {
	if len(value) < bucketSize {
		return fmt.Errorf("bucket %s: its header is cut off", name)
	}
	order := binary.NativeEndian
	root := order.Uint64(value)
	if order.Uint64(value[8:]) != 0 {
		return fmt.Errorf("bucket %s: it has a sequence", name)
	}
	visit := func(flags uint32, key, value []byte) error {
		if flags != 0 {
			return fmt.Errorf("bucket %s: flags %x", name, flags)
		}
		return c.visit(name, key, value)
	}
	if root != 0 {
		if err := c.tree(root, visit); err != nil {
			return fmt.Errorf("bucket %s: %w", name, err)
		}
		return nil
	}
	inline := value[bucketSize:]
	if len(inline) < pageHeaderSize || order.Uint16(inline[8:]) != flagLeaf {
		return fmt.Errorf("bucket %s: its page is cut off", name)
	}
	if err := leaf(inline, bounds{}, visit); err != nil {
		return fmt.Errorf("bucket %s: %w", name, err)
	}
	return nil
}

// bounds are the least key that may be in a page, and the first that may not; nil for none.
type bounds struct{ from, below []byte }

func (b bounds) hold(key []byte) bool {
	return bytes.Compare(key, b.from) >= 0 && (b.below == nil || bytes.Compare(key, b.below) < 0)
}

func (c *checker) tree(root uint64, visit func(flags uint32, key, value []byte) error) error {
	return c.walk(root, bounds{}, 0, visit)
}

func (c *checker) walk(id uint64, within bounds, depth int, visit func(flags uint32, key, value []byte) error) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: the tree is deeper than %d", id, maxDepth)
	}
	page, err := c.page(id)
	if err != nil {
		return err
	}
	switch flags := binary.NativeEndian.Uint16(page[8:]); flags {
	case flagLeaf:
		err = leaf(page, within, visit)
	case flagBranch:
		err = c.branch(page, within, depth, visit)
	default:
		err = fmt.Errorf("flags %x", flags)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// page reads a page with its overflow.
func (c *checker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.pages {
		return nil, fmt.Errorf("page %d: there are %d pages", id, c.pages)
	}
	header := make([]byte, pageHeaderSize)
	if err := c.read(header, int64(id)*c.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	order := binary.NativeEndian
	if got := order.Uint64(header); got != id {
		return nil, fmt.Errorf("page %d: it says that it is page %d", id, got)
	}
	overflow := uint64(order.Uint32(header[12:]))
	if overflow >= c.pages-id {
		return nil, fmt.Errorf("page %d: it reaches beyond the end of the file", id)
	}
	for i := id; i <= id+overflow; i++ {
		if c.seen[i/64]&(1<<(i%64)) != 0 {
			return nil, fmt.Errorf("page %d: it is used twice", i)
		}
		c.seen[i/64] |= 1 << (i % 64)
	}
	out := make([]byte, int64(overflow+1)*c.pageSize)
	if err := c.read(out, int64(id)*c.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return out, nil
}

func (c *checker) branch(page []byte, within bounds, depth int, visit func(flags uint32, key, value []byte) error) error {
	order := binary.NativeEndian
	count := int(order.Uint16(page[10:]))
	if count == 0 || pageHeaderSize+count*elementSize > len(page) {
		return fmt.Errorf("a branch of %d", count)
	}
	keys := make([][]byte, count)
	for i := range count {
		at := pageHeaderSize + i*elementSize
		key, ok := piece(page, at, count, order.Uint32(page[at:]), order.Uint32(page[at+4:]))
		if !ok || !within.hold(key) || i > 0 && bytes.Compare(keys[i-1], key) >= 0 {
			return fmt.Errorf("branch element %d of %d is out of place", i, count)
		}
		keys[i] = key
	}
	for i := range count {
		below := within.below
		if i+1 < count {
			below = keys[i+1]
		}
		child := order.Uint64(page[pageHeaderSize+i*elementSize+8:])
		if err := c.walk(child, bounds{from: keys[i], below: below}, depth+1, visit); err != nil {
			return err
		}
	}
	return nil
}

func leaf(page []byte, within bounds, visit func(flags uint32, key, value []byte) error) error {
	order := binary.NativeEndian
	count := int(order.Uint16(page[10:]))
	if pageHeaderSize+count*elementSize > len(page) {
		return fmt.Errorf("a leaf of %d", count)
	}
	var last []byte
	for i := range count {
		at := pageHeaderSize + i*elementSize
		pos, keySize, valueSize := order.Uint32(page[at+4:]), order.Uint32(page[at+8:]), order.Uint32(page[at+12:])
		key, ok := piece(page, at, count, pos, keySize)
		value, alsoOk := piece(page, at, count, pos+keySize, valueSize)
		if !ok || !alsoOk || uint64(pos)+uint64(keySize) > 1<<32-1 || !within.hold(key) || i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("leaf element %d of %d is out of place", i, count)
		}
		last = key
		if err := visit(order.Uint32(page[at:]), key, value); err != nil {
			return err
		}
	}
	return nil
}

// piece returns size bytes that begin pos bytes after the element at at, behind all elements.
func piece(page []byte, at, count int, pos, size uint32) ([]byte, bool) {
	from := uint64(at) + uint64(pos)
	to := from + uint64(size)
	if from < uint64(pageHeaderSize+count*elementSize) || to > uint64(len(page)) {
		return nil, false
	}
	return page[from:to:to], true
}

func (c *checker) read(into []byte, at int64) error {
	if at+int64(len(into)) > c.size {
		return fmt.Errorf("the file ends at %d", c.size)
	}
	if _, err := c.file.ReadAt(into, at); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(into), at, err)
	}
	return nil
}
