package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Bounds of what waits for one slow reader.
const (
	maxFollowLines = 2000
	maxFollowBytes = 1 << 20
)

// logFollower is one reader of the output of some instances. Writers never wait
// for it: what does not fit is dropped, and a line says so.
type logFollower struct {
	ids, names map[string]bool // not changed once it is attached

	mu      sync.Mutex
	queue   []*pb.LogEntry
	bytes   int
	dropped int
	ended   bool
	wake    chan struct{}
}

func (f *logFollower) wants(l *instanceLog) bool { return f.ids[l.id] || f.names[l.name] }

func (f *logFollower) push(e *pb.LogEntry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return
	}
	if len(f.queue) >= maxFollowLines || f.bytes >= maxFollowBytes {
		f.dropped++
		return
	}
	f.queue = append(f.queue, e)
	f.bytes += entrySize(e)
	f.poke()
}

func (f *logFollower) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.poke()
}

func (f *logFollower) poke() {
	poke(f.wake)
}

// take returns what waits for the reader, and whether nothing will follow.
func (f *logFollower) take(gap func(dropped int) *pb.LogEntry) ([]*pb.LogEntry, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	lines := f.queue
	f.queue, f.bytes = nil, 0
	if f.dropped > 0 {
		lines = append(lines, gap(f.dropped))
		f.dropped = 0
	}
	return lines, f.ended
}

// follow sends the kept lines that req asks for in the order of their times and,
// when it asks to follow, everything that comes later, until ctx ends or none of
// its instances is left on this node.
func (b *logBook) follow(ctx context.Context, req *pb.FollowLogsRequest, send func(*pb.LogEntry) error) error {
	f, kept, err := b.subscribe(req)
	if err != nil {
		return err
	}
	defer b.unsubscribe(f)
	for _, e := range kept {
		if err := send(e); err != nil {
			return err
		}
	}
	if !req.GetFollow() {
		return nil
	}
	for {
		lines, ended := f.take(b.gap)
		for _, e := range lines {
			if err := send(e); err != nil {
				return err
			}
		}
		if ended {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.wake:
		}
	}
}

// gap is the line that stands for dropped ones.
func (b *logBook) gap(dropped int) *pb.LogEntry {
	return &pb.LogEntry{
		Time: timestamppb.New(b.now()), NodeId: b.node,
		Stream: pb.LogStream_LOG_STREAM_SYSTEM, Level: pb.LogLevel_LOG_LEVEL_WARN,
		Message: fmt.Sprintf("%d lines were left out here: the reader is too slow", dropped),
	}
}

// subscribe resolves the targets, takes the kept lines and registers a follower
// when the request asks to follow.
func (b *logBook) subscribe(req *pb.FollowLogsRequest) (*logFollower, []*pb.LogEntry, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := &logFollower{ids: map[string]bool{}, names: map[string]bool{}, wake: make(chan struct{}, 1)}
	for _, target := range req.GetTargets() {
		if err := b.resolveLocked(f, target); err != nil {
			return nil, nil, err
		}
	}
	var oldest time.Time
	if req.GetSince() != nil {
		oldest = b.now().Add(-req.GetSince().AsDuration())
	}
	attached := f
	if req.GetFollow() {
		b.followers[f] = struct{}{}
	} else {
		attached = nil
	}
	var kept []*pb.LogEntry
	for _, l := range b.logs {
		if f.wants(l) {
			kept = append(kept, l.subscribe(attached, func(all []*pb.LogEntry) []*pb.LogEntry {
				return tailOf(all, int(req.GetTail()), oldest)
			})...)
		}
	}
	slices.SortStableFunc(kept, func(x, y *pb.LogEntry) int {
		return x.GetTime().AsTime().Compare(y.GetTime().AsTime())
	})
	return f, kept, nil
}

func (b *logBook) unsubscribe(f *logFollower) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.followers, f)
	for _, l := range b.logs {
		if f.wants(l) {
			l.detach(f)
		}
	}
}

// resolveLocked adds what target names: an id, all instances of a name, or the
// one id that begins with it.
func (b *logBook) resolveLocked(f *logFollower, target string) error {
	if _, ok := b.logs[target]; ok {
		f.ids[target] = true
		return nil
	}
	var ids, prefixed []string
	for id, l := range b.logs {
		if l.name == target {
			ids = append(ids, id)
		}
		if strings.HasPrefix(id, target) {
			prefixed = append(prefixed, id)
		}
	}
	switch {
	case len(ids) > 0:
		f.names[target] = true
	case len(prefixed) == 1:
		f.ids[prefixed[0]] = true
	case len(prefixed) > 1:
		slices.Sort(prefixed)
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%q begins the ids of several instances", target).
			With("candidates", fmt.Sprint(prefixed[:min(len(prefixed), 8)])).With("node", b.node)
	default:
		return errNoInstance(target, b.node)
	}
	return nil
}

// tailOf returns the last n entries younger than oldest; n = 0 means all, a
// negative n none.
func tailOf(entries []*pb.LogEntry, n int, oldest time.Time) []*pb.LogEntry {
	switch {
	case n < 0:
		return nil
	case n > 0:
		entries = entries[max(0, len(entries)-n):]
	}
	first := len(entries)
	for i, e := range entries {
		if !e.GetTime().AsTime().Before(oldest) {
			first = i
			break
		}
	}
	return entries[first:]
}

// errNoInstance says that this node has no such instance.
func errNoInstance(target, node string) *apierror.Error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance %q on node %s", target, node).
		With("target", target).With("node", node).
		Next("wasmatrix instance list")
}
