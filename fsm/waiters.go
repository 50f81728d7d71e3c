package fsm

// maxWaiters bounds how many distinct future indexes are waited for exactly. A
// client can name any index and go away, so the table must not grow with what
// clients ask; past the bound a waiter is woken by the next change instead.
const maxWaiters = 1024

// waiters wakes those who wait for an index. It is guarded by the State's lock.
type waiters struct {
	byIndex map[uint64]chan struct{}
	next    chan struct{}
	closed  chan struct{}
}

func newWaiters() waiters {
	closed := make(chan struct{})
	close(closed)
	return waiters{byIndex: map[uint64]chan struct{}{}, closed: closed}
}

// wait returns a channel that is closed once an index greater than after is
// applied.
func (w *waiters) wait(current, after uint64) <-chan struct{} {
	if current > after {
		return w.closed
	}
	if ch, ok := w.byIndex[after]; ok {
		return ch
	}
	if after != current && len(w.byIndex) >= maxWaiters {
		if w.next == nil {
			w.next = make(chan struct{})
		}
		return w.next
	}
	ch := make(chan struct{})
	w.byIndex[after] = ch
	return ch
}

// wake wakes those whose index is passed, or everybody.
func (w *waiters) wake(current uint64, everybody bool) {
	for after, ch := range w.byIndex {
		if everybody || current > after {
			close(ch)
			delete(w.byIndex, after)
		}
	}
	if w.next != nil {
		close(w.next)
		w.next = nil
	}
}
