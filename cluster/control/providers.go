package control

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// RegisterProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) RegisterProvider(ctx context.Context, req *pb.RegisterProviderRequest) (*pb.RegisterProviderResponse, error) {
	if err := checkProvider(req.GetSpec()); err != nil {
		return nil, err
	}
	p, index, err := h.changeProvider(ctx, req, req.GetSpec().GetId(), &pb.Command{Payload: &pb.Command_RegisterProvider{
		RegisterProvider: &pb.RegisterProviderCommand{Spec: req.GetSpec()},
	}})
	if err != nil {
		return nil, err
	}
	return &pb.RegisterProviderResponse{Provider: p, Index: index}, nil
}

// driversOf lists the drivers that nodes have, by type of provider; the first one
// is the default.
var driversOf = map[string][]string{
	"kv":        {"bbolt", "memory", "redis", "nats"},
	"http":      {"direct"},
	"messaging": {"embedded", "nats"},
	"external":  {"grpc"},
}

// checkProvider refuses providers that no node of this version can serve. How
// many replicas there may be is judged by the state, which also knows the
// providers that nodes declare.
func checkProvider(spec *pb.ProviderSpec) error {
	drivers, known := driversOf[spec.GetType()]
	if !known {
		types := strings.Join(slices.Sorted(maps.Keys(driversOf)), ", ")
		return invalid("there is no type of provider %q", spec.GetType()).
			With("type", spec.GetType()).With("known", types).
			Next("choose one of the types %s", types)
	}
	if driver := spec.GetDriver(); driver != "" && !slices.Contains(drivers, driver) {
		return invalid("providers of type %s have no driver %q", spec.GetType(), driver).
			With("type", spec.GetType()).With("driver", driver).With("known", strings.Join(drivers, ", ")).
			Next("choose one of the drivers %s", strings.Join(drivers, ", "))
	}
	return checkPlacement(spec.GetPlacement())
}

// StartProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) StartProvider(ctx context.Context, req *pb.StartProviderRequest) (*pb.StartProviderResponse, error) {
	p, index, err := h.changeProvider(ctx, req, req.GetProviderId(), setRunning(&pb.SetProviderRunningCommand{
		ProviderId: req.GetProviderId(), Running: true,
	}))
	if err != nil {
		return nil, err
	}
	return &pb.StartProviderResponse{Provider: p, Index: index}, nil
}

// StopProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) StopProvider(ctx context.Context, req *pb.StopProviderRequest) (*pb.StopProviderResponse, error) {
	p, index, err := h.changeProvider(ctx, req, req.GetProviderId(), setRunning(&pb.SetProviderRunningCommand{
		ProviderId: req.GetProviderId(), Grace: req.GetGrace(),
	}))
	if err != nil {
		return nil, err
	}
	return &pb.StopProviderResponse{Provider: p, Index: index}, nil
}

// UpdateProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) UpdateProvider(ctx context.Context, req *pb.UpdateProviderRequest) (*pb.UpdateProviderResponse, error) {
	if err := checkProvider(req.GetSpec()); err != nil {
		return nil, err
	}
	p, index, err := h.changeProvider(ctx, req, req.GetSpec().GetId(), &pb.Command{Payload: &pb.Command_UpdateProvider{
		UpdateProvider: &pb.UpdateProviderCommand{Spec: req.GetSpec()},
	}})
	if err != nil {
		return nil, err
	}
	return &pb.UpdateProviderResponse{Provider: p, Index: index}, nil
}

// DeregisterProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) DeregisterProvider(ctx context.Context, req *pb.DeregisterProviderRequest) (*pb.DeregisterProviderResponse, error) {
	res, _, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_DeregisterProvider{
		DeregisterProvider: &pb.DeregisterProviderCommand{ProviderId: req.GetProviderId()},
	}}, onProvider(req.GetProviderId()))
	if err != nil {
		return nil, err
	}
	return &pb.DeregisterProviderResponse{Index: res.GetIndex()}, nil
}

// changeProvider proposes a change of one provider and returns the record of its
// first replica after that.
func (h *handlers) changeProvider(ctx context.Context, req write, id string, cmd *pb.Command) (*pb.Provider, uint64, error) {
	res, view, err := h.propose(ctx, req, cmd, onProvider(id))
	if err != nil {
		return nil, 0, err
	}
	p, ok := view.Provider(id)
	if !ok {
		// Somebody removed it right after: the change was made all the same.
		p = &pb.Provider{Id: id, Spec: &pb.ProviderSpec{Id: id}}
	}
	return p, res.GetIndex(), nil
}

func setRunning(c *pb.SetProviderRunningCommand) *pb.Command {
	return &pb.Command{Payload: &pb.Command_SetProviderRunning{SetProviderRunning: c}}
}

// GetProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) GetProvider(ctx context.Context, req *pb.GetProviderRequest) (*pb.GetProviderResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	p, err := providerOf(view, req.GetProviderId())
	if err != nil {
		return nil, err
	}
	return &pb.GetProviderResponse{
		Provider:    p,
		Replicas:    view.ProviderReplicas(p.GetId()),
		Assignments: view.AssignmentsByProvider(nil, p.GetId()),
		Index:       view.Index(),
	}, nil
}

// ListProviders implements pb.ControlPlaneServiceServer.
func (h *handlers) ListProviders(ctx context.Context, req *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	return &pb.ListProvidersResponse{Providers: view.Providers(nil), Index: view.Index()}, nil
}

func providerOf(view fsm.View, id string) (*pb.Provider, error) {
	if p, ok := view.Provider(id); ok {
		return p, nil
	}
	return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", id).
		With("provider", id).
		Next("wasmatrix provider list")
}
