package client

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// attemptTimeout bounds one attempt of a call that may be repeated while
	// another peer could answer it: a machine that hangs accepts and stays silent.
	attemptTimeout = 5 * time.Second
	// The pause after a full round of peers grows from minPause to maxPause. An
	// election takes some hundred milliseconds.
	minPause = 25 * time.Millisecond
	maxPause = 400 * time.Millisecond
	// guestPatience is by how much Invoke and CallProvider wait longer.
	guestPatience = 4
)

// transport is the grpc.ClientConnInterface below the generated clients: it
// chooses the peer of each call.
type transport struct {
	timeout        time.Duration
	attemptTimeout time.Duration
	logger         *slog.Logger
	peers          *peerSet
	sessions       *sessions
}

func newTransport(cfg Config) (*transport, error) {
	peers, err := newPeerSet(cfg)
	if err != nil {
		return nil, err
	}
	t := &transport{timeout: cfg.Timeout, attemptTimeout: attemptTimeout, logger: cfg.Logger, peers: peers}
	t.sessions = newSessions(func(ctx context.Context) (*pb.OpenSessionResponse, error) {
		return pb.NewControlPlaneServiceClient(t).OpenSession(ctx, &pb.OpenSessionRequest{})
	})
	return t, nil
}

func (t *transport) close() error { return t.peers.close() }

// Invoke makes a unary call.
func (t *transport) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	ctx, _ = correlation.Ensure(ctx)
	limit := t.timeout
	switch args.(type) {
	case *pb.InvokeRequest, *pb.CallProviderRequest:
		limit *= guestPatience
	}
	ctx, cancel := withDefaultTimeout(ctx, limit)
	defer cancel()

	pl := plan{method: method, rule: policyOf(args), limited: true}
	if _, status := args.(*pb.StatusRequest); status {
		pl.given = true
	}
	args = withRequestID(args)
	call := func(ctx context.Context, args proto.Message, attempts *apierror.Attempts) error {
		pl.attempts = attempts
		return t.try(ctx, pl, func(ctx context.Context, p *peer) error {
			return p.conn.Invoke(ctx, method, args, reply, opts...)
		})
	}
	var err error
	if w, ok := args.(conditional); ok {
		err = t.inSession(ctx, w, call)
	} else if msg, ok := args.(proto.Message); ok {
		err = call(ctx, msg, nil)
	}
	if err != nil {
		return err
	}
	if status, ok := reply.(*pb.StatusResponse); ok {
		t.peers.learn(status)
	} else {
		t.peers.refreshSoon(ctx)
	}
	return nil
}

// NewStream opens a stream at a peer that can be reached. Once it is open the
// stream stays with that peer; its errors are those of the API.
func (t *transport) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx, _ = correlation.Ensure(ctx)
	search, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	var out grpc.ClientStream
	err := t.try(search, plan{method: method, rule: repeatAlways}, func(_ context.Context, p *peer) error {
		// Not the context of the search: the stream outlives it.
		stream, err := p.conn.NewStream(ctx, desc, method, opts...)
		if err != nil {
			return err
		}
		out = &peerStream{ClientStream: stream, ended: ctx.Err, failed: func() { t.peers.avoid(p) }}
		return nil
	})
	return out, err
}

// peerStream turns the errors of a stream into those of the API, and notes when
// its peer went away so that the next stream goes elsewhere.
type peerStream struct {
	grpc.ClientStream
	// ended is the Err of the caller's context; that of the stream's own also
	// ends with the stream.
	ended  func() error
	failed func()
}

// RecvMsg receives the next message.
func (s *peerStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if ctxErr := s.ended(); errors.Is(ctxErr, context.Canceled) {
		return ctxErr
	}
	if transient(err) {
		s.failed()
	}
	return apierror.FromProto(apierror.From(err).Proto(s.Context()))
}

