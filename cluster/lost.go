package cluster

import (
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// lost is which followers a leader's heartbeats do not reach. Entries for those
// wait until a heartbeat gets through.
//
// hashicorp/raft tries again and again, and waits longer each time, up to 10 s: a
// follower that was away for half a minute would then be without entries for up
// to 10 s more. Heartbeats are never that far apart.
type lost struct {
	limit time.Duration // between two looks at whether waiting still makes sense

	mu   sync.Mutex
	back map[raft.ServerID]chan struct{} // closed when a heartbeat gets through
	over bool                            // nobody waits any more
}

func newLost(limit time.Duration) *lost {
	return &lost{limit: limit, back: map[raft.ServerID]chan struct{}{}}
}

// isHeartbeat reports whether a message is one of those that hashicorp/raft sends
// for nothing but contact.
func isHeartbeat(args *raft.AppendEntriesRequest) bool {
	return len(args.Entries) == 0 && args.PrevLogEntry == 0 && args.PrevLogTerm == 0 && args.LeaderCommitIndex == 0
}

// note takes in what became of a heartbeat.
func (l *lost) note(id raft.ServerID, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	back, away := l.back[id]
	switch {
	case err == nil && away:
		close(back)
		delete(l.back, id)
	case err != nil && !away && !l.over:
		l.back[id] = make(chan struct{})
	}
}

// end lets everything go.
func (l *lost) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	for id, back := range l.back {
		close(back)
		delete(l.back, id)
	}
}

// await returns when a follower is not lost, or r does not lead in this term or
// has no such follower any more.
func (l *lost) await(id raft.ServerID, term uint64, r *raft.Raft) {
	for r != nil && r.State() == raft.Leader && r.CurrentTerm() == term {
		l.mu.Lock()
		back, away := l.back[id]
		l.mu.Unlock()
		if !away || !slices.ContainsFunc(r.GetConfiguration().Configuration().Servers, func(s raft.Server) bool { return s.ID == id }) {
			return
		}
		select {
		case <-back:
		case <-time.After(l.limit):
		}
	}
}
