package dispatch

import (
	"container/heap"
	"errors"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/plant"
)

var (
	// errNoLease: the leader knows no living lease of this node.
	errNoLease = errors.New("the node has no lease")
	// errOtherEpoch: the node's lease belongs to another epoch.
	errOtherEpoch = errors.New("the node has registered again")
	// errExpired: the lease ran out and its end is being committed.
	errExpired = errors.New("the lease has run out")
)

// holder names a lease.
type holder struct {
	node  string
	epoch uint64
}

// lease is one node's lease. Its place in the queue is by due, which is never
// after deadline: a renewal moves only deadline, and the lease is put back when
// its turn comes. So a renewal costs no more than a look into a map.
type lease struct {
	holder
	// index is that of the registry in which the node was seen with this epoch.
	// It, and not the epoch, tells what is newer: a restored snapshot takes epochs back.
	index    uint64
	deadline time.Time
	due      time.Time
	// expiring is true once the leader has decided to end it; no renewal counts then.
	expiring bool
	position int
}

// leases are the leases of all nodes during one term.
type leases struct {
	mu     sync.Mutex
	byNode map[string]*lease
	queue  leaseQueue
	// sooner gets a value when the first turn in the queue may have become earlier.
	sooner chan struct{}
}

func newLeases() *leases {
	return &leases{byNode: map[string]*lease{}, sooner: make(chan struct{}, 1)}
}

// grant gives a node the lease of a registration committed at index, or extends
// the one of this epoch. It fails when a later registration or the end of this
// epoch came first.
func (l *leases) grant(h holder, index uint64, deadline time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if had, ok := l.byNode[h.node]; ok {
		switch {
		case had.epoch == h.epoch && had.expiring:
			return errExpired
		case had.epoch == h.epoch:
			had.extend(deadline)
			had.index = max(had.index, index)
			return nil
		case had.index > index:
			return errOtherEpoch
		}
	}
	l.replace(&lease{holder: h, index: index, deadline: deadline, due: deadline})
	return nil
}

// adopt gives a node that the registry shows alive at index a lease, unless it
// has one of this epoch or of a later index.
func (l *leases) adopt(h holder, index uint64, deadline time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if had, ok := l.byNode[h.node]; ok && (had.epoch == h.epoch || had.index > index) {
		return
	}
	l.replace(&lease{holder: h, index: index, deadline: deadline, due: deadline})
}

// renew extends a lease; the error says why it cannot.
func (l *leases) renew(h holder, deadline time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	had, ok := l.byNode[h.node]
	switch {
	case plant.On(plant.RenewExpired) && (!ok || had.expiring):
		return nil
	case !ok:
		return errNoLease
	case had.epoch != h.epoch:
		return errOtherEpoch
	case had.expiring:
		return errExpired
	}
	had.extend(deadline)
	return nil
}

// drop forgets the lease of a node that the registry does not show alive at index.
func (l *leases) drop(nodeID string, index uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if had, ok := l.byNode[nodeID]; ok && had.index <= index {
		l.remove(had)
	}
}

// expire returns the leases that have run out by now and marks them so. When
// there are none, next is when to look again; it is zero when no lease is held.
func (l *leases) expire(now time.Time) (due []holder, next time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) > 0 && !l.queue[0].due.After(now) {
		first := l.queue[0]
		if first.deadline.After(now) {
			first.due = first.deadline
			heap.Fix(&l.queue, 0)
			continue
		}
		heap.Pop(&l.queue)
		first.expiring = true
		due = append(due, first.holder)
	}
	if len(l.queue) > 0 {
		next = l.queue[0].due
	}
	return due, next
}

// overdue returns for how long a look at the first lease in the queue has been due.
func (l *leases) overdue(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		return 0
	}
	return now.Sub(l.queue[0].due)
}

// retry queues a lease again whose end could not be committed.
func (l *leases) retry(h holder, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if had, ok := l.byNode[h.node]; ok && had.epoch == h.epoch && had.position < 0 {
		had.deadline, had.due = at, at
		l.push(had)
	}
}

// forgive gives every lease that has not ended at least until deadline.
func (l *leases) forgive(deadline time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, had := range l.queue {
		if !had.expiring {
			had.extend(deadline)
		}
	}
}

func (l *leases) replace(next *lease) {
	if had, ok := l.byNode[next.node]; ok {
		l.remove(had)
	}
	l.byNode[next.node] = next
	l.push(next)
}

func (l *leases) push(had *lease) {
	heap.Push(&l.queue, had)
	if had.position == 0 {
		select {
		case l.sooner <- struct{}{}:
		default:
		}
	}
}

func (l *leases) remove(had *lease) {
	delete(l.byNode, had.node)
	if had.position >= 0 {
		heap.Remove(&l.queue, had.position)
	}
}

func (had *lease) extend(deadline time.Time) {
	if deadline.After(had.deadline) {
		had.deadline = deadline
	}
}

// leaseQueue is a heap by due.
type leaseQueue []*lease

func (q leaseQueue) Len() int           { return len(q) }
func (q leaseQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q leaseQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].position, q[j].position = i, j
}

// Push implements heap.Interface.
func (q *leaseQueue) Push(x any) {
	if had, ok := x.(*lease); ok {
		had.position = len(*q)
		*q = append(*q, had)
	}
}

// Pop implements heap.Interface.
func (q *leaseQueue) Pop() any {
	last := len(*q) - 1
	had := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	had.position = -1
	return had
}
