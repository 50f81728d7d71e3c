package client

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// sessionSpan is how far the writes of one session reach from the first that has
	// no answer; then the next session begins. The server takes 256.
	sessionSpan = 200
	// maxDoubts bounds how many writes with an unknown outcome are remembered. The
	// server knows their request ids too, for as long as their session lives.
	maxDoubts = 4096
	// sessionPause is how long a client writes without a session after the cluster
	// had none for it.
	sessionPause = time.Minute
	// sessionAttempts bounds how often a write that certainly was not done begins
	// again because its session was gone.
	sessionAttempts = 3
)

// sessions gives each write its place in a session of the cluster.
type sessions struct {
	open func(ctx context.Context) (*pb.OpenSessionResponse, error)

	mu      sync.Mutex
	current *session
	// opening is closed when the one that opens a session has finished.
	opening chan struct{}
	// until is when to ask for a session again.
	until time.Time
	// doubts are the places of writes that may have been done, by request id, so
	// that a repetition by the caller is known as one.
	doubts map[string]place
}

// session is one session, under the lock of its sessions.
type session struct {
	id   string
	idle time.Duration
	used time.Time
	// next is the number of the next write; waiting are those without an answer.
	next    uint64
	waiting map[uint64]bool
}

// outstanding returns the first number without an answer.
func (s *session) outstanding() uint64 {
	first := s.next
	for n := range s.waiting {
		first = min(first, n)
	}
	return first
}

// place is a write's number in a session; without a session it is zero.
type place struct {
	session  *session
	sequence uint64
	// again is set for a write that may have been done before.
	again bool
}

func newSessions(open func(ctx context.Context) (*pb.OpenSessionResponse, error)) *sessions {
	return &sessions{open: open, doubts: map[string]place{}}
}

// enter gives the write with a request id its place, and says from which number
// on the client waits for answers. It opens a session when there is none. An
// error means that the write was not sent; a cluster without sessions is none.
func (s *sessions) enter(ctx context.Context, requestID string) (at place, outstanding uint64, err error) {
	for {
		s.mu.Lock()
		if at, known := s.doubts[requestID]; known {
			delete(s.doubts, requestID)
			at.again = true
			outstanding = at.session.outstanding()
			s.mu.Unlock()
			return at, outstanding, nil
		}
		if c := s.current; c != nil && c.next-c.outstanding() < sessionSpan && time.Since(c.used) < c.idle*3/4 {
			at = place{session: c, sequence: c.next}
			c.waiting[c.next] = true
			c.next++
			c.used = time.Now()
			outstanding = c.outstanding()
			s.mu.Unlock()
			return at, outstanding, nil
		}
		if time.Now().Before(s.until) {
			s.mu.Unlock()
			return place{}, 0, nil
		}
		if wait := s.opening; wait != nil {
			s.mu.Unlock()
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return place{}, 0, ctx.Err()
			}
		}
		s.opening = make(chan struct{})
		s.mu.Unlock()
		if err := s.begin(ctx); err != nil {
			return place{}, 0, err
		}
	}
}

// begin opens a session. The caller has made itself the one that does.
func (s *sessions) begin(ctx context.Context) error {
	began := time.Now()
	resp, err := s.open(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.opening)
	s.opening = nil
	switch {
	case err == nil:
		s.current = &session{
			id: resp.GetSessionId(), idle: resp.GetIdleTimeout().AsDuration(), used: began, next: 1, waiting: map[uint64]bool{},
		}
		return nil
	case transient(err), ctx.Err() != nil, apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT:
		return err
	default:
		// A cluster of an older version, or one that has too many; what else may be
		// wrong the write itself is told.
		s.until = time.Now().Add(sessionPause)
		return nil
	}
}

// leave takes in what a write came to: done, refused for certain, or in doubt.
func (s *sessions) leave(at place, requestID string, doubtful bool) {
	if at.session == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !doubtful {
		delete(at.session.waiting, at.sequence)
		return
	}
	for id := range s.doubts {
		if len(s.doubts) < maxDoubts {
			break
		}
		delete(s.doubts, id)
	}
	s.doubts[requestID] = at
}

// retire ends the use of a session that the cluster does not know any more.
func (s *sessions) retire(at place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == at.session {
		s.current = nil
	}
}

// gone reports whether a write was refused because its session is not known.
func (at place) gone(err error) bool {
	if at.session == nil || apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT {
		return false
	}
	e := apierror.From(err)
	return e.Detail("session") == at.session.id && e.Detail("first_outstanding") == "" &&
		e.Detail(apierror.DetailOutcome) == apierror.OutcomeUnknown
}

// conditional is a write that can be given a place in a session.
type conditional interface {
	proto.Message
	GetRequestId() string
	GetWrite() *pb.WriteOptions
}

// placed returns a copy of a write with its place in it. The copy shares what is
// inside of the write and is not changed.
func placed(w conditional, at place, outstanding uint64) proto.Message {
	if at.session == nil {
		return w
	}
	options := &pb.WriteOptions{
		IfIndex: w.GetWrite().GetIfIndex(), IfAbsent: w.GetWrite().GetIfAbsent(),
		SessionId: at.session.id, Sequence: at.sequence, FirstOutstanding: min(outstanding, at.sequence),
	}
	from := w.ProtoReflect()
	to := from.New()
	for fd, v := range from.Range {
		to.Set(fd, v)
	}
	to.Set(from.Descriptor().Fields().ByName("write"), protoreflect.ValueOfMessage(options.ProtoReflect()))
	return to.Interface()
}

// inSession makes a write, in a session unless the caller chose one, and says of
// its failure whether it may have been done. call makes it until it succeeds or
// fails for good, and notes its attempts.
func (t *transport) inSession(ctx context.Context, w conditional, call func(context.Context, proto.Message, *apierror.Attempts) error) error {
	id := w.GetRequestId()
	if w.GetWrite().GetSessionId() != "" {
		attempts := &apierror.Attempts{}
		err := call(ctx, w, attempts)
		return conclude(ctx, attempts.Doubtful(), err, id)
	}
	for again := 0; ; again++ {
		at, outstanding, err := t.sessions.enter(ctx, id)
		if err != nil {
			if errors.Is(err, context.Canceled) {
				return err
			}
			// The write itself was never sent.
			return conclude(ctx, false, err, id)
		}
		attempts := &apierror.Attempts{}
		err = call(ctx, placed(w, at, outstanding), attempts)
		doubtful := attempts.Doubtful() || at.again
		if at.gone(err) {
			t.sessions.retire(at)
			if !doubtful && again < sessionAttempts {
				t.sessions.leave(at, id, false)
				continue
			}
		}
		t.sessions.leave(at, id, err != nil && doubtful && !isAnswer(err))
		return conclude(ctx, doubtful, err, id)
	}
}

// conclude says of the failure of a write what became of it. The end of the
// caller's own context stays what it is.
func conclude(ctx context.Context, doubtful bool, err error, requestID string) error {
	if err == nil || errors.Is(err, context.Canceled) || isAnswer(err) {
		return err
	}
	outcome := apierror.OutcomeFailed
	if doubtful {
		outcome = apierror.OutcomeUnknown
	}
	return apierror.FromProto(apierror.From(err).Proto(ctx)).
		With(apierror.DetailOutcome, outcome).With(apierror.DetailRequestID, requestID)
}

// isAnswer reports whether a failure is the one answer to its request id.
func isAnswer(err error) bool {
	own, ok := errors.AsType[*apierror.Error](err)
	return ok && own.Detail(apierror.DetailIndex) != ""
}
