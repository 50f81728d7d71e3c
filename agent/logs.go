package agent

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Bounds of what is kept of one instance's output.
const (
	maxLogLines      = 1000
	maxLogBytes      = 256 << 10
	maxLineBytes     = 16 << 10
	maxLogAttributes = 32
	maxReasonBytes   = 1024
)

// logBook keeps the recent output of the instances of this node. Output is held
// in memory only and never leaves the node unless someone asks for it.
//
// Locks are taken in the order book, log, follower, so that instances that
// write do not wait for each other.
type logBook struct {
	node string
	now  func() time.Time

	mu        sync.Mutex
	logs      map[string]*instanceLog
	followers map[*logFollower]struct{}
}

func newLogBook(node string, now func() time.Time) *logBook {
	return &logBook{node: node, now: now, logs: map[string]*instanceLog{}, followers: map[*logFollower]struct{}{}}
}

// open returns the log of an instance; it is the same over all its attempts and
// generations until it is dropped.
func (b *logBook) open(id, name string) *instanceLog {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l, ok := b.logs[id]; ok {
		return l
	}
	l := &instanceLog{book: b, id: id, name: name}
	b.logs[id] = l
	for f := range b.followers {
		if f.wants(l) {
			l.attach(f)
		}
	}
	return l
}

// drop forgets an instance's output and ends followers that have nothing left to follow.
func (b *logBook) drop(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.logs, id)
	for f := range b.followers {
		if !slices.ContainsFunc(slices.Collect(maps.Values(b.logs)), f.wants) {
			f.end()
		}
	}
}

// close ends all followers.
func (b *logBook) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for f := range b.followers {
		f.end()
	}
}

// instanceLog is the recent output of one instance. Its methods may be called concurrently.
type instanceLog struct {
	book     *logBook
	id, name string

	mu        sync.Mutex
	entries   []*pb.LogEntry
	bytes     int
	followers []*logFollower
}

// add records one line; the instance, node and time are filled in here. A long
// line is cut.
func (l *instanceLog) add(e *pb.LogEntry) {
	e.Message = cutLine(e.Message)
	e.InstanceId, e.NodeId = l.id, l.book.node
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Time = timestamppb.New(l.book.now())
	l.entries = append(l.entries, e)
	l.bytes += entrySize(e)
	drop := 0
	for len(l.entries)-drop > maxLogLines || l.bytes > maxLogBytes && len(l.entries)-drop > 1 {
		l.bytes -= entrySize(l.entries[drop])
		l.entries[drop] = nil
		drop++
	}
	l.entries = l.entries[drop:]
	for _, f := range l.followers {
		f.push(e)
	}
}

func (l *instanceLog) attach(f *logFollower) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.followers = append(l.followers, f)
}

func (l *instanceLog) detach(f *logFollower) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.followers = slices.DeleteFunc(l.followers, func(o *logFollower) bool { return o == f })
}

// subscribe returns the kept lines that keep selects and, when f is given,
// attaches f in the same step so that no line is lost or sent twice.
func (l *instanceLog) subscribe(f *logFollower, keep func([]*pb.LogEntry) []*pb.LogEntry) []*pb.LogEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f != nil {
		l.followers = append(l.followers, f)
	}
	return slices.Clone(keep(l.entries))
}

// note records what the agent itself has to say about the instance.
func (l *instanceLog) note(level pb.LogLevel, generation uint64, correlationID, message string) {
	l.add(&pb.LogEntry{
		Stream: pb.LogStream_LOG_STREAM_SYSTEM, Level: level, Message: message,
		Generation: generation, CorrelationId: correlationID,
	})
}

func entrySize(e *pb.LogEntry) int {
	n := len(e.GetMessage()) + len(e.GetCorrelationId()) + 128
	for k, v := range e.GetAttributes() {
		n += len(k) + len(v)
	}
	return n
}

// cutLine returns s as valid UTF-8 of at most maxLineBytes.
func cutLine(s string) string {
	if len(s) > maxLineBytes {
		cut := maxLineBytes
		for cut > maxLineBytes-utf8.UTFMax && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// oneLine returns s as one line of valid UTF-8 of at most maxReasonBytes. What a
// guest had a part in must not make a report or an error unfit to be sent.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "\uFFFD")), " ")
	if len(s) > maxReasonBytes {
		s = strings.ToValidUTF8(s[:maxReasonBytes], "") // without the half of a character at the cut
	}
	return s
}

// cutAttributes bounds the attributes of a log call: at most maxLogAttributes,
// the first in the order of their names, and no longer together than a line.
func cutAttributes(in map[string]string) map[string]string {
	if len(in) == 0 {
		return nil
	}
	out := make(map[string]string, min(len(in), maxLogAttributes))
	room := maxLineBytes
	for _, k := range slices.Sorted(maps.Keys(in)) {
		v := in[k]
		room -= len(k) + len(v)
		if len(out) == maxLogAttributes || room < 0 {
			break
		}
		out[strings.ToValidUTF8(k, "\uFFFD")] = strings.ToValidUTF8(v, "\uFFFD")
	}
	return out
}

// lineWriter turns a guest's output stream into log lines. Its writes never
// fail and never block on a reader of the log.
type lineWriter struct {
	log           *instanceLog
	stream        pb.LogStream
	generation    uint64
	correlationID func() string

	mu   sync.Mutex
	rest []byte
}

// Write takes the next bytes of the stream.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	total := len(p)
	for len(p) > 0 {
		line, after, found := cutAt(p, maxLineBytes-len(w.rest))
		p = after
		w.rest = append(w.rest, line...)
		if found || len(w.rest) >= maxLineBytes {
			w.emit()
		}
	}
	return total, nil
}

// flush writes an unfinished last line.
func (w *lineWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.rest) > 0 {
		w.emit()
	}
}

func (w *lineWriter) emit() {
	line := strings.TrimSuffix(string(w.rest), "\r")
	w.rest = w.rest[:0]
	w.log.add(&pb.LogEntry{
		Stream: w.stream, Message: line, Generation: w.generation, CorrelationId: w.correlationID(),
	})
}

// cutAt splits p after its first line feed, which is dropped, or after limit
// bytes when there is none before.
func cutAt(p []byte, limit int) (line, after []byte, found bool) {
	window := p[:min(len(p), limit+1)]
	if i := slices.Index(window, '\n'); i >= 0 {
		return p[:i], p[i+1:], true
	}
	limit = min(len(p), limit)
	return p[:limit], p[limit:], false
}
