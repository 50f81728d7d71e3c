package messaging

import (
	"sync"
	"time"
)

// maxRemembered is how many stored messages a subscription remembers.
const maxRemembered = 16384

// storedID names a stored message. A stream that was made anew counts from 1
// again, so the number alone would not do.
type storedID struct {
	sequence uint64
	at       time.Time
}

// remembered is what happened to a stored message in this process.
type remembered struct {
	deliveries uint32
	failures   uint32 // of these, those that the handler is to blame for
	settled    bool   // it was handled, rejected or given up
}

// memory remembers the latest stored messages of a subscription. A server that
// was killed may have forgotten what it delivered and what was acknowledged last.
type memory struct {
	mu      sync.Mutex
	records map[storedID]*remembered
	order   []storedID // the oldest at next once it is full
	next    int
}

// begin takes up a delivery, which the server counts as the nth. It returns its
// true number, and whether the message is settled and must not be delivered.
func (m *memory) begin(id storedID, n uint32) (delivery uint32, settled bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.find(id)
	if r.settled {
		return 0, true
	}
	r.deliveries = max(r.deliveries+1, n)
	return r.deliveries, false
}

func (m *memory) find(id storedID) *remembered {
	if r, ok := m.records[id]; ok {
		return r
	}
	if m.records == nil {
		m.records = map[storedID]*remembered{}
	}
	if len(m.order) < maxRemembered {
		m.order = append(m.order, id)
	} else {
		delete(m.records, m.order[m.next])
		m.order[m.next] = id
		m.next = (m.next + 1) % maxRemembered
	}
	r := &remembered{}
	m.records[id] = r
	return r
}

// unseen takes back a delivery that no replica took.
func (m *memory) unseen(id storedID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.records[id]; ok && r.deliveries > 0 {
		r.deliveries--
	}
}

// failed counts a delivery that failed, and returns how many did.
func (m *memory) failed(id storedID, blameless bool) uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.find(id)
	if !blameless {
		r.failures++
	}
	return r.failures
}

// settle takes up that a message must not be delivered any more.
func (m *memory) settle(id storedID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.find(id).settled = true
}
