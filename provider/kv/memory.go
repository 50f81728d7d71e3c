package kv

import (
	"cmp"
	"context"
	"strings"
	"sync"

	"github.com/google/btree"

	"github.com/wasmatrix/wasmatrix/provider"
)

// itemOverhead is what an entry costs beside its key and value, in bytes: the
// item, its places in the map and in the trees.
const itemOverhead = 192

const treeDegree = 32

// memory is the driver that keeps everything in memory.
type memory struct {
	limit int64

	mu      sync.RWMutex
	fence   provider.Fence
	used    int64
	version uint64
	buckets map[string]*memoryBucket
	expiry  *btree.BTreeG[*item] // items that expire, the first first
}

type memoryBucket struct {
	items map[string]*item
	order *btree.BTreeG[*item] // by key
}

// item is one key. A change makes a new one, so that its value can be read
// outside the lock.
type item struct {
	bucket  string
	key     string
	value   []byte
	version uint64
	expires int64
}

func (i *item) size() int64 { return int64(len(i.key)+len(i.value)) + itemOverhead }

func (i *item) alive(now int64) bool { return i.expires == 0 || i.expires > now }

func newMemory(limit int64) *memory {
	return &memory{
		limit:   limit,
		buckets: map[string]*memoryBucket{},
		expiry: btree.NewG(treeDegree, func(a, b *item) bool {
			return cmp.Or(cmp.Compare(a.expires, b.expires), strings.Compare(a.bucket, b.bucket), strings.Compare(a.key, b.key)) < 0
		}),
	}
}

func (m *memory) find(bucket string, key []byte) *item {
	b, ok := m.buckets[bucket]
	if !ok {
		return nil
	}
	return b.items[string(key)]
}

// admit refuses a call of a superseded generation, or one whose time is up. The
// lock is held until its effect.
func (m *memory) admit(call *provider.Call) error {
	if newest := m.fence.Seen(call.Instance); call.Mark().Before(newest) {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	return call.Admit()
}

// admitAndRaise is admit for who holds the lock for writing.
func (m *memory) admitAndRaise(call *provider.Call) error {
	newest, mark := m.fence.Seen(call.Instance), call.Mark()
	if mark.Before(newest) {
		return provider.Superseded(call.Instance, mark, newest)
	}
	if err := call.Admit(); err != nil {
		return err
	}
	if newest.Before(mark) {
		m.fence.Raise(call.Instance, mark)
	}
	return nil
}

// enter admits a read and holds the lock for it. It must be left with RUnlock,
// also on an error.
func (m *memory) enter(call *provider.Call) error {
	m.mu.RLock()
	if m.fence.Seen(call.Instance) == call.Mark() {
		return call.Admit()
	}
	m.mu.RUnlock()
	m.mu.Lock()
	err := m.admitAndRaise(call)
	m.mu.Unlock()
	m.mu.RLock()
	if err != nil {
		return err
	}
	return m.admit(call)
}

func (m *memory) get(_ context.Context, call provider.Call, key []byte, now int64, encode func([]byte, uint64) []byte) ([]byte, error) {
	var i *item
	err := m.enter(&call)
	if err == nil {
		i = m.find(call.Bucket, key)
	}
	m.mu.RUnlock()
	if err != nil {
		return nil, err
	}
	if i == nil || !i.alive(now) {
		return nil, nil
	}
	return encode(i.value, i.version), nil
}

func (m *memory) write(_ context.Context, w *write) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.admitAndRaise(&w.call); err != nil {
		return err
	}
	old := m.find(w.bucket, w.key)
	current := uint64(0)
	if old != nil && old.alive(w.now) {
		current = old.version
	}
	if w.operation == opDelete {
		w.done = current != 0
		if old != nil {
			m.remove(old)
		}
		return nil
	}
	if !w.put(current) {
		return nil
	}
	next := &item{bucket: w.bucket, key: string(w.key), value: w.value, version: m.version + 1, expires: w.expires}
	used := m.used + next.size()
	if old != nil {
		used -= old.size()
	}
	if used > m.limit {
		return provider.Errorf(provider.ErrExhausted, "the key-value provider holds its %d bytes", m.limit).
			NextStep("delete keys, or raise its max_bytes setting")
	}
	if old != nil {
		m.remove(old)
	}
	m.version++
	w.version = m.version
	m.insert(next)
	return nil
}

func (m *memory) insert(i *item) {
	b, ok := m.buckets[i.bucket]
	if !ok {
		b = &memoryBucket{
			items: map[string]*item{},
			order: btree.NewG(treeDegree, func(a, b *item) bool { return a.key < b.key }),
		}
		m.buckets[i.bucket] = b
	}
	b.items[i.key] = i
	b.order.ReplaceOrInsert(i)
	if i.expires != 0 {
		m.expiry.ReplaceOrInsert(i)
	}
	m.used += i.size()
}

func (m *memory) remove(i *item) {
	b := m.buckets[i.bucket]
	delete(b.items, i.key)
	b.order.Delete(i)
	if i.expires != 0 {
		m.expiry.Delete(i)
	}
	if len(b.items) == 0 {
		delete(m.buckets, i.bucket)
	}
	m.used -= i.size()
}

func (m *memory) list(_ context.Context, call provider.Call, now int64, p *page) error {
	err := m.enter(&call)
	defer m.mu.RUnlock()
	if err != nil {
		return err
	}
	b, ok := m.buckets[call.Bucket]
	if !ok {
		return nil
	}
	b.order.AscendGreaterOrEqual(&item{key: string(p.seek())}, func(i *item) bool {
		return p.visit([]byte(i.key), i.value, i.version, i.alive(now))
	})
	return nil
}

func (m *memory) sweep(_ context.Context, now int64, limit int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range limit {
		first, ok := m.expiry.Min()
		if !ok || first.alive(now) {
			return n, nil
		}
		m.remove(first)
	}
	return limit, nil
}

func (m *memory) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.buckets = nil
	return nil
}
