package cluster

import (
	"context"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// hopKey is the metadata key that marks a forwarded call; its value is the
	// peer that forwarded it. Such a call goes no further.
	hopKey = "x-wasmatrix-forwarded-by"
	// detailHop marks the refusal of a forwarded call whose handler did not run.
	detailHop = "forwarded_by"
)

// LeaderConn returns a connection to the leader's API, shared and not to be
// closed, or nil and no error when this peer leads. Without a leader, or while
// its address is not known, it fails with NO_LEADER.
func (p *Peer) LeaderConn(context.Context) (grpc.ClientConnInterface, error) {
	if p.IsLeader() && !p.role.closing.Load() {
		return nil, nil
	}
	id, address := p.Leader()
	if id == "" || id == p.cfg.ID || address == "" || p.role.closing.Load() {
		return nil, p.noLeader()
	}
	conn, err := p.dial(address)
	if err != nil {
		return nil, apierror.From(err)
	}
	return conn, nil
}

// waitLeaderConn is LeaderConn, but waits for a leader until ctx ends.
func (p *Peer) waitLeaderConn(ctx context.Context) (grpc.ClientConnInterface, error) {
	for {
		changed := p.changed.wait()
		conn, err := p.LeaderConn(ctx)
		if err == nil || p.role.closing.Load() || p.role.outside.Load() || p.disk.hanging.Load() > 0 || p.isElectedInVain() {
			return conn, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// ForwardUnary returns an interceptor that lets any peer take any unary call of
// ControlPlaneService and ClusterService: what needs the leader runs here when
// this peer leads, and otherwise goes to the leader, one hop at most. While
// there is no leader a call waits for one, up to Timers.LeaderWait. Of the
// metadata only the correlation id and the caller's name go along. It must run
// inside of the interceptors that authenticate the caller.
func (p *Peer) ForwardUnary() grpc.UnaryServerInterceptor {
	methods := leaderMethods()
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		reply, ok := methods[info.FullMethod]
		if !ok || isStale(req) {
			return next(ctx, req)
		}
		if by := metadata.ValueFromIncomingContext(ctx, hopKey); len(by) > 0 {
			if p.waitReign(ctx) {
				return next(ctx, req)
			}
			return nil, p.noLeader().With(detailHop, by[0])
		}
		f := &forwarded{peer: p, method: info.FullMethod, req: req, reply: reply}
		out, err := f.run(ctx, next)
		if err != nil && !f.reads() {
			err = f.attempts.Conclude(ctx, err, requestID(req))
		}
		return out, err
	}
}

// waitReign reports whether this peer leads. One that was elected a moment ago
// waits until it has seen what was committed before.
func (p *Peer) waitReign(ctx context.Context) bool {
	for {
		changed := p.changed.wait()
		r := p.raft.Load()
		switch {
		case p.IsLeader():
			return true
		case r == nil || r.State() != raft.Leader || p.role.closing.Load() || p.isElectedInVain() || !pause(ctx, time.Hour, changed):
			return false
		}
	}
}

// forwarded is one call that needs the leader.
type forwarded struct {
	peer   *Peer
	method string
	req    any
	reply  protoreflect.MessageType
	// attempts is what became of a write so far.
	attempts apierror.Attempts
}

// run finds the leader and makes the call. It tries again only when that cannot
// do anything twice, so that an election looks to the caller like a slow call.
func (f *forwarded) run(ctx context.Context, next grpc.UnaryHandler) (any, error) {
	limit := f.peer.cfg.Timers.LeaderWait
	if end, bounded := ctx.Deadline(); bounded {
		// The answer that there is no leader must still reach the caller.
		limit = min(limit, time.Until(end)*4/5)
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		changed := f.peer.changed.wait()
		conn, err := f.peer.waitLeaderConn(wait)
		if err != nil {
			return nil, err
		}
		var reply any
		if conn == nil {
			reply, err = next(ctx, f.req)
		} else {
			reply, err = f.call(ctx, conn)
		}
		if err == nil || !f.mayRepeat(err) {
			return reply, err
		}
		f.attempts.Note(apierror.OfWrite(ctx, err, ""))
		// The leader that answered, or did not, may still count as the leader here.
		if !pause(wait, leaderRetry, changed) {
			return nil, err
		}
	}
}

// leaderRetry is how long a call waits for news of another leader before it
// tries the same one again.
const leaderRetry = 50 * time.Millisecond

func (f *forwarded) call(ctx context.Context, conn grpc.ClientConnInterface) (proto.Message, error) {
	reply := f.reply.New().Interface()
	until, stop := f.peer.whileLed(ctx, f.isRepeatable())
	defer stop()
	if err := conn.Invoke(f.peer.hop(until), f.method, f.req, reply); err != nil {
		return nil, f.lost(ctx, err)
	}
	return reply, nil
}

// whileLed returns a context that also ends when another peer is known to lead:
// a leader that is paused or cut off does not answer, and does not refuse either.
func (p *Peer) whileLed(ctx context.Context, repeatable bool) (context.Context, context.CancelFunc) {
	if !repeatable {
		return ctx, func() {}
	}
	out, stop := context.WithCancel(ctx)
	leader, _ := p.Leader()
	go func() {
		defer stop()
		for {
			changed := p.changed.wait()
			if now, _ := p.Leader(); now != "" && now != leader || !pause(out, time.Hour, changed) {
				return
			}
		}
	}()
	return out, stop
}

// hop is the context of a call that this peer passes on for the caller of ctx.
// Nothing of the caller's other metadata goes along.
func (p *Peer) hop(ctx context.Context) context.Context {
	out := metadata.NewOutgoingContext(ctx, metadata.Pairs(hopKey, p.cfg.ID))
	if id := correlation.ID(ctx); id != "" {
		out = metadata.AppendToOutgoingContext(out, correlation.Header, id)
	}
	return identity.ForwardCaller(out)
}

// lost turns the loss of the connection into NO_LEADER with an unknown outcome,
// and the end of the caller's time during a write into an unknown one too; what
// the leader itself answered stays as it is.
func (f *forwarded) lost(ctx context.Context, err error) error {
	st, ok := status.FromError(err)
	if !ok || len(st.Details()) > 0 {
		return err
	}
	if ctx.Err() != nil {
		if f.reads() {
			return err
		}
		return contextError(ctx)
	}
	if code := st.Code(); code != codes.Unavailable && code != codes.Canceled {
		if f.reads() {
			return err
		}
		// Where the call was cut short is not known, so neither is its effect.
		return unknown(apierror.CodeOf(err), "the call to the leader failed: "+st.Message())
	}
	return unknown(pb.ErrorCode_ERROR_CODE_NO_LEADER, "the leader could not be reached, or went away during the call: "+st.Message())
}

// mayRepeat reports whether the call failed for want of a leader, and doing it
// again does nothing twice.
func (f *forwarded) mayRepeat(err error) bool {
	e := apierror.From(err)
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER {
		return false
	}
	return f.isRepeatable() || e.Detail(detailHop) != ""
}

// isRepeatable reports whether the request only reads, or has an id by which its
// repetition is known.
func (f *forwarded) isRepeatable() bool {
	if identified, ok := f.req.(interface{ GetRequestId() string }); ok && identified.GetRequestId() != "" {
		return true
	}
	return f.reads()
}

// reads reports whether the call changes nothing.
func (f *forwarded) reads() bool {
	_, reads := f.req.(reader)
	return reads
}

// requestID returns the id by which a write can be repeated, or "".
func requestID(req any) string {
	if r, ok := req.(interface{ GetRequestId() string }); ok {
		return r.GetRequestId()
	}
	return ""
}

// reader is a request that changes nothing and says how fresh the answer must be.
type reader interface {
	GetRead() *pb.ReadOptions
}

func isStale(req any) bool {
	r, ok := req.(reader)
	return ok && r.GetRead().GetStale()
}

// leaderMethods are the unary methods that need the leader, with the type of
// their answer.
func leaderMethods() map[string]protoreflect.MessageType {
	local := map[string]bool{
		pb.ControlPlaneService_Invoke_FullMethodName:       true,
		pb.ControlPlaneService_CallProvider_FullMethodName: true,
		pb.ClusterService_Status_FullMethodName:            true,
		pb.ClusterService_StateHash_FullMethodName:         true,
	}
	out := map[string]protoreflect.MessageType{}
	for _, service := range []grpc.ServiceDesc{pb.ControlPlaneService_ServiceDesc, pb.ClusterService_ServiceDesc} {
		for _, m := range service.Methods {
			full := "/" + service.ServiceName + "/" + m.MethodName
			if reply := replyType(full); reply != nil && !local[full] {
				out[full] = reply
			}
		}
	}
	return out
}

func replyType(fullMethod string) protoreflect.MessageType {
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(fullMethod, "/"), "/", "."))
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return nil
	}
	method, ok := d.(protoreflect.MethodDescriptor)
	if !ok {
		return nil
	}
	reply, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		return nil
	}
	return reply
}
