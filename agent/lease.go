package agent

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"
)

// errLeaseEnded is the cause of contexts that ended with the lease.
var errLeaseEnded = errors.New("the node's lease has ended")

// leaseMarginShare is the part of the TTL that the agent gives up, so that its
// own deadline comes before the leader's even when the clocks drift.
const leaseMarginShare = 0.1

// lease is the node's own view of how long its epoch lives. A renewal counts
// from when it was sent, so the own deadline is always earlier than the leader's.
type lease struct {
	clock func() time.Duration
	// always is true in standalone mode: there is no one to lose the lease to.
	always bool
	// changed is called without locks after the lease was lost or came back.
	changed func()

	mu       sync.Mutex
	of       uint64 // the epoch
	deadline time.Duration
	ttl      time.Duration
	held     bool
	renewed  chan struct{} // closed and replaced with each renewal
	nextCall uint64
	calls    map[uint64]context.CancelCauseFunc // contexts that end with the lease
}

func newLease(clock func() time.Duration, always bool, changed func()) *lease {
	return &lease{
		clock: clock, always: always, changed: changed,
		renewed: make(chan struct{}), calls: map[uint64]context.CancelCauseFunc{},
	}
}

// now reads the clock that deadlines are counted on.
func (l *lease) now() time.Duration { return l.clock() }

// begin takes up the lease of an epoch: the registration was sent at sent and
// grants ttl. The lease of any other epoch is over.
func (l *lease) begin(epoch uint64, sent, ttl time.Duration) {
	l.mu.Lock()
	other := l.of != epoch
	l.mu.Unlock()
	if other {
		l.drop()
	}
	l.mu.Lock()
	l.of = epoch
	l.mu.Unlock()
	l.renew(sent, ttl)
}

// epoch returns the epoch that the lease is or was of, 0 before the first.
func (l *lease) epoch() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.of
}

// renew moves the deadline: the renewal was sent at sent and grants ttl.
func (l *lease) renew(sent, ttl time.Duration) {
	if l.always || ttl <= 0 {
		return
	}
	l.alive() // a lease that ran out first ends before it comes back
	l.mu.Lock()
	l.ttl = ttl
	l.deadline = max(l.deadline, sent+ttl-time.Duration(leaseMarginShare*float64(ttl)))
	regained := !l.held && l.clock() < l.deadline
	l.held = l.held || regained
	close(l.renewed)
	l.renewed = make(chan struct{})
	l.mu.Unlock()
	if regained {
		l.changed()
	}
}

// drop ends the lease at once: the leader has said that the epoch is dead.
func (l *lease) drop() {
	l.mu.Lock()
	l.deadline = 0
	l.mu.Unlock()
	l.alive()
}

// alive reports whether the lease lives, by the clock and not by a timer.
func (l *lease) alive() bool {
	l.mu.Lock()
	if l.always || l.held && l.clock() < l.deadline {
		l.mu.Unlock()
		return true
	}
	lost := l.held
	l.held = false
	for _, end := range l.calls {
		end(errLeaseEnded)
	}
	clear(l.calls)
	l.mu.Unlock()
	if lost {
		l.changed()
	}
	return false
}

// covers reports whether the lease lives and is of an epoch: what was placed in
// another one has no part in it.
func (l *lease) covers(epoch uint64) bool {
	return l.alive() && (l.always || l.epoch() == epoch)
}

// tenure is the lease as far as it concerns what was placed in one epoch.
type tenure struct {
	lease *lease
	epoch uint64
}

// Ends implements provider.Tenure.
func (t tenure) Ends() (at time.Duration, held bool) {
	l := t.lease
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.always {
		return math.MaxInt64, true
	}
	return l.deadline, l.held && l.of == t.epoch
}

// remaining returns how long the lease still lives, and its TTL.
func (l *lease) remaining() (left, ttl time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(l.deadline-l.clock(), 0), l.ttl
}

// bind returns a context that also ends, with the cause errLeaseEnded, when the
// lease of an epoch does; it fails when that has ended already. release must be
// called.
func (l *lease) bind(ctx context.Context, epoch uint64) (bound context.Context, release func(), err error) {
	if !l.covers(epoch) {
		return nil, nil, errLeaseEnded
	}
	bound, end := context.WithCancelCause(ctx)
	l.mu.Lock()
	id := l.nextCall
	l.nextCall++
	if l.held && l.of == epoch || l.always {
		l.calls[id] = end
	} else {
		end(errLeaseEnded)
	}
	l.mu.Unlock()
	return bound, func() {
		l.mu.Lock()
		delete(l.calls, id)
		l.mu.Unlock()
		end(context.Canceled)
	}, nil
}

// run notices the end of the lease until ctx ends. Its timer is bounded by a
// quarter of the TTL because timers stand still while the machine sleeps.
func (l *lease) run(ctx context.Context) error {
	if l.always {
		<-ctx.Done()
		return nil
	}
	for {
		l.mu.Lock()
		renewed := l.renewed
		l.mu.Unlock()
		var expiry <-chan time.Time
		if l.alive() {
			left, ttl := l.remaining()
			expiry = time.After(min(left, ttl/4))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-renewed:
		case <-expiry:
		}
	}
}
