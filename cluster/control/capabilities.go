package control

import (
	"context"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// AssignCapability implements pb.ControlPlaneServiceServer.
func (h *handlers) AssignCapability(ctx context.Context, req *pb.AssignCapabilityRequest) (*pb.AssignCapabilityResponse, error) {
	grant := req.GetGrant()
	if len(grant.GetPermissions()) == 0 {
		return nil, invalid("no permission was named").
			With("provider", grant.GetProvider()).
			Next("name at least one, such as kv:read")
	}
	err := h.judge(ctx, req.GetRequestId(), func(view fsm.View) error {
		_, err := checkGrant(view, grant)
		return err
	})
	if err != nil {
		return nil, err
	}
	ids, err := h.resolveIDs(ctx, req.GetTarget(), req.GetRequestId())
	if err != nil {
		return nil, err
	}
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_AssignCapability{
		AssignCapability: &pb.AssignCapabilityCommand{InstanceIds: ids, Grant: grant},
	}}, onAssignments(ids, grant.GetProvider())...)
	if err != nil {
		return nil, err
	}
	return &pb.AssignCapabilityResponse{
		Assignments: assignmentsOf(view, res.GetIds(), grant.GetProvider()),
		Index:       res.GetIndex(),
	}, nil
}

// RevokeCapability implements pb.ControlPlaneServiceServer. The permissions are
// taken as text: what does not parse any more can still be taken away.
func (h *handlers) RevokeCapability(ctx context.Context, req *pb.RevokeCapabilityRequest) (*pb.RevokeCapabilityResponse, error) {
	ids, err := h.resolveIDs(ctx, req.GetTarget(), req.GetRequestId())
	if err != nil {
		return nil, err
	}
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_RevokeCapability{
		RevokeCapability: &pb.RevokeCapabilityCommand{
			InstanceIds: ids, ProviderId: req.GetProviderId(), Permissions: req.GetPermissions(),
		},
	}}, onAssignments(ids, req.GetProviderId())...)
	if err != nil {
		return nil, err
	}
	return &pb.RevokeCapabilityResponse{
		Assignments: assignmentsOf(view, res.GetIds(), req.GetProviderId()),
		Index:       res.GetIndex(),
	}, nil
}

// assignmentsOf returns what is left or new between instances and a provider.
func assignmentsOf(view fsm.View, instanceIDs []string, providerID string) []*pb.CapabilityAssignment {
	out := make([]*pb.CapabilityAssignment, 0, len(instanceIDs))
	for _, id := range instanceIDs {
		if a, ok := view.Assignment(id, providerID); ok {
			out = append(out, a)
		}
	}
	return out
}
