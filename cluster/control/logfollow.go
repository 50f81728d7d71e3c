package control

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/go-memdb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// logLinger is how long output is still read from a node after its instance
	// has left, for the last lines.
	logLinger = 2 * time.Second
	// logRetry and logMaxRetry bound the waits between attempts to reach an agent.
	logRetry    = 100 * time.Millisecond
	logMaxRetry = 2 * time.Second
	// logAskAgain is when an agent that had no output is asked again even though
	// the instance's record has not changed.
	logAskAgain = 5 * time.Second
	// logOverlap is how far a resumed stream looks back before the last line it
	// saw; lines seen are recognised and left out.
	logOverlap = 5 * time.Second
)

// errNothingLeft ends a follow whose instances have all been removed.
var errNothingLeft = errors.New("no instance is left to follow")

// logFollow is one FollowLogs call that follows. Its manager keeps one worker a
// source; all of them write to one channel, and the client's reading speed holds
// them back.
type logFollow struct {
	h       *handlers
	targets logTargets
	req     *pb.FollowLogsRequest
	group   *errgroup.Group
	out     chan *pb.LogEntry
	active  map[logSource]*logWorker
}

// logWorker is what the manager knows of a worker.
type logWorker struct {
	cancel context.CancelFunc
	// ended is closed once the worker ends or is about to.
	ended <-chan struct{}
	// leaving fires when the source is not wanted any more; nil while it is.
	leaving *time.Timer
}

func (h *handlers) followLogs(ctx context.Context, targets logTargets, req *pb.FollowLogsRequest, send func(*pb.LogEntry) error) error {
	group, ctx := errgroup.WithContext(ctx)
	f := &logFollow{
		h: h, targets: targets, req: req, group: group,
		out: make(chan *pb.LogEntry), active: map[logSource]*logWorker{},
	}
	group.Go(func() error { return f.manage(ctx) })
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-h.closing:
				return errClosing()
			case e := <-f.out:
				if err := send(e); err != nil {
					return err
				}
			}
		}
	})
	if err := group.Wait(); !errors.Is(err, errNothingLeft) {
		return err
	}
	return nil
}

// manage starts and ends workers as instances appear, move and go.
func (f *logFollow) manage(ctx context.Context) error {
	defer func() {
		for _, w := range f.active {
			if w.leaving != nil {
				w.leaving.Stop()
			}
			w.cancel()
		}
	}()
	for first := true; ; first = false {
		view, err := f.h.local(ctx)
		if err != nil {
			return err
		}
		ws := memdb.NewWatchSet()
		sources, err := f.targets.sources(view, ws)
		if err != nil {
			return err
		}
		f.keep(ctx, sources, first)
		if f.targets.gone(view) {
			return f.finish(ctx)
		}
		if err := ws.WatchCtx(ctx); err != nil {
			return err
		}
	}
}

// keep makes the workers those of sources.
func (f *logFollow) keep(ctx context.Context, sources []logSource, first bool) {
	for s, w := range f.active {
		select {
		case <-w.ended:
			delete(f.active, s)
		default:
		}
	}
	wanted := make(map[logSource]bool, len(sources))
	for _, s := range sources {
		wanted[s] = true
		w, ok := f.active[s]
		if !ok || w.leaving != nil && !w.leaving.Stop() {
			f.start(ctx, s, first)
			continue
		}
		w.leaving = nil
	}
	for s, w := range f.active {
		if !wanted[s] && w.leaving == nil {
			w.leaving = time.AfterFunc(logLinger, w.cancel)
		}
	}
}

func (f *logFollow) start(ctx context.Context, s logSource, first bool) {
	ctx, cancel := context.WithCancel(ctx)
	f.active[s] = &logWorker{cancel: cancel, ended: ctx.Done()}
	r := &logReader{f: f, source: s, opts: &pb.FollowLogsRequest{Follow: true}}
	if first {
		r.opts.Tail, r.opts.Since = f.req.GetTail(), f.req.GetSince()
	}
	f.group.Go(func() error {
		defer cancel()
		r.run(ctx)
		return nil
	})
}

// finish waits for the last lines of instances that were removed: until their
// agents have ended the streams, but no longer than the linger.
func (f *logFollow) finish(ctx context.Context) error {
	timer := time.NewTimer(logLinger)
	defer timer.Stop()
	for _, w := range f.active {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.ended:
		case <-timer.C:
			return errNothingLeft
		}
	}
	return errNothingLeft
}

// logReader reads one source for as long as its worker lives, over broken
// streams, without a line twice.
type logReader struct {
	f      *logFollow
	source logSource
	opts   *pb.FollowLogsRequest

	// last is the time of the last line, by the agent's clock, and atLast how many
	// lines had that time.
	last   time.Time
	atLast int
	// since is when the last line came or the first attempt was made, by this peer's clock.
	since time.Time
	// told is true after a line has said that the source cannot be read.
	told bool
}

// run ends with ctx, or when the instance has been removed and its agent has no
// more of it.
func (r *logReader) run(ctx context.Context) {
	r.since = time.Now()
	for retry := logRetry; ; retry = min(2*retry, logMaxRetry) {
		view, err := r.f.h.local(ctx)
		if err != nil {
			return
		}
		inst, exists := view.Instance(r.source.instance)
		came := false
		err = r.f.h.readLogs(ctx, view, r.source, r.opts, r.fresh(ctx, &came))
		if ctx.Err() != nil {
			return
		}
		if came {
			retry = logRetry
		}
		r.resume()
		if err == nil || holdsNothing(err) {
			if !exists {
				return
			}
			r.waitRecord(ctx, inst.GetModifiedIndex())
			continue
		}
		if !r.told {
			r.told = true
			if offer(ctx, r.f.out, unreadable(r.source, err)) != nil {
				return
			}
		}
		pause.For(ctx, retry)
	}
}

// fresh passes on the lines that were not passed on before a stream broke. Lines
// of one source come in the order of their times.
func (r *logReader) fresh(ctx context.Context, came *bool) func(*pb.LogEntry) error {
	resumedAt, seen := r.last, r.atLast
	return func(e *pb.LogEntry) error {
		*came, r.told = true, false
		at := e.GetTime().AsTime()
		switch {
		case at.Before(resumedAt):
			return nil
		case at.Equal(resumedAt) && seen > 0:
			seen--
			return nil
		case at.Equal(r.last):
			r.atLast++
		default:
			r.last, r.atLast = at, 1
		}
		r.since = time.Now()
		return offer(ctx, r.f.out, e)
	}
}

// resume sets the options so that the next stream begins before the last line
// that was seen. They are a span of time, so that the clocks of peer and agent
// need not agree.
func (r *logReader) resume() {
	back := time.Since(r.since)
	if !r.last.IsZero() {
		back += logOverlap
	}
	r.opts = &pb.FollowLogsRequest{Follow: true, Since: durationpb.New(back)}
}

// waitRecord blocks until the instance's record differs from the one of index
// modified, because an agent begins an instance's output before it reports on it.
func (r *logReader) waitRecord(ctx context.Context, modified uint64) {
	ctx, cancel := context.WithTimeout(ctx, logAskAgain)
	defer cancel()
	for {
		view, err := r.f.h.local(ctx)
		if err != nil {
			return
		}
		if inst, _ := view.Instance(r.source.instance); inst.GetModifiedIndex() != modified {
			return
		}
		if r.f.h.waitChange(ctx, view) != nil {
			return
		}
	}
}
