package identity

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// ForwardedCallerKey is the metadata key under which a peer that forwards a call
// names the original caller. It is believed only when a peer sends it.
const ForwardedCallerKey = "x-wasmatrix-forwarded-caller"

// ServerOption returns the transport credentials of a gRPC server: ServerTLS.
func (id *Identity) ServerOption() grpc.ServerOption {
	return grpc.Creds(credentials.NewTLS(id.ServerTLS()))
}

// DialOption returns the transport credentials of a gRPC client: ClientTLS(allow).
func (id *Identity) DialOption(allow func(Subject) bool) grpc.DialOption {
	return grpc.WithTransportCredentials(credentials.NewTLS(id.ClientTLS(allow)))
}

// Authenticate returns a context that carries the caller of the gRPC request
// that ctx belongs to: the subject of the client's certificate or, for a call
// that a peer forwarded, the subject the peer names. The error is a
// PERMISSION_DENIED for a connection without a client certificate and for a
// forwarded caller that is malformed, of another cluster, or named by anyone but
// a peer, and for a node that does not call for itself where nodes do.
func Authenticate(ctx context.Context) (context.Context, error) {
	caller, err := connected(ctx)
	if err != nil {
		return nil, err
	}
	forwarded := metadata.ValueFromIncomingContext(ctx, ForwardedCallerKey)
	if len(forwarded) == 0 {
		return WithCaller(ctx, caller), nil
	}
	if !caller.IsPeer() {
		return nil, denied("%s is not a peer and cannot call for someone else", caller)
	}
	original, err := ParseSubject(forwarded[0])
	if err != nil || len(forwarded) > 1 {
		return nil, denied("%s forwarded a call of a malformed subject", caller)
	}
	if original.Cluster != caller.Cluster {
		return nil, denied("%s forwarded a call of a subject of cluster %s", caller, original.Cluster)
	}
	if original.Kind == Node && !forwardsNodes(ctx) {
		return nil, denied("%s forwarded a call of %s, which has to make it itself", caller, original)
	}
	return WithCaller(ctx, original), nil
}

// forwardsNodes reports whether a peer may pass on the calls of nodes: those of
// the client API. The sessions of agents, the calls between them and those between
// peers are made directly, and a node with both roles holds a peer's certificate:
// there it must not be able to speak for other nodes.
func forwardsNodes(ctx context.Context) bool {
	method, _ := grpc.Method(ctx)
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	return service == pb.ControlPlaneService_ServiceDesc.ServiceName || service == pb.ClusterService_ServiceDesc.ServiceName
}

// ForwardCaller returns a context for an outgoing call that a peer makes on
// behalf of the caller of ctx. Without a caller it returns ctx.
func ForwardCaller(ctx context.Context) context.Context {
	s, ok := Caller(ctx)
	if !ok {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, ForwardedCallerKey, s.String())
}

// UnaryServerInterceptor puts the authenticated caller into the context of every
// unary call, by the rules of Authenticate.
func UnaryServerInterceptor(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := Authenticate(ctx)
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// StreamServerInterceptor does for streams what UnaryServerInterceptor does for unary calls.
func StreamServerInterceptor(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := Authenticate(stream.Context())
	if err != nil {
		return err
	}
	return next(srv, &authenticatedStream{ServerStream: stream, ctx: ctx})
}

type authenticatedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a gRPC stream hands out its context by a method
}

// Context returns the stream's context with the caller in it.
func (s *authenticatedStream) Context() context.Context { return s.ctx }

// connected returns the subject at the other end of the connection. The TLS
// configuration has checked it already.
func connected(ctx context.Context) (Subject, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Subject{}, denied("the call did not come over a connection")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return Subject{}, denied("the connection carries no client certificate")
	}
	s, err := subjectOf(info.State.PeerCertificates[0])
	if err != nil {
		return Subject{}, denied("%s", err)
	}
	return s, nil
}

func denied(format string, args ...any) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, format, args...)
}
