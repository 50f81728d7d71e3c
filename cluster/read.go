package cluster

import (
	"context"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// View returns the state to read from. By default it is linearizable: it shows
// every write that was acknowledged before View was called, and only the leader
// can give it; elsewhere it fails with NO_LEADER. With read.stale it is what
// this peer has applied. read.min_index makes it wait, until ctx ends, for an
// index that a write returned. The error is an *apierror.Error; nothing was
// changed, so the call can be repeated.
func (p *Peer) View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error) {
	if !read.GetStale() {
		if err := p.linearize(ctx); err != nil {
			return fsm.View{}, err
		}
	}
	return p.viewAt(ctx, read.GetMinIndex())
}

// viewAt returns a view of at least index.
func (p *Peer) viewAt(ctx context.Context, index uint64) (fsm.View, error) {
	for {
		if view := p.state.View(); view.Index() >= index {
			return view, nil
		}
		select {
		case <-p.state.Changed(index - 1):
		case <-ctx.Done():
			return fsm.View{}, apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT,
				"peer %s has applied index %d, the read asks for %d", p.cfg.ID, p.state.View().Index(), index).
				Next("read without min_index, or from another peer")
		}
	}
}

// linearize returns when everything that was acknowledged before the call has
// been applied here.
func (p *Peer) linearize(ctx context.Context) error {
	if !p.IsLeader() || p.role.closing.Load() {
		return p.noLeader()
	}
	if plant.On(plant.LeaseRead) {
		return nil
	}
	batch := p.reads.join()
	select {
	case <-batch.done:
		return batch.err
	case <-ctx.Done():
		return apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "the leader could not confirm in time that it still leads").
			Next("repeat the call; reads work with --stale")
	}
}

// reads lets readers share barriers: one barrier is under way at a time, and
// all who arrive meanwhile get the next one. A reader never shares a barrier
// that was started before it arrived.
type reads struct {
	mu   sync.Mutex
	next *readBatch
	wake chan struct{}
}

type readBatch struct {
	done chan struct{}
	err  error
}

func newReads() *reads { return &reads{wake: make(chan struct{}, 1)} }

func (r *reads) join() *readBatch {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.next == nil {
		r.next = &readBatch{done: make(chan struct{})}
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
	return r.next
}

// take returns the readers that wait for a barrier, or nil.
func (r *reads) take() *readBatch {
	r.mu.Lock()
	defer r.mu.Unlock()
	batch := r.next
	r.next = nil
	return batch
}

// runReads runs the barriers until ctx ends.
func (p *Peer) runReads(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-p.reads.wake:
		}
		if batch := p.reads.take(); batch != nil {
			batch.err = p.barrier(ctx)
			close(batch.done)
		}
	}
}

// barrier commits an entry in the present term. Its commit needs a quorum of
// voters that acknowledge an entry which did not exist before, so no late answer
// and no non-voter can stand in for it; and it is answered only after the state
// has taken in everything before it.
func (p *Peer) barrier(ctx context.Context) error {
	r := p.raft.Load()
	if r == nil {
		return p.noLeader()
	}
	term, commit := r.CurrentTerm(), r.CommitIndex()
	if err := p.flights.await(ctx, r.Barrier(remaining(ctx, enqueueLimit))); err != nil {
		if ctx.Err() != nil {
			return p.noLeader()
		}
		return p.readError(err)
	}
	if r.State() != raft.Leader || r.CurrentTerm() != term || r.AppliedIndex() < commit {
		return p.noLeader()
	}
	return nil
}

// readError is raftError for a call that changes nothing.
func (p *Peer) readError(err error) error {
	if e := apierror.From(p.raftError(err)); e.Detail(DetailOutcome) == OutcomeUnknown {
		return apierror.New(e.Code(), "leadership was lost during the call").
			With(DetailOutcome, OutcomeFailed).Next("repeat the call")
	}
	return p.raftError(err)
}
