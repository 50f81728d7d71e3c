package control

import (
	"context"
	"math/rand/v2"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxReplicasTried bounds how many replicas one Invoke tries.
const maxReplicasTried = 3

// Invoke implements pb.ControlPlaneServiceServer. It goes by this peer's own
// state, so that it needs no leader.
func (h *handlers) Invoke(ctx context.Context, req *pb.InvokeRequest) (*pb.InvokeResponse, error) {
	view, err := h.settle(ctx, func(view fsm.View) prospect {
		found, _ := view.Resolve(req.GetTarget())
		return invokable(found)
	})
	if err != nil {
		return nil, err
	}
	found, refusal := view.Resolve(req.GetTarget())
	if refusal != nil {
		return nil, apierror.FromProto(refusal)
	}
	replicas := running(found)
	rand.Shuffle(len(replicas), func(i, j int) { replicas[i], replicas[j] = replicas[j], replicas[i] })
	err = errNotRunning(req.GetTarget(), found)
	for _, inst := range replicas[:min(len(replicas), maxReplicasTried)] {
		resp, again, failure := h.invokeOn(ctx, view, inst, req)
		if failure == nil {
			return resp, nil
		}
		err = failure
		if !again {
			break
		}
	}
	return nil, err
}

// refusedBy is the detail with which an agent marks an error as the guest's own.
const refusedBy = "refused_by"

// invokeOn calls one instance. again says that the guest certainly did not run,
// so that another replica may be tried.
func (h *handlers) invokeOn(ctx context.Context, view fsm.View, inst *pb.Instance, req *pb.InvokeRequest) (resp *pb.InvokeResponse, again bool, err error) {
	node := inst.GetPlacement().GetNodeId()
	agent, address, err := h.agentOf(view, node)
	if err != nil {
		return nil, true, err
	}
	// grpc fills this in once the call has a stream, that is when it may have left.
	var reached peer.Peer
	answer, err := agent.InvokeInstance(ctx, &pb.InvokeInstanceRequest{InstanceId: inst.GetId(), Request: req}, grpc.Peer(&reached))
	if err != nil {
		failure := apierror.From(err)
		if failure.Detail(refusedBy) != "" {
			return nil, false, failure // whatever its code, the guest ran and said so
		}
		switch failure.Code() {
		case pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE:
			return nil, reached.Addr == nil && ctx.Err() == nil, errNodeUnreached(node, address, failure)
		case pb.ErrorCode_ERROR_CODE_CONFLICT, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND:
			// The agent knows better than the registry: it does not run there (any more).
			return nil, true, failure
		default:
			return nil, false, failure
		}
	}
	resp = answer.GetResponse()
	if resp == nil {
		resp = &pb.InvokeResponse{}
	}
	resp.InstanceId, resp.NodeId = inst.GetId(), node
	return resp, false, nil
}

// invokable says whether one of the instances can be called, now or soon.
func invokable(found []*pb.Instance) prospect {
	best := never
	for _, inst := range found {
		switch {
		case inst.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_RUNNING:
			return ready
		case inst.GetDesiredRunning() && !fsm.Ended(inst):
			best = soon
		}
	}
	return best
}

func running(found []*pb.Instance) []*pb.Instance {
	var out []*pb.Instance
	for _, inst := range found {
		if invokable([]*pb.Instance{inst}) == ready {
			out = append(out, inst)
		}
	}
	return out
}

// errNotRunning tells the states that were found instead.
func errNotRunning(target string, found []*pb.Instance) error {
	e := apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "no instance of %q is running", target).
		With("target", target)
	ended := len(found) > 0
	for i, inst := range found {
		ended = ended && fsm.Ended(inst)
		if i == maxNamed {
			e = e.With("more", "…")
			continue
		}
		if i < maxNamed {
			e = e.With(inst.GetId(), describe(inst))
		}
	}
	if ended {
		return e.Next("wasmatrix instance start %s", target)
	}
	return e.Next("wasmatrix explain %s", target)
}

// describe says in one line where an instance stands and why.
func describe(inst *pb.Instance) string {
	text := strings.TrimPrefix(inst.GetStatus().GetState().String(), "INSTANCE_STATE_")
	if node := inst.GetPlacement().GetNodeId(); node != "" {
		text += " on " + node
	}
	if message := inst.GetStatus().GetMessage(); message != "" {
		text += ": " + message
	}
	return text
}

func errNodeUnreached(node, address string, cause error) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "the agent of node %s did not answer: %s", node, cause).
		With("node", node).With("address", address).
		Next("wasmatrix node list")
}
