package control

import (
	"container/heap"
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// printLogs sends the kept output of all sources in the order of its times. What
// one source cannot give is told by a line in its place.
func (h *handlers) printLogs(ctx context.Context, view fsm.View, sources []logSource, req *pb.FollowLogsRequest, send func(*pb.LogEntry) error) error {
	g, ctx := errgroup.WithContext(ctx)
	feeds := make([]chan *pb.LogEntry, len(sources))
	for i, s := range sources {
		feed := make(chan *pb.LogEntry)
		feeds[i] = feed
		g.Go(func() error {
			defer close(feed)
			put := func(e *pb.LogEntry) error { return offer(ctx, feed, e) }
			err := h.readLogs(ctx, view, s, req, put)
			if err == nil || holdsNothing(err) || ctx.Err() != nil {
				return ctx.Err()
			}
			return put(unreadable(s, err))
		})
	}
	g.Go(func() error { return merge(feeds, send) })
	return g.Wait()
}

func offer(ctx context.Context, to chan<- *pb.LogEntry, e *pb.LogEntry) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case to <- e:
		return nil
	}
}

// merge sends the entries of feeds, each of them ordered by time, in the order
// of time over all, until all feeds are closed.
func merge(feeds []chan *pb.LogEntry, send func(*pb.LogEntry) error) error {
	heads := make(logHeads, 0, len(feeds))
	for _, feed := range feeds {
		if e, ok := <-feed; ok {
			heads = append(heads, logHead{entry: e, feed: feed})
		}
	}
	heap.Init(&heads)
	for len(heads) > 0 {
		if err := send(heads[0].entry); err != nil {
			return err
		}
		if e, ok := <-heads[0].feed; ok {
			heads[0].entry = e
			heap.Fix(&heads, 0)
		} else {
			heap.Pop(&heads)
		}
	}
	return nil
}

// logHead is the next entry of a feed.
type logHead struct {
	entry *pb.LogEntry
	feed  <-chan *pb.LogEntry
}

// logHeads is a heap of the next entries, the earliest first.
type logHeads []logHead

// Len implements heap.Interface.
func (h logHeads) Len() int { return len(h) }

// Less implements heap.Interface.
func (h logHeads) Less(i, j int) bool {
	return h[i].entry.GetTime().AsTime().Before(h[j].entry.GetTime().AsTime())
}

// Swap implements heap.Interface.
func (h logHeads) Swap(i, j int) { h[i], h[j] = h[j], h[i] }

// Push implements heap.Interface.
func (h *logHeads) Push(x any) {
	if head, ok := x.(logHead); ok {
		*h = append(*h, head)
	}
}

// Pop implements heap.Interface.
func (h *logHeads) Pop() any {
	last := len(*h) - 1
	head := (*h)[last]
	*h = (*h)[:last]
	return head
}
