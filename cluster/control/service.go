package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Proposer brings a command into the Raft log.
type Proposer interface {
	// Propose returns once the command is committed and applied here. A refusal by
	// the state is returned as an *apierror.Error; so is NO_LEADER when this peer
	// does not lead.
	Propose(ctx context.Context, cmd *pb.Command) (*pb.CommandResult, error)
}

// Viewer reads the replicated state.
type Viewer interface {
	// View returns the state as fresh as read asks for: linearizable without
	// options, which only the leader can serve.
	View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error)
	// Changed is closed once this peer's state is newer than the index; it may be
	// closed early.
	Changed(after uint64) <-chan struct{}
}

// Modules keeps the bytes of modules; *modules.Replicator is one.
type Modules interface {
	// Admit inspects body to its end and stores it on this peer's disk.
	Admit(body io.Reader, expectedDigest string) (*pb.Module, error)
	// Replicate returns once a majority of the voters have the module on disk.
	Replicate(ctx context.Context, m *pb.Module) error
	// Open returns a module's bytes, from another peer if need be. The caller closes them.
	Open(ctx context.Context, digest string) (io.ReadCloser, error)
}

// Config is what the service works with. All fields are required.
type Config struct {
	// Proposer and Viewer are the peer.
	Proposer Proposer
	Viewer   Viewer
	// LeaderConn returns a connection to the leader's API, nil without an error
	// when this peer leads, and NO_LEADER when there is none.
	LeaderConn func(ctx context.Context) (grpc.ClientConnInterface, error)
	// Modules keeps the modules' bytes.
	Modules Modules
	// AgentConn returns a shared connection to the agent at host:port; it stays open.
	AgentConn func(address string) (grpc.ClientConnInterface, error)
	// Explain says for each node whether it can take the instance and why not.
	Explain func(view fsm.View, instance *pb.Instance) []*pb.NodeVerdict
	// Logger takes the audit log, at level Info.
	Logger *slog.Logger
}

// Service is ControlPlaneService. Register is the only way to serve it, so that
// no call gets past the access table.
type Service struct {
	handlers *handlers
	guard    *guard
	closed   sync.Once
}

// handlers implements the calls, all of them already authorised.
type handlers struct {
	pb.UnimplementedControlPlaneServiceServer
	Config

	// suffix makes the random end of an instance id.
	suffix func() string
	// closing is closed when streams are to end because the peer goes away.
	closing chan struct{}
}

// New makes the service. It starts nothing.
func New(cfg Config) (*Service, error) {
	if cfg.Proposer == nil || cfg.Viewer == nil || cfg.LeaderConn == nil || cfg.Modules == nil ||
		cfg.AgentConn == nil || cfg.Explain == nil || cfg.Logger == nil {
		return nil, errors.New("control service: every field of its configuration is required")
	}
	return &Service{
		handlers: &handlers{Config: cfg, suffix: randomSuffix, closing: make(chan struct{})},
		guard:    &guard{log: cfg.Logger},
	}, nil
}

// Register adds ControlPlaneService to a server, every call behind the access
// table and the audit log. The server's interceptors must put the caller and the
// correlation id into the context and check the rules of the proto files.
func (s *Service) Register(to grpc.ServiceRegistrar) {
	desc := pb.ControlPlaneService_ServiceDesc
	desc.Methods = make([]grpc.MethodDesc, len(pb.ControlPlaneService_ServiceDesc.Methods))
	for i, m := range pb.ControlPlaneService_ServiceDesc.Methods {
		m.Handler = s.guard.unary(fullMethod(m.MethodName), m.Handler)
		desc.Methods[i] = m
	}
	desc.Streams = make([]grpc.StreamDesc, len(pb.ControlPlaneService_ServiceDesc.Streams))
	for i, m := range pb.ControlPlaneService_ServiceDesc.Streams {
		m.Handler = s.guard.stream(fullMethod(m.StreamName), m.Handler)
		desc.Streams[i] = m
	}
	to.RegisterService(&desc, s.handlers)
}

// Close ends the streams that follow events and logs, so that a graceful stop of
// the server does not wait for their clients. Call it before that stop; a second
// call does nothing.
func (s *Service) Close() { s.closed.Do(func() { close(s.handlers.closing) }) }

func fullMethod(name string) string {
	return "/" + pb.ControlPlaneService_ServiceDesc.ServiceName + "/" + name
}
