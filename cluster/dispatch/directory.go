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
	closed  chan struct{}
}

// entry is a record, or a place kept for one that somebody waits for.
type entry[R any] struct {
	record  R
	known   bool
	changed chan struct{}
}

func newDirectory[R any](id func(R) string, same func(a, b R) bool) *directory[R] {
	closed := make(chan struct{})
	close(closed)
	return &directory[R]{id: id, same: same, entries: map[string]*entry[R]{}, closed: closed}
}

// sync takes up the table and wakes those who watch what changed.
func (d *directory[R]) sync(records []R) {
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
		d.entries[id] = &entry[R]{record: record, known: true, changed: make(chan struct{})}
	}
	for id, had := range d.entries {
		if had.known && !present[id] {
			close(had.changed)
			delete(d.entries, id)
		}
	}
}

// watch makes ws fire when a record is not what the caller has seen any more;
// known is false for one that it has not seen. When the directory holds another
// one, one of the two is behind for a moment, and ws fires at once so that the
// caller looks again: an index could not tell which, because a restored snapshot
// takes the index back.
func (d *directory[R]) watch(ws memdb.WatchSet, id string, seen R, known bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	had, ok := d.entries[id]
	if !ok {
		had = &entry[R]{changed: make(chan struct{})}
		d.entries[id] = had
	}
	if had.known != known || known && !d.same(had.record, seen) {
		ws.Add(d.closed)
		return
	}
	ws.Add(had.changed)
}
