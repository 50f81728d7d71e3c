package control

import (
	"context"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// StartInstance implements pb.ControlPlaneServiceServer.
func (h *handlers) StartInstance(ctx context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	spec := req.GetSpec()
	var ids []string
	var triggers []*pb.TriggerTarget
	err := h.judge(ctx, req.GetRequestId(), func(view fsm.View) (err error) {
		if err = checkSpec(view, spec); err != nil {
			return err
		}
		if triggers, err = triggerTargets(view, spec); err != nil {
			return err
		}
		ids, err = h.mint(view, spec.GetName(), max(1, int(spec.GetReplicas())))
		return err
	})
	if err != nil {
		return nil, err
	}
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_CreateInstances{
		CreateInstances: &pb.CreateInstancesCommand{Spec: spec, InstanceIds: ids, Triggers: triggers},
	}}, &pb.Precondition{Record: &pb.Precondition_Workload{Workload: spec.GetName()}})
	if err != nil {
		return nil, nameInUse(err)
	}
	return &pb.StartInstanceResponse{Instances: instancesOf(view, res.GetIds()), Index: res.GetIndex()}, nil
}

// nameInUse says of a name that running instances have how to get it.
func nameInUse(err error) error {
	e := apierror.From(err)
	name := e.Detail("name")
	if e.Code() != pb.ErrorCode_ERROR_CODE_CONFLICT || name == "" {
		return err
	}
	return e.Next("instances of %s run already: wasmatrix apply --replace -f FILE, wasmatrix instance rm %s --force, or another name with --name",
		name, name)
}

// StopInstance implements pb.ControlPlaneServiceServer.
func (h *handlers) StopInstance(ctx context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	ids, err := h.resolveIDs(ctx, req.GetTarget(), req.GetRequestId())
	if err != nil {
		return nil, err
	}
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_StopInstances{
		StopInstances: &pb.StopInstancesCommand{InstanceIds: ids},
	}}, onInstances(ids)...)
	if err != nil {
		return nil, err
	}
	return &pb.StopInstanceResponse{Instances: instancesOf(view, res.GetIds()), Index: res.GetIndex()}, nil
}

// RestartInstance implements pb.ControlPlaneServiceServer.
func (h *handlers) RestartInstance(ctx context.Context, req *pb.RestartInstanceRequest) (*pb.RestartInstanceResponse, error) {
	ids, err := h.resolveIDs(ctx, req.GetTarget(), req.GetRequestId())
	if err != nil {
		return nil, err
	}
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_RestartInstances{
		RestartInstances: &pb.RestartInstancesCommand{InstanceIds: ids},
	}}, onInstances(ids)...)
	if err != nil {
		return nil, err
	}
	return &pb.RestartInstanceResponse{Instances: instancesOf(view, res.GetIds()), Index: res.GetIndex()}, nil
}

// RemoveInstance implements pb.ControlPlaneServiceServer.
func (h *handlers) RemoveInstance(ctx context.Context, req *pb.RemoveInstanceRequest) (*pb.RemoveInstanceResponse, error) {
	ids, err := h.resolveIDs(ctx, req.GetTarget(), req.GetRequestId())
	if err != nil {
		return nil, err
	}
	res, _, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_RemoveInstances{
		RemoveInstances: &pb.RemoveInstancesCommand{InstanceIds: ids, Force: req.GetForce()},
	}}, onInstances(ids)...)
	if err != nil {
		return nil, err
	}
	return &pb.RemoveInstanceResponse{InstanceIds: res.GetIds(), Index: res.GetIndex()}, nil
}

// resolveIDs returns the ids of the instances that a write is about. A target
// that is not there is left to the state to refuse when the request has an id:
// it may be the repetition of one that removed the target, and the state knows
// the answer to that.
func (h *handlers) resolveIDs(ctx context.Context, target, requestID string) ([]string, error) {
	var ids []string
	err := h.judge(ctx, requestID, func(view fsm.View) error {
		instances, refusal := view.Resolve(target)
		if refusal != nil {
			return apierror.FromProto(refusal)
		}
		ids = make([]string, len(instances))
		for i, inst := range instances {
			ids[i] = inst.GetId()
		}
		return nil
	})
	if requestID != "" && apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND {
		return []string{target}, nil
	}
	return ids, err
}

// instancesOf returns the records of ids, without those that are gone by now.
func instancesOf(view fsm.View, ids []string) []*pb.Instance {
	out := make([]*pb.Instance, 0, len(ids))
	for _, id := range ids {
		if inst, ok := view.Instance(id); ok {
			out = append(out, inst)
		}
	}
	return out
}
