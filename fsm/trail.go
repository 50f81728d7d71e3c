package fsm

import (
	"encoding/hex"
	"sort"
)

// How much of the past the state remembers the hash of: of each of the last
// recentMarks commands, and of the last coarseMarks indexes that CoarseStep
// divides.
const (
	recentMarks = 1024
	coarseMarks = 4096
	// CoarseStep divides the indexes whose hashes are remembered for longer: peers
	// that are some way apart compare at those.
	CoarseStep = 64
)

// mark is the hash at an index.
type mark struct {
	index uint64
	hash  digest
}

// ring keeps the last marks, in order of their indexes.
type ring struct {
	marks []mark
	size  int
	next  int
}

func (r *ring) add(m mark) {
	if len(r.marks) < r.size {
		r.marks = append(r.marks, m)
		return
	}
	r.marks[r.next] = m
	r.next = (r.next + 1) % r.size
}

func (r *ring) at(i int) mark { return r.marks[(r.next+i)%len(r.marks)] }

// upTo returns the last mark that is not after index.
func (r *ring) upTo(index uint64) (mark, bool) {
	n := sort.Search(len(r.marks), func(i int) bool { return r.at(i).index > index })
	if n == 0 {
		return mark{}, false
	}
	return r.at(n - 1), true
}

func (r *ring) clear() { r.marks, r.next = r.marks[:0], 0 }

// trail remembers the hashes of recent states. It begins anew with a restored
// snapshot: a snapshot of elsewhere has indexes that mean nothing here.
type trail struct {
	recent, coarse ring
	last           mark
}

func newTrail() trail {
	return trail{recent: ring{size: recentMarks}, coarse: ring{size: coarseMarks}}
}

// add notes the hash after a command. What lies between two commands has the
// hash of the first.
func (t *trail) add(m mark) {
	if step := (m.index - 1) / CoarseStep * CoarseStep; t.last.index != 0 && step >= t.last.index {
		t.coarse.add(mark{index: step, hash: t.last.hash})
	}
	t.recent.add(m)
	t.last = m
}

func (t *trail) clear() {
	t.recent.clear()
	t.coarse.clear()
	t.last = mark{}
}

// hashAt returns the hash at an index that is applied.
func (t *trail) hashAt(index uint64) (digest, bool) {
	if m, ok := t.recent.upTo(index); ok {
		return m.hash, true
	}
	m, ok := t.coarse.upTo(index)
	return m.hash, ok && m.index == index
}

// HashAt returns the running hash of the state at a Raft index, in hex. It
// reports false for an index that is not applied yet, or that is too long ago:
// the last thousand commands are remembered, and further back the last four
// thousand indexes that CoarseStep divides, but nothing before the last restore.
func (s *State) HashAt(index uint64) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index > s.sum.index {
		return "", false
	}
	hash, ok := s.trail.hashAt(index)
	if !ok {
		return "", false
	}
	return hex.EncodeToString(hash[:]), true
}
