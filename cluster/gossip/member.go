package gossip

import (
	"slices"
	"strings"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxLost bounds how many members that are gone are remembered, so that a
// holder of the gossip key cannot fill the memory of the others.
const maxLost = 256

// Member is what is known of one member. All of it is a hint.
type Member struct {
	// Metadata is what the member told last. It is shared: never modify it.
	Metadata *pb.PeerMetadata
	// Address is the member's host:port of the gossip; empty for this member.
	Address string
	// Alive says whether the member answers; a member that left is not alive.
	Alive bool
	// Left says that the member told it was leaving.
	Left bool
	// Since is when Alive last changed, by the clock of this machine.
	Since time.Time
}

// EventKind says what happened to a member.
type EventKind int

// The kinds of event.
const (
	// Joined: the member was seen for the first time, or again.
	Joined EventKind = iota + 1
	// Left: the member told that it leaves.
	Left
	// Failed: the member does not answer any more.
	Failed
	// Updated: the member changed what it tells about itself.
	Updated
)

// String returns the kind in lower case.
func (k EventKind) String() string {
	switch k {
	case Joined:
		return "joined"
	case Left:
		return "left"
	case Failed:
		return "failed"
	case Updated:
		return "updated"
	default:
		return "unknown"
	}
}

// Event is one change of one other member.
type Event struct {
	// Kind is what happened.
	Kind EventKind
	// Member is the member after the change.
	Member Member
}

// roster keeps the members and the events that nobody received yet. It is not
// safe for concurrent use.
type roster struct {
	self    string
	known   map[string]Member
	leaving map[string]bool
	pending []Event
}

func newRoster(self string) *roster {
	return &roster{self: self, known: map[string]Member{}, leaving: map[string]bool{}}
}

// record notes a change and keeps only the last pending event of each member.
func (r *roster) record(kind EventKind, m Member) {
	id := m.Metadata.GetPeerId()
	if id == r.self {
		return
	}
	if m.Alive {
		delete(r.leaving, id)
	} else if r.leaving[id] {
		kind, m.Left = Left, true
	}
	if old, ok := r.known[id]; ok && old.Alive == m.Alive {
		m.Since = old.Since
	}
	r.known[id] = m
	r.forget()
	r.queue(kind, m)
}

// leaves notes that a member said it leaves, before or after it went silent.
func (r *roster) leaves(id string, now time.Time) {
	m, ok := r.known[id]
	if !ok {
		return
	}
	r.leaving[id] = true
	if !m.Alive && !m.Left && now.Sub(m.Since) < leaveTimeout {
		m.Left = true
		r.known[id] = m
		r.queue(Left, m)
	}
}

func (r *roster) queue(kind EventKind, m Member) {
	id := m.Metadata.GetPeerId()
	event := Event{Kind: kind, Member: m}
	at := slices.IndexFunc(r.pending, func(e Event) bool { return e.Member.Metadata.GetPeerId() == id })
	if at < 0 {
		r.pending = append(r.pending, event)
		return
	}
	if kind == Updated && r.pending[at].Kind == Joined {
		event.Kind = Joined
	}
	r.pending[at] = event
}

// forget drops the member that is gone longest when there are too many.
func (r *roster) forget() {
	var lost int
	var oldest string
	for id, m := range r.known {
		if m.Alive {
			continue
		}
		lost++
		if oldest == "" || m.Since.Before(r.known[oldest].Since) {
			oldest = id
		}
	}
	if lost > maxLost {
		delete(r.known, oldest)
		delete(r.leaving, oldest)
	}
}

func (r *roster) next() (Event, bool) {
	if len(r.pending) == 0 {
		return Event{}, false
	}
	event := r.pending[0]
	r.pending = slices.Delete(r.pending, 0, 1)
	return event, true
}

func (r *roster) members(local *pb.PeerMetadata) []Member {
	out := []Member{{Metadata: local, Alive: true}}
	for _, m := range r.known {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b Member) int {
		return strings.Compare(a.Metadata.GetPeerId(), b.Metadata.GetPeerId())
	})
	return out
}
