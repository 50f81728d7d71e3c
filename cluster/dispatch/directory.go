package dispatch

import (
	"sync"

	"github.com/hashicorp/go-memdb"
)

// directory wakes sessions by single records of a table that the registry lets
// one watch only as a whole. One follower keeps it in step, so a change costs one
// look at the table and wakes the sessions concerned, not one look a session.
type directory[R any] struct {
	id   func(R) string
	same func(a, b R) bool

	mu      sync.Mutex
	entries map[string]*entry[R]
	// removed is the index of the last view that lacked a record known before.
	removed uint64
	closed  chan struct{}
}

// entry is a record, or a place kept for one that somebody waits for.
type entry[R any] struct {
	record  R
	known   bool
	index   uint64
	changed chan struct{}
}

func newDirectory[R any](id func(R) string, same func(a, b R) bool) *directory[R] {
	closed := make(chan struct{})
	close(closed)
	return &directory[R]{id: id, same: same, entries: map[string]*entry[R]{}, closed: closed}
}

// sync takes up the table as of index and wakes those who watch what changed.
func (d *directory[R]) sync(index uint64, records []R) {
	d.mu.Lock()
	defer d.mu.Unlock()
	present := make(map[string]bool, len(records))
	for _, record := range records {
		id := d.id(record)
		present[id] = true
		had, ok := d.entries[id]
		if ok && had.known && d.same(had.record, record) {
			continue
		}
		if ok {
			close(had.changed)
		}
		d.entries[id] = &entry[R]{record: record, known: true, index: index, changed: make(chan struct{})}
	}
	for id, had := range d.entries {
		if had.known && !present[id] {
			d.removed = index
			close(had.changed)
			delete(d.entries, id)
		}
	}
}

// watch makes ws fire when a record changes after the view of the given index;
// it fires at once when that has happened.
func (d *directory[R]) watch(ws memdb.WatchSet, id string, index uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	had, ok := d.entries[id]
	switch {
	case !ok && d.removed > index:
		ws.Add(d.closed)
	case !ok:
		had = &entry[R]{changed: make(chan struct{})}
		d.entries[id] = had
		ws.Add(had.changed)
	case had.index > index:
		ws.Add(d.closed)
	default:
		ws.Add(had.changed)
	}
}
