package control

import (
	"context"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// eventBatch bounds the events read at once; a slow client holds no more.
const eventBatch = 256

// WatchEvents implements pb.ControlPlaneServiceServer. It is served from this
// peer's own state. A client that reads slower than events are made is held back
// by the transport only; when it falls behind what is kept, gap tells it so.
func (h *handlers) WatchEvents(req *pb.WatchEventsRequest, stream grpc.ServerStreamingServer[pb.WatchEventsResponse]) error {
	ctx := stream.Context()
	cursor := eventCursor{after: req.GetAfterSequence()}
	wanted := eventFilter(req)
	for {
		view, err := h.local(ctx)
		if err != nil {
			return err
		}
		events := cursor.next(view)
		for _, e := range events {
			if !wanted(e) {
				continue
			}
			if err := stream.Send(&pb.WatchEventsResponse{Event: e, Gap: cursor.takeGap()}); err != nil {
				return err
			}
		}
		if len(events) > 0 {
			continue
		}
		if !req.GetFollow() {
			return nil
		}
		if err := h.waitChange(ctx, view); err != nil {
			return err
		}
	}
}

// waitChange blocks until this peer's state is newer than view.
func (h *handlers) waitChange(ctx context.Context, view fsm.View) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-h.closing:
		return errClosing()
	case <-h.Viewer.Changed(view.Index()):
		return nil
	}
}

func errClosing() error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "this peer is shutting down").
		Next("follow again through another peer, from where this stream ended")
}

// eventCursor is a reader's place in the bounded list of events.
type eventCursor struct {
	after  uint64
	newest uint64
	begun  bool
	gap    bool
}

// next returns the events after the cursor, at most a batch, and moves it.
func (c *eventCursor) next(view fsm.View) []*pb.Event {
	oldest, newest := view.EventBounds()
	if newest < c.newest {
		// The registry was replaced by an older snapshot: what follows is another history.
		c.after, c.gap = 0, true
	}
	c.newest = newest
	// From 0 means from the oldest kept: nothing is missed by that.
	if (c.after > 0 || c.begun) && oldest > c.after+1 {
		c.gap = true
	}
	c.begun = true
	events := view.Events(c.after, eventBatch)
	if len(events) > 0 {
		c.after = events[len(events)-1].GetSequence()
	}
	return events
}

// takeGap reports once that events were missed; it waits for the next event
// that the client gets.
func (c *eventCursor) takeGap() bool {
	gap := c.gap
	c.gap = false
	return gap
}

// eventFilter returns which events the request asks for.
func eventFilter(req *pb.WatchEventsRequest) func(*pb.Event) bool {
	kinds := make(map[pb.EventKind]bool, len(req.GetKinds()))
	for _, k := range req.GetKinds() {
		kinds[k] = true
	}
	subject := req.GetSubject()
	return func(e *pb.Event) bool {
		if len(kinds) > 0 && !kinds[e.GetKind()] {
			return false
		}
		return subject == "" || subject == e.GetInstanceId() || subject == e.GetNodeId() ||
			subject == e.GetProviderId() || subject == workloadOf(e.GetInstanceId())
	}
}
