package agent

import (
	"context"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// rule says whether a caller may call a method.
type rule func(identity.Subject) bool

// operators are peers of the control plane, on behalf of their callers, and
// users who may do everything.
func operators(s identity.Subject) bool { return s.IsPeer() || s.IsAdmin() }

// callers are operators and the agents of other nodes.
func callers(s identity.Subject) bool { return operators(s) || s.IsWorker() }

// rules is who may call what of NodeAgentService. A method without a rule is
// refused to everyone, so that a new one is closed until someone decides.
func rules() map[string]rule {
	return map[string]rule{
		"QueryInstance":     operators,
		"ListInstances":     operators,
		"InvokeInstance":    operators,
		"InvokeCapability":  callers,
		"ReadClock":         callers,
		"DeliverMessage":    identity.Subject.IsWorker,
		"SubscribeMessages": operators,
		"FollowLogs":        operators,
		"StartInstance":     operators,
		"StopInstance":      operators,
		"UploadModule":      operators,
	}
}

// authorise refuses a call unless its rule allows the authenticated caller.
func authorise(ctx context.Context, method string, allowed rule) error {
	caller, ok := identity.Caller(ctx)
	switch {
	case !ok:
		return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "the caller of %s is not authenticated", method).
			Next("connect with a client certificate of this cluster")
	case allowed == nil || !allowed(caller):
		return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "%s may not call %s", caller, method).
			With("caller", caller.String()).With("method", method)
	}
	return nil
}

// guarded returns a copy of a service description whose every method is
// authorised before it is carried out, after all interceptors have run.
func guarded(desc grpc.ServiceDesc, rules map[string]rule) grpc.ServiceDesc {
	methods, streams := desc.Methods, desc.Streams
	desc.Methods, desc.Streams = make([]grpc.MethodDesc, len(methods)), make([]grpc.StreamDesc, len(streams))
	for i, m := range methods {
		desc.Methods[i] = grpc.MethodDesc{MethodName: m.MethodName, Handler: guardUnary(m, rules[m.MethodName])}
	}
	for i, s := range streams {
		next, name, allowed := s.Handler, s.StreamName, rules[s.StreamName]
		s.Handler = func(srv any, stream grpc.ServerStream) error {
			if err := authorise(stream.Context(), name, allowed); err != nil {
				return err
			}
			return next(srv, stream)
		}
		desc.Streams[i] = s
	}
	return desc
}

func guardUnary(m grpc.MethodDesc, allowed rule) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		guard := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			checked := func(ctx context.Context, req any) (any, error) {
				if err := authorise(ctx, m.MethodName, allowed); err != nil {
					return nil, err
				}
				return handler(ctx, req)
			}
			if interceptor == nil {
				return checked(ctx, req)
			}
			return interceptor(ctx, req, info, checked)
		}
		return m.Handler(srv, ctx, dec, guard)
	}
}
