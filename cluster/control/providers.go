package control

import (
	"context"
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

// checkProvider refuses providers that no node of this version can serve.
func checkProvider(spec *pb.ProviderSpec) error {
	if kind := spec.GetType(); kind != providerKV {
		return invalid("no node can serve a provider of type %q", kind).
			With("type", kind).
			Next("register one of type kv: this version serves kv; http, messaging and external providers are not built yet")
	}
	if driver := spec.GetDriver(); driver != "" && !slices.Contains(kvDrivers(), driver) {
		return invalid("kv has no driver %q", driver).
			With("driver", driver).
			Next("choose one of the drivers %s", strings.Join(kvDrivers(), ", "))
	}
	return checkPlacement(spec.GetPlacement())
}

// providerKV is the one type of provider that nodes of this version serve.
const providerKV = "kv"

func kvDrivers() []string { return []string{"bbolt", "memory"} }

// StartProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) StartProvider(ctx context.Context, req *pb.StartProviderRequest) (*pb.StartProviderResponse, error) {
	p, index, err := h.changeProvider(ctx, req, req.GetProviderId(), setRunning(req.GetProviderId(), true))
	if err != nil {
		return nil, err
	}
	return &pb.StartProviderResponse{Provider: p, Index: index}, nil
}

// StopProvider implements pb.ControlPlaneServiceServer.
func (h *handlers) StopProvider(ctx context.Context, req *pb.StopProviderRequest) (*pb.StopProviderResponse, error) {
	p, index, err := h.changeProvider(ctx, req, req.GetProviderId(), setRunning(req.GetProviderId(), false))
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

// changeProvider proposes a change of one provider and returns its record after that.
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

func setRunning(id string, running bool) *pb.Command {
	return &pb.Command{Payload: &pb.Command_SetProviderRunning{
		SetProviderRunning: &pb.SetProviderRunningCommand{ProviderId: id, Running: running},
	}}
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