// plan is what the search for a peer needs to know of a call.
type plan struct {
	method  string
	rule    repeat
	given   bool // only configured peers
	limited bool // one peer must not use up the time of all
	// attempts takes in what failed attempts of a write may have done; nil for
	// anything else.
	attempts *apierror.Attempts
}

// try makes call at one peer after the other until it succeeds, fails for good,
// or ctx ends.
func (t *transport) try(ctx context.Context, pl plan, call func(context.Context, *peer) error) error {
	began := time.Now()
	seen := &failures{}
	for round := 0; ; round++ {
		peers := t.peers.order(pl.given)
		for _, p := range peers {
			limit := time.Duration(0)
			if pl.limited && pl.rule == repeatAlways && len(peers) > 1 {
				limit = t.attemptTimeout
			}
			again, sent, err := attemptAt(ctx, p, pl.rule, limit, call)
			if err == nil {
				t.peers.prefer(p)
				return nil
			}
			if pl.attempts != nil && sent {
				pl.attempts.Note(apierror.OfWrite(ctx, err, ""))
			}
			seen.note(p.address, err)
			if ctx.Err() != nil {
				return seen.gaveUp(ctx, time.Since(began))
			}
			if !again {
				return apierror.FromProto(apierror.From(err).Proto(ctx))
			}
			t.peers.learnLeader(err)
			t.logger.DebugContext(ctx, "attempt failed", "method", pl.method, "address", p.address, "round", round,
				"error", err, "correlation_id", correlation.ID(ctx))
		}
		if err := seen.refusedByAll(ctx, peers); err != nil {
			return err
		}
		if !rest(ctx, round) {
			return seen.gaveUp(ctx, time.Since(began))
		}
	}
}

// attemptAt makes one attempt, limited unless limit is 0, and reports whether
// another may follow and whether it was sent.
func attemptAt(ctx context.Context, p *peer, rule repeat, limit time.Duration, call func(context.Context, *peer) error) (again, sent bool, err error) {
	a := &attempt{}
	attemptCtx := context.WithValue(ctx, attemptKey{}, a)
	if limit > 0 {
		var cancel context.CancelFunc
		attemptCtx, cancel = context.WithTimeout(attemptCtx, limit)
		defer cancel()
	}
	if err = call(attemptCtx, p); err == nil {
		return false, true, nil
	}
	sent = a.sent.Load()
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		awaitDeadline(attemptCtx)
	}
	hung := attemptCtx.Err() != nil && ctx.Err() == nil
	return hung || rule.mayRepeat(err, sent), sent, err
}

// deadlineSlack is how much earlier than the caller itself a peer may notice that
// the caller's time is over.
const deadlineSlack = 50 * time.Millisecond

// awaitDeadline waits for the deadline of a call that ended a moment before it: then
// it is this deadline that the peer speaks of.
func awaitDeadline(ctx context.Context) {
	if deadline, limited := ctx.Deadline(); limited && time.Until(deadline) < deadlineSlack {
		<-ctx.Done()
	}
}

// attempt is what one attempt is known to have done.
type attempt struct {
	sent atomic.Bool
}

type attemptKey struct{}

// sentNotes is a stats.Handler that notes on the attempt of a call that its
// headers were handed to the connection. Until then no server can have seen it.
type sentNotes struct{}

// TagRPC returns ctx as it is.
func (sentNotes) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC notes that a call was sent.
func (sentNotes) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); !ok {
		return
	}
	if a, ok := ctx.Value(attemptKey{}).(*attempt); ok {
		a.sent.Store(true)
	}
}

// TagConn returns ctx as it is.
func (sentNotes) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn does nothing.
func (sentNotes) HandleConn(context.Context, stats.ConnStats) {}

// rest waits after a round, longer each time and never in step with other
// clients. It reports false when ctx ended first.
func rest(ctx context.Context, round int) bool {
	d := maxPause
	if round < 4 {
		d = minPause << round
	}
	return pause.For(ctx, d/2+rand.N(d/2+1))
}

func withDefaultTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
}
