package remote

import (
	"context"

	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// Router carries out calls of authenticated callers; *provider.Router is one.
type Router interface {
	Serve(ctx context.Context, caller provider.Caller, req provider.Request) ([]byte, error)
}

// Server is the serving side of NodeAgentService.InvokeCapability. The request's
// context must carry the caller that the transport authenticated (identity.Caller).
type Server struct {
	router Router
}

// NewServer returns a Server.
func NewServer(router Router) *Server { return &Server{router: router} }

// InvokeCapability carries out one call. Its errors are *apierror.Error.
func (s *Server) InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	caller, err := callerOf(ctx, req)
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
	return &pb.InvokeCapabilityResponse{Payload: payload}, nil
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
