package cluster

import (
	"context"
	"sync"

	"github.com/hashicorp/raft"
)

// herald is the transport of a leader that has more to say than hashicorp/raft:
// it tells each follower what has been committed as soon as it is. Raft itself
// tells it with the next entry, or when an idle leader's commit timeout is over,
// and until then a client that reads or watches at a follower waits.
//
// The message is one that Raft might have sent: the leader of that term, the
// last entry that it has sent and the follower has acknowledged, no new entries.
// It stays true however late it arrives. Its answer says nothing new.
//
// What the follower acknowledged is its own only as long as this peer leads in the
// term in which it was sent. A peer that was deposed learns of a new commit index
// from the next leader, and the entries at those indexes are others; a follower
// that has not heard of that leader yet would commit what it has instead.
type herald struct {
	*guard
	// committed returns the present commit index, last the index of the last entry of the log.
	committed, last func() uint64
	// leads reports whether this peer leads in a term, which it did when it sent the
	// entries of that term.
	leads func(term uint64) bool
	// wake has room for one.
	wake chan struct{}

	mu        sync.Mutex
	followers map[raft.ServerID]*listener
}

// listener is what the herald knows of one follower.
type listener struct {
	address raft.ServerAddress
	// acknowledged repeats the last request that brought entries, as one without;
	// its PrevLogEntry is the last entry that the follower has.
	acknowledged raft.AppendEntriesRequest
	// told is the last commit index that the follower was told.
	told uint64
	busy bool
}

func newHerald(g *guard, committed, last func() uint64, leads func(term uint64) bool) *herald {
	return &herald{guard: g, committed: committed, last: last, leads: leads, wake: make(chan struct{}, 1), followers: map[raft.ServerID]*listener{}}
}

// AppendEntries sends entries.
func (h *herald) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := h.guard.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	n := len(args.Entries)
	if !resp.Success || n == 0 {
		return nil
	}
	h.mu.Lock()
	f := h.followers[id]
	if f == nil {
		f = &listener{}
		h.followers[id] = f
	}
	f.address, f.acknowledged, f.told = target, *args, args.LeaderCommitIndex
	f.acknowledged.PrevLogEntry, f.acknowledged.PrevLogTerm = args.Entries[n-1].Index, args.Entries[n-1].Term
	f.acknowledged.Entries = nil
	h.mu.Unlock()
	h.look()
	return nil
}

// look makes the herald look for news.
func (h *herald) look() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run tells followers the news until ctx ends. changed returns a channel that is
// closed when something has been applied after it was called.
func (h *herald) run(ctx context.Context, changed func() <-chan struct{}) {
	var sending sync.WaitGroup
	defer sending.Wait()
	for {
		news := changed()
		for _, m := range h.due() {
			sending.Go(func() { h.send(m) })
		}
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		case <-news:
		}
	}
}

// message is what one follower is to be told.
type message struct {
	id      raft.ServerID
	address raft.ServerAddress
	args    raft.AppendEntriesRequest
}

// due returns what is to be sent now. A follower that will get further entries
// hears the news with them.
func (h *herald) due() []message {
	committed, last := h.committed(), h.last()
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []message
	for id, f := range h.followers {
		args := f.acknowledged
		args.LeaderCommitIndex = args.PrevLogEntry
		if f.busy || args.PrevLogEntry < last || args.PrevLogEntry > committed || args.PrevLogEntry <= f.told {
			continue
		}
		// Asked after the commit index was read: what was committed then was of this leadership.
		if !h.leads(args.Term) {
			continue
		}
		f.busy, f.told = true, args.PrevLogEntry
		out = append(out, message{id: id, address: f.address, args: args})
	}
	return out
}

func (h *herald) send(m message) {
	var resp raft.AppendEntriesResponse
	// What does not arrive is told again by Raft.
	_ = h.guard.AppendEntries(m.id, m.address, &m.args, &resp)
	h.mu.Lock()
	h.followers[m.id].busy = false
	h.mu.Unlock()
	h.look()
}
