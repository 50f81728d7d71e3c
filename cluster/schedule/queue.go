package schedule

import (
	"cmp"
	"container/heap"
)

// queue is a heap of the nodes with room for one kind of needs, best first: the
// fewest replicas of the same workload, then the lowest load, then the id. Placing
// on the first changes only its own rank, so the next of a thousand replicas costs
// the logarithm of the number of nodes.
type queue struct {
	needs   *needs
	entries []entry
}

// entry is a node with its rank.
type entry struct {
	load     *nodeLoad
	replicas int
	share    float64
}

func newQueue(t *table, n *needs) *queue {
	q := &queue{needs: n}
	for _, l := range t.candidatesFor(n) {
		if l.fits(n) {
			q.entries = append(q.entries, l.rank(n))
		}
	}
	heap.Init(q)
	return q
}

// rank returns what a node is compared by.
func (l *nodeLoad) rank(n *needs) entry {
	e := entry{load: l, share: l.load(n)}
	if n.slot {
		e.replicas = l.replicas[n.name]
	}
	return e
}

// first returns the best node, nil when none has room.
func (q *queue) first() *nodeLoad {
	if len(q.entries) == 0 {
		return nil
	}
	return q.entries[0].load
}

// charge places once more on the first node.
func (q *queue) charge() {
	l := q.entries[0].load
	l.charge(q.needs)
	if !l.fits(q.needs) {
		heap.Pop(q)
		return
	}
	q.entries[0] = l.rank(q.needs)
	heap.Fix(q, 0)
}

// Len implements heap.Interface.
func (q *queue) Len() int { return len(q.entries) }

// Less implements heap.Interface.
func (q *queue) Less(i, j int) bool {
	a, b := &q.entries[i], &q.entries[j]
	return cmp.Or(
		cmp.Compare(a.replicas, b.replicas),
		cmp.Compare(a.share, b.share),
		cmp.Compare(a.load.node.GetId(), b.load.node.GetId()),
	) < 0
}

// Swap implements heap.Interface.
func (q *queue) Swap(i, j int) { q.entries[i], q.entries[j] = q.entries[j], q.entries[i] }

// Push implements heap.Interface.
func (q *queue) Push(x any) {
	if e, ok := x.(entry); ok {
		q.entries = append(q.entries, e)
	}
}

// Pop implements heap.Interface.
func (q *queue) Pop() any {
	last := q.entries[len(q.entries)-1]
	q.entries = q.entries[:len(q.entries)-1]
	return last
}
