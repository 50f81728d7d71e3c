package remote

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// Router carries out calls of authenticated callers; *provider.Router is one.
type Router interface {
	Serve(ctx context.Context, caller provider.Caller, req provider.Request) ([]byte, error)
	// Now reads the clock that calls are limited by.
	Now() time.Duration
}

// Server is the serving side of NodeAgentService.InvokeCapability. The request's
// context must carry the caller that the transport authenticated (identity.Caller).
type Server struct {
	router Router
	// id names the router's clock. A reading of an earlier process, or of another machine
	// at the same address, must not be taken for one of this.
	id uint64
}

// NewServer returns a Server.
func NewServer(router Router) *Server {
	return &Server{router: router, id: rand.Uint64() | 1}
}

// ReadClock tells the time by which calls are limited.
func (s *Server) ReadClock(context.Context, *pb.ReadClockRequest) (*pb.ReadClockResponse, error) {
	return &pb.ReadClockResponse{Clock: s.now()}, nil
}

func (s *Server) now() *pb.AgentClock { return &pb.AgentClock{Id: s.id, Now: int64(s.router.Now())} }

// InvokeCapability carries out one call. Its errors are *apierror.Error.
func (s *Server) InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	caller, err := callerOf(ctx, req)
	if err == nil {
		err = s.checkClock(req.GetInstance())
	}
	if err != nil {
		return nil, ToAPI(err)
	}
	payload, err := s.router.Serve(ctx, caller, provider.Request{
		Provider:   req.GetProviderId(),
		Capability: req.GetCapability(),
		Operation:  req.GetOperation(),
		Payload:    req.GetPayload(),
	})
	if err != nil {
		return nil, ToAPI(err)
	}
	return &pb.InvokeCapabilityResponse{Payload: payload, Clock: s.now()}, nil
}

// checkClock refuses a limit that was set by another clock: it says nothing here.
func (s *Server) checkClock(c *pb.InstanceCaller) error {
	if c.GetNotAfter() == 0 || c.GetClock() == s.id {
		return nil
	}
	return provider.Errorf(provider.ErrConflict, "the call of instance %s is limited by the clock of another process", c.GetInstanceId()).
		With("instance", c.GetInstanceId()).With(detailClock, clockUnknown)
}

// callerOf joins what the request says about its caller with what the
// certificate says. The node is the certificate's. A user is the certificate's
// too, or the one that a peer vouches for.
func callerOf(ctx context.Context, req *pb.InvokeCapabilityRequest) (provider.Caller, error) {
	subject, ok := identity.Caller(ctx)
	if !ok {
		return provider.Caller{}, provider.Errorf(provider.ErrDenied, "the call has no authenticated caller")
	}
	switch c := req.GetCaller().(type) {
	case *pb.InvokeCapabilityRequest_Instance:
		// Agents call each other directly: a forwarded call would let a peer
		// speak for instances of every node.
		forwarded := metadata.ValueFromIncomingContext(ctx, identity.ForwardedCallerKey)
		if !subject.IsWorker() || len(forwarded) > 0 {
			return provider.Caller{}, refused(subject, "is not the agent of a node and cannot call for an instance")
		}
		return provider.Caller{
			Instance:   c.Instance.GetInstanceId(),
			Generation: c.Instance.GetGeneration(),
			NodeEpoch:  c.Instance.GetNodeEpoch(),
			NotAfter:   time.Duration(c.Instance.GetNotAfter()),
			Node:       subject.Name,
		}, nil
	case *pb.InvokeCapabilityRequest_User:
		user := c.User.GetUser()
		switch {
		case subject.IsAdmin():
			if user != "" && user != subject.Name {
				return provider.Caller{}, refused(subject, "cannot call for user "+user)
			}
			user = subject.Name
		case !subject.IsPeer():
			return provider.Caller{}, refused(subject, "is not an administrator and cannot call for a user")
		case user == "":
			return provider.Caller{}, provider.Errorf(provider.ErrInvalid, "the call names no user")
		}
		return provider.Caller{User: user, Bucket: c.User.GetBucket()}, nil
	default:
		return provider.Caller{}, provider.Errorf(provider.ErrInvalid, "the call names no caller")
	}
}

func refused(subject identity.Subject, why string) error {
	return provider.Errorf(provider.ErrDenied, "%s %s", subject, why).With("caller", subject.String())
}
