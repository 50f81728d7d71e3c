package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// WatchEvents returns the events that req asks for, in order and each once. A
// broken connection is followed by a new one that goes on after the last event.
// The sequence ends when ctx ends (with its error), when the caller stops, when
// req.follow is false and all recorded events were seen, or with an error that
// does not pass: of the request, or because no peer was reached for the
// client's timeout.
func (c *Client) WatchEvents(ctx context.Context, req *pb.WatchEventsRequest) iter.Seq2[*pb.WatchEventsResponse, error] {
	return func(yield func(*pb.WatchEventsResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel() // ends the stream when the caller stops early
		next, ok := proto.Clone(req).(*pb.WatchEventsRequest)
		if !ok {
			return
		}
		open := func() (grpc.ServerStreamingClient[pb.WatchEventsResponse], error) {
			return c.controlPlane.WatchEvents(ctx, next)
		}
		follow(ctx, c.transport.timeout, req.GetFollow(), open, func(e *pb.WatchEventsResponse) bool {
			if seq := e.GetEvent().GetSequence(); seq > 0 {
				// A peer that is behind, or knows less of the position, may send what was seen.
				if seq <= next.GetAfterSequence() {
					return true
				}
				next.AfterSequence = seq
			}
			return yield(e, nil)
		}, func(err error) { yield(nil, err) })
	}
}

// FollowLogs returns lines of output. A broken connection is followed by a new
// one that goes on after the last line of each instance. It ends as WatchEvents
// does, and also with req.follow once nothing more can come.
func (c *Client) FollowLogs(ctx context.Context, req *pb.FollowLogsRequest) iter.Seq2[*pb.LogEntry, error] {
	return func(yield func(*pb.LogEntry, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		position := &logPosition{req: req}
		open := func() (grpc.ServerStreamingClient[pb.FollowLogsResponse], error) {
			return c.controlPlane.FollowLogs(ctx, position.request(time.Now()))
		}
		follow(ctx, c.transport.timeout, false, open, func(r *pb.FollowLogsResponse) bool {
			e := r.GetEntry()
			if e == nil || !position.advance(e, time.Now()) {
				return true
			}
			return yield(e, nil)
		}, func(err error) { yield(nil, err) })
	}
}

// SubscribeMessages returns the messages on a subject of a messaging provider. An
// answer without a message says that the subscription stands: the first one does,
// and each one after a broken connection, which is followed by a new one;
// messages between the two are missing. It ends when ctx ends (with its error),
// when the caller stops, or with an error that does not pass, such as that the
// provider does not serve any more.
func (c *Client) SubscribeMessages(ctx context.Context, req *pb.SubscribeMessagesRequest) iter.Seq2[*pb.SubscribeMessagesResponse, error] {
	return func(yield func(*pb.SubscribeMessagesResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		open := func() (grpc.ServerStreamingClient[pb.SubscribeMessagesResponse], error) {
			return c.controlPlane.SubscribeMessages(ctx, req)
		}
		follow(ctx, c.transport.timeout, true, open, func(m *pb.SubscribeMessagesResponse) bool {
			return yield(m, nil)
		}, func(err error) { yield(nil, err) })
	}
}

// follow hands every message of a stream to each, and opens the stream anew
// when it broke, until each returns false or there is an error for fail. What a
// clean end of the stream means is said by reopen.
func follow[M any](ctx context.Context, patience time.Duration, reopen bool,
	open func() (grpc.ServerStreamingClient[M], error), each func(*M) bool, fail func(error),
) {
	var failingSince time.Time
	for round := 0; ; round++ {
		began := time.Now()
		stream, err := open()
		for err == nil {
			var m *M
			if m, err = stream.Recv(); err != nil {
				break
			}
			round, failingSince = 0, time.Time{}
			if !each(m) {
				return
			}
		}
		if failingSince.IsZero() || time.Since(began) > patience {
			// A stream may be silent for hours and was fine until now.
			failingSince = time.Now()
		}
		ended := errors.Is(err, io.EOF)
		if !ended {
			awaitDeadline(ctx)
		}
		switch {
		case ctx.Err() != nil:
			fail(ctx.Err())
			return
		case ended && !reopen:
			return
		case !ended && (!transient(err) || stream == nil || time.Since(failingSince) > patience):
			fail(err)
			return
		}
		if !rest(ctx, round) {
			fail(ctx.Err())
			return
		}
	}
}

// overlap is how far a new log stream reaches back before the moment the last
// line came, so that lines that were on their way are not lost.
const overlap = 10 * time.Second

// logPosition knows how far a stream of lines has come.
type logPosition struct {
	req      *pb.FollowLogsRequest
	began    time.Time
	lastSeen time.Time // by the local clock
	seen     LogFilter
}

// request returns what to ask for now. After a break it is everything since
// shortly before the break; what was seen is then left out by advance.
func (p *logPosition) request(now time.Time) *pb.FollowLogsRequest {
	if p.began.IsZero() {
		p.began, p.lastSeen = now, now
		return p.req
	}
	p.seen.Restart()
	again, ok := proto.Clone(p.req).(*pb.FollowLogsRequest)
	if !ok {
		return p.req
	}
	since := now.Sub(p.lastSeen) + overlap
	switch {
	case p.req.GetTail() < 0:
		// Only lines after the first request count.
		since = min(since, now.Sub(p.began))
		again.Tail, again.Since = 0, durationpb.New(since)
	case len(p.seen.last) > 0:
		again.Tail, again.Since = 0, durationpb.New(since)
	}
	return again
}

// advance notes a line and reports whether it is new.
func (p *logPosition) advance(e *pb.LogEntry, now time.Time) bool {
	p.lastSeen = now
	return p.seen.New(e)
}

// LogFilter tells new lines of output from those that an earlier stream of the
// same instances brought already. The zero value has seen nothing. It relies on
// each instance's lines coming in the order of their times after a Restart. It
// is not safe for concurrent use.
type LogFilter struct {
	last map[logSource]*lastLines
}

// logSource is one writer of lines with one clock.
type logSource struct{ instance, node string }

// lastLines are the lines that carry the latest time of their source.
type lastLines struct {
	at     time.Time
	counts map[string]int
	// again counts the same lines in the stream that repeats them; nil while
	// nothing is repeated.
	again map[string]int
}

// Restart says that the lines from now on are those of a new stream, which may
// begin with lines that were there before.
func (f *LogFilter) Restart() {
	for _, l := range f.last {
		l.again = map[string]int{}
	}
}

// New notes a line and reports whether it was not there before.
func (f *LogFilter) New(e *pb.LogEntry) bool {
	src := logSource{instance: e.GetInstanceId(), node: e.GetNodeId()}
	at, line := e.GetTime().AsTime(), e.GetStream().String()+e.GetMessage()
	if f.last == nil {
		f.last = map[logSource]*lastLines{}
	}
	l := f.last[src]
	switch {
	case l == nil || at.After(l.at):
		f.last[src] = &lastLines{at: at, counts: map[string]int{line: 1}}
		return true
	case l.again == nil:
		if at.Equal(l.at) {
			l.counts[line]++
		}
		return true
	case at.Before(l.at):
		return false
	}
	l.again[line]++
	if l.again[line] <= l.counts[line] {
		return false
	}
	l.counts[line]++
	return true
}
