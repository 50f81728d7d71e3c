package control

import (
	"context"
	"log/slog"
	"strings"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// rule says who may make a call and whether it is written to the audit log.
type rule struct {
	allow func(identity.Subject) bool
	audit bool
}

var (
	// admins may observe, and call what runs.
	admins = rule{allow: identity.Subject.IsAdmin}
	// adminsAudited may change the cluster, or reach data behind a provider.
	adminsAudited = rule{allow: identity.Subject.IsAdmin, audit: true}
	// adminsAndNodes may fetch what nodes run.
	adminsAndNodes = rule{allow: func(s identity.Subject) bool { return s.IsAdmin() || s.IsWorker() || s.IsPeer() }}
)

// access is the whole of who may do what. A call that is not in it is refused.
var access = map[string]rule{
	pb.ControlPlaneService_StartInstance_FullMethodName:      adminsAudited,
	pb.ControlPlaneService_StopInstance_FullMethodName:       adminsAudited,
	pb.ControlPlaneService_RestartInstance_FullMethodName:    adminsAudited,
	pb.ControlPlaneService_RemoveInstance_FullMethodName:     adminsAudited,
	pb.ControlPlaneService_QueryInstance_FullMethodName:      admins,
	pb.ControlPlaneService_ListInstances_FullMethodName:      admins,
	pb.ControlPlaneService_Explain_FullMethodName:            admins,
	pb.ControlPlaneService_AssignCapability_FullMethodName:   adminsAudited,
	pb.ControlPlaneService_RevokeCapability_FullMethodName:   adminsAudited,
	pb.ControlPlaneService_UploadModule_FullMethodName:       adminsAudited,
	pb.ControlPlaneService_FetchModule_FullMethodName:        adminsAndNodes,
	pb.ControlPlaneService_ListModules_FullMethodName:        admins,
	pb.ControlPlaneService_RegisterProvider_FullMethodName:   adminsAudited,
	pb.ControlPlaneService_StartProvider_FullMethodName:      adminsAudited,
	pb.ControlPlaneService_StopProvider_FullMethodName:       adminsAudited,
	pb.ControlPlaneService_UpdateProvider_FullMethodName:     adminsAudited,
	pb.ControlPlaneService_DeregisterProvider_FullMethodName: adminsAudited,
	pb.ControlPlaneService_GetProvider_FullMethodName:        admins,
	pb.ControlPlaneService_ListProviders_FullMethodName:      admins,
	pb.ControlPlaneService_CallProvider_FullMethodName:       adminsAudited,
	pb.ControlPlaneService_SubscribeMessages_FullMethodName:  adminsAudited,
	pb.ControlPlaneService_ListNodes_FullMethodName:          admins,
	pb.ControlPlaneService_DrainNode_FullMethodName:          adminsAudited,
	pb.ControlPlaneService_UndrainNode_FullMethodName:        adminsAudited,
	pb.ControlPlaneService_WatchEvents_FullMethodName:        admins,
	pb.ControlPlaneService_Invoke_FullMethodName:             admins,
	pb.ControlPlaneService_FollowLogs_FullMethodName:         admins,
	pb.ControlPlaneService_OpenSession_FullMethodName:        admins,
}

// authorise refuses a caller that the access table does not let through.
func authorise(ctx context.Context, method string) error {
	caller, known := identity.Caller(ctx)
	r, listed := access[method]
	if known && listed && r.allow(caller) {
		return nil
	}
	short := method[strings.LastIndexByte(method, '/')+1:]
	e := apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "this caller may not call %s", short).
		Next("use the certificate of a user with the role admin")
	if known {
		e = e.With("caller", caller.String())
	}
	return e
}

// guard stands between the server and the handlers.
type guard struct{ log *slog.Logger }

// unary lets the server's interceptors run first, because they put the caller
// into the context, and then asks the access table.
func (g *guard) unary(method string, handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, outer grpc.UnaryServerInterceptor) (any, error) {
		inner := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			guarded := func(ctx context.Context, req any) (any, error) {
				resp, err := g.serve(ctx, method, req, next)
				if w, ok := req.(write); ok {
					err = apierror.OfWrite(ctx, err, w.GetRequestId())
				}
				g.record(ctx, method, req, err)
				return resp, err
			}
			if outer == nil {
				return guarded(ctx, req)
			}
			return outer(ctx, req, info, guarded)
		}
		return handle(srv, ctx, dec, inner)
	}
}

func (g *guard) serve(ctx context.Context, method string, req any, next grpc.UnaryHandler) (any, error) {
	if err := authorise(ctx, method); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// stream does for streams what unary does for unary calls.
func (g *guard) stream(method string, handle grpc.StreamHandler) grpc.StreamHandler {
	return func(srv any, stream grpc.ServerStream) error {
		err := authorise(stream.Context(), method)
		if err == nil {
			err = handle(srv, stream)
		}
		g.record(stream.Context(), method, nil, err)
		return err
	}
}

// record writes the audit log: who asked to change what, and what came of it.
// Refused calls are part of it. Contents are not.
func (g *guard) record(ctx context.Context, method string, req any, err error) {
	if !access[method].audit {
		return
	}
	caller, _ := identity.Caller(ctx)
	outcome := "OK"
	if err != nil {
		outcome = strings.TrimPrefix(apierror.CodeOf(err).String(), "ERROR_CODE_")
	}
	attrs := []slog.Attr{
		slog.String("method", method[strings.LastIndexByte(method, '/')+1:]),
		slog.String("user", caller.Name),
		slog.String("correlation_id", correlation.ID(ctx)),
		slog.String("outcome", outcome),
	}
	for _, a := range subjectOf(req) {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	g.log.LogAttrs(ctx, slog.LevelInfo, "audit", attrs...)
}

// subjectOf names what a request is about.
func subjectOf(req any) []slog.Attr {
	var attrs []slog.Attr
	if r, ok := req.(interface{ GetTarget() string }); ok {
		attrs = append(attrs, slog.String("target", r.GetTarget()))
	}
	if r, ok := req.(interface{ GetProviderId() string }); ok {
		attrs = append(attrs, slog.String("provider", r.GetProviderId()))
	}
	if r, ok := req.(interface{ GetNodeId() string }); ok {
		attrs = append(attrs, slog.String("node", r.GetNodeId()))
	}
	if r, ok := req.(interface{ GetRequestId() string }); ok {
		attrs = append(attrs, slog.String("request_id", r.GetRequestId()))
	}
	switch r := req.(type) {
	case *pb.StartInstanceRequest:
		attrs = append(attrs, slog.String("name", r.GetSpec().GetName()), slog.String("module", r.GetSpec().GetModule()))
	case *pb.RegisterProviderRequest:
		attrs = append(attrs, slog.String("provider", r.GetSpec().GetId()))
	case *pb.UpdateProviderRequest:
		attrs = append(attrs, slog.String("provider", r.GetSpec().GetId()))
	case *pb.AssignCapabilityRequest:
		attrs = append(attrs, slog.String("provider", r.GetGrant().GetProvider()))
	case *pb.CallProviderRequest:
		attrs = append(attrs, slog.String("operation", r.GetCapability()+" "+r.GetOperation()))
	}
	return attrs
}
