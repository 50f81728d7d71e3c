package cluster

import (
	"context"
	"fmt"

	"github.com/hashicorp/raft"
)

// hop is what the layers of Raft's transport have in common: the layer below, and
// the queue of the incoming messages that this one has let through. From the
// network up they are border, vigil, guard and herald; a layer redefines what it
// changes, and the rest goes straight to the layer below.
type hop struct {
	raft.Transport
	preVote  raft.WithPreVote
	consumer chan raft.RPC
}

var (
	_ raft.WithPreVote = (*hop)(nil)
	_ raft.WithClose   = (*hop)(nil)
)

// newHop returns a hop over inner. Its error wraps ErrConfig.
func newHop(inner raft.Transport) (hop, error) {
	preVote, ok := inner.(raft.WithPreVote)
	if !ok {
		return hop{}, fmt.Errorf("%w: the raft transport cannot ask for pre-votes", ErrConfig)
	}
	return hop{Transport: inner, preVote: preVote, consumer: make(chan raft.RPC)}, nil
}

// each hands the messages of the layer below to take until ctx ends.
func (h *hop) each(ctx context.Context, take func(raft.RPC)) {
	for {
		select {
		case <-ctx.Done():
			return
		case rpc := <-h.Transport.Consumer():
			take(rpc)
		}
	}
}

// pass lets a message through to the layer above.
func (h *hop) pass(ctx context.Context, rpc raft.RPC) {
	select {
	case <-ctx.Done():
	case h.consumer <- rpc:
	}
}

// Consumer returns the messages that were let through.
func (h *hop) Consumer() <-chan raft.RPC { return h.consumer }

// RequestPreVote asks whether a vote would be given.
func (h *hop) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return h.preVote.RequestPreVote(id, target, args, resp)
}

// Close closes the transport below, if it can be closed.
func (h *hop) Close() error {
	if c, ok := h.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}
