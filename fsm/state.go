package fsm

import (
	"sync"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// summary is what a View knows besides the tables.
type summary struct {
	index      uint64
	time       *timestamppb.Timestamp
	hash       digest
	clusterID  string
	lastEvent  uint64
	eventCount uint64
	// The answers outside of sessions, and those that sessions keep.
	dedupCount, sessionAnswers int
	sessionCount               int
	denials                    denialWindow
}

// State is the replicated state. Apply and Restore take turns with each other;
// all other methods may be called at any time from any goroutine.
type State struct {
	db    *memdb.MemDB
	chain *chain
	// fresh holds the marks of the batch at work.
	fresh []mark

	mu      sync.Mutex
	sum     summary
	trail   trail
	waiters waiters
}

// New returns an empty state at index 0.
func New() *State {
	db, err := memdb.NewMemDB(schema())
	must(err)
	return &State{db: db, chain: newChain(), trail: newTrail(), waiters: newWaiters()}
}

// Apply applies the command of one log entry and returns what it came to; a
// refusal is in the result's error. The indexes of successive calls must grow.
// Apply takes cmd over: parts of it become records, so neither cmd nor the
// result's error details may be changed afterwards by anyone who shares them
// with the caller. The result itself belongs to the caller.
func (s *State) Apply(index uint64, cmd *pb.Command) *pb.CommandResult {
	b := s.begin()
	res := b.apply(index, cmd)
	b.commit()
	return res
}

// View returns the state as it is now. It stays the same for as long as it is
// held; holding one keeps the memory of the records it shows.
func (s *State) View() View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return View{txn: s.db.Txn(false), sum: s.sum}
}

// Changed returns a channel that is closed as soon as the applied index is
// greater than after; it is closed already when that is so now. It is closed
// early when Restore replaces the state, and it may be when more than a thousand
// different future indexes are waited for, so look at View().Index() again
// after waking. Entries that never reach the state (barriers, elections) do not
// move its index.
func (s *State) Changed(after uint64) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiters.wait(s.sum.index, after)
}

// batch is one write transaction over several log entries. Exactly one exists
// at a time; readers see nothing of it before commit.
type batch struct {
	s   *State
	txn *memdb.Txn
	sum summary
}

// begin opens a batch and waits for the one before to end.
func (s *State) begin() *batch {
	txn := s.db.Txn(true)
	s.fresh = s.fresh[:0]
	s.mu.Lock()
	defer s.mu.Unlock()
	return &batch{s: s, txn: txn, sum: s.sum}
}

// apply applies one command within the batch.
func (b *batch) apply(index uint64, cmd *pb.Command) *pb.CommandResult {
	b.s.chain.begin(b.sum.hash, index)
	b.sum.index = index
	b.sum.time = later(b.sum.time, cmd.GetTime())
	t := &tx{txn: b.txn, sum: &b.sum, chain: b.s.chain, cmd: cmd, index: index, now: b.sum.time}
	res := t.run()
	b.sum.hash = b.s.chain.end()
	b.s.fresh = append(b.s.fresh, mark{index: index, hash: b.sum.hash})
	return res
}

// skip moves the index past a log entry that is no command. It leaves the hash
// alone, since a peer that was restored from a snapshot never sees such entries.
func (b *batch) skip(index uint64) { b.sum.index = index }

// commit makes the batch visible and wakes those who wait for it. Tables and
// summary change under one lock so that no View mixes two states.
func (b *batch) commit() { b.publish(false) }

// replace makes a restored state visible and wakes everybody.
func (b *batch) replace() { b.publish(true) }

func (b *batch) publish(restored bool) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.txn.Commit()
	b.s.sum = b.sum
	if restored {
		b.s.trail.clear()
	}
	for _, m := range b.s.fresh {
		b.s.trail.add(m)
	}
	b.s.waiters.wake(b.sum.index, restored)
}

// abort ends the batch without a trace.
func (b *batch) abort() { b.txn.Abort() }

// later returns the later of two times; one that is missing or malformed is
// before all others.
func later(a, b *timestamppb.Timestamp) *timestamppb.Timestamp {
	switch {
	case b == nil || !b.IsValid():
		return a
	case a == nil || before(a, b):
		return b
	default:
		return a
	}
}

func before(a, b *timestamppb.Timestamp) bool {
	if a.GetSeconds() != b.GetSeconds() {
		return a.GetSeconds() < b.GetSeconds()
	}
	return a.GetNanos() < b.GetNanos()
}
