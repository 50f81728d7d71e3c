package rpc

import (
	"context"
	"log/slog"
	"time"

	"buf.build/go/protovalidate"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
)

// MaxMessageBytes is the largest gRPC message that servers and clients send or take.
const MaxMessageBytes = 16 << 20

const (
	// A connection whose other side is silent this long is probed, and given up
	// keepaliveTimeout later. 10 s is the shortest interval grpc-go permits a client.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
	// connectTimeout bounds one attempt to connect, so that a machine that is gone
	// holds up a caller only this long.
	connectTimeout = 2 * time.Second
)

// ServerConfig is what the interceptors of one server need.
type ServerConfig struct {
	// Identity is whom the server speaks for. Required: there is no server without mutual TLS.
	Identity *identity.Identity
	// Logger takes the access log: failures inside wasmatrix as errors, refusals
	// as infos, all other calls as debug lines. Nil means none.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means that they are kept and not shown.
	// Several servers may share one.
	Registerer prometheus.Registerer
}

// ServerOptions returns the options of a gRPC server. Every call then
//
//   - is authenticated by a client certificate of the cluster (identity.Caller),
//   - has a correlation id, the caller's or a new one, which the response header carries back,
//   - survives a panic of its handler as INTERNAL_ERROR,
//   - is counted, timed and logged,
//   - reaches its handler only with a request that keeps the rules of the proto files,
//   - fails, if it does, with a status that carries a complete pb.Error.
//
// Interceptors given to the server by further options run inside of these.
func ServerOptions(cfg ServerConfig) []grpc.ServerOption {
	logger := cfg.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	validator, err := protovalidate.New()
	s := &server{
		logger:       logger,
		validator:    validator,
		validatorErr: err,
		metrics:      newMetrics(cfg.Registerer),
	}
	return []grpc.ServerOption{
		cfg.Identity.ServerOption(),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxSendMsgSize(MaxMessageBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	}
}

// DialOptions returns the options that all gRPC clients share, besides their
// credentials: the correlation id of the context goes with every call, dead
// connections are noticed, a server that came back is reached within about a
// second, and no proxy of the environment is used.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(propagate(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(propagate(ctx), desc, cc, method, opts...)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes), grpc.MaxCallSendMsgSize(MaxMessageBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithNoProxy(),
	}
}

// RegisterHealthAndReflection adds the standard health and reflection services
// to server. The caller sets what h answers.
func RegisterHealthAndReflection(server *grpc.Server, h *health.Server) {
	healthpb.RegisterHealthServer(server, h)
	reflection.Register(server)
}

// propagate copies the correlation id into the outgoing metadata unless one stands there.
func propagate(ctx context.Context) context.Context {
	id := correlation.ID(ctx)
	if id == "" {
		return ctx
	}
	if md, ok := metadata.FromOutgoingContext(ctx); ok && len(md.Get(correlation.Header)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, correlation.Header, id)
}
