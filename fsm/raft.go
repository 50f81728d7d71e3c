package fsm

import (
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"
)

var _ raft.BatchingFSM = (*RaftFSM)(nil)

// ErrStopped is the answer to every log entry from the one on that this version
// could not apply. The peer must stop: going on, it would hold another state than
// the others.
var ErrStopped = errors.New("the state machine has stopped")

// RaftFSM lets hashicorp/raft drive a State. Raft calls all of its methods from
// one goroutine; only Persist of a snapshot runs beside them.
type RaftFSM struct {
	state   *State
	onFatal func(error)
	stopped error
}

// NewRaftFSM returns an adaptor for s. It calls onFatal, once and from Raft's
// goroutine, when a log entry is undecodable, has an unknown payload or comes out
// of order; the state then stays at the index before it for good.
func NewRaftFSM(s *State, onFatal func(error)) *RaftFSM {
	return &RaftFSM{state: s, onFatal: onFatal}
}

// Apply applies one log entry. It returns a *pb.CommandResult for a command, nil
// for any other entry, and an error that wraps ErrStopped once the state machine
// has stopped.
func (f *RaftFSM) Apply(entry *raft.Log) any { return f.ApplyBatch([]*raft.Log{entry})[0] }

// ApplyBatch applies log entries in one write transaction; the answers are those
// of Apply, one an entry.
func (f *RaftFSM) ApplyBatch(entries []*raft.Log) []any {
	out := make([]any, len(entries))
	done := 0
	if f.stopped == nil {
		done = f.applyAll(entries, out)
	}
	for i := done; i < len(entries); i++ {
		out[i] = f.stopped
	}
	return out
}

// applyAll applies entries up to the first that fails and returns how many it
// applied. Those before a failure stand.
func (f *RaftFSM) applyAll(entries []*raft.Log, out []any) int {
	b := f.state.begin()
	for i, entry := range entries {
		answer, err := applyEntry(b, entry)
		if err != nil {
			b.commit()
			f.stopped = fmt.Errorf("%w at log entry %d: %w", ErrStopped, entry.Index, err)
			f.onFatal(f.stopped)
			return i
		}
		out[i] = answer
	}
	b.commit()
	return len(entries)
}

func applyEntry(b *batch, entry *raft.Log) (any, error) {
	if entry.Index <= b.sum.index {
		return nil, fmt.Errorf("entry %d is applied already", b.sum.index)
	}
	if entry.Type != raft.LogCommand {
		b.skip(entry.Index)
		return nil, nil
	}
	cmd, err := DecodeCommand(entry.Data)
	if err != nil {
		return nil, err
	}
	return b.apply(entry.Index, cmd), nil
}

// Snapshot captures the state as it is now. Once the state machine has stopped it
// refuses: Raft would label the state with an index that it has not reached.
func (f *RaftFSM) Snapshot() (raft.FSMSnapshot, error) {
	if f.stopped != nil {
		return nil, f.stopped
	}
	return &raftSnapshot{state: f.state, view: f.state.View()}, nil
}

// Restore replaces the state by a snapshot and closes it. A bad snapshot leaves
// the state as it was.
func (f *RaftFSM) Restore(snapshot io.ReadCloser) error {
	err := f.state.Restore(snapshot)
	return errors.Join(err, snapshot.Close())
}

type raftSnapshot struct {
	state *State
	view  View
}

// Persist writes the snapshot to sink and closes or cancels it.
func (s *raftSnapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.state.WriteSnapshot(s.view, sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release lets the records go that only the snapshot holds.
func (s *raftSnapshot) Release() { s.view = View{} }
