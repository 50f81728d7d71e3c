package messaging

import (
	"strconv"
	"sync"

	"github.com/nats-io/nats.go"
)

// replies waits for the answers to requests, all by one subscription.
type replies struct {
	inbox string // with its final dot
	sub   *nats.Subscription

	mu      sync.Mutex
	last    uint64
	waiting map[string]chan *nats.Msg // closed without an answer when the connection breaks
}

func openReplies(l *link) (*replies, error) {
	r := &replies{inbox: l.nc.NewInbox() + ".", waiting: map[string]chan *nats.Msg{}}
	sub, err := l.nc.Subscribe(r.inbox+"*", r.take)
	if err != nil {
		return nil, natsError(err, false)
	}
	r.sub = sub
	l.watchLoss(r.lost)
	return r, nil
}

// expect returns where the one answer comes, and the subject to answer to. It
// must be forgotten.
func (r *replies) expect() (answer <-chan *nats.Msg, subject string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	subject = r.inbox + strconv.FormatUint(r.last, 36)
	c := make(chan *nats.Msg, 1)
	r.waiting[subject] = c
	return c, subject
}

func (r *replies) forget(subject string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.waiting, subject)
}

// take passes the first answer on and drops all others.
func (r *replies) take(m *nats.Msg) {
	r.mu.Lock()
	c, ok := r.waiting[m.Subject]
	delete(r.waiting, m.Subject)
	r.mu.Unlock()
	if ok {
		c <- m
	}
}

// lost tells all who wait that no answer can be expected.
func (r *replies) lost() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for subject, c := range r.waiting {
		close(c)
		delete(r.waiting, subject)
	}
}

// noResponders reports whether an answer is the server's own: nobody listens.
func noResponders(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }
