package control

import (
	"context"
	"math/rand/v2"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// CallProvider implements pb.ControlPlaneServiceServer. The provider's own agent
// serves the call, as it does for a guest of another node. Another replica is
// tried only when the call certainly had no effect.
func (h *handlers) CallProvider(ctx context.Context, req *pb.CallProviderRequest) (*pb.CallProviderResponse, error) {
	view, replicas, err := h.serving(ctx, req.GetProviderId(), req.GetCapability())
	if err != nil {
		return nil, err
	}
	for _, p := range replicas {
		resp, again, failure := h.callOn(ctx, view, p, req)
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

// serving returns the replicas of a provider that can be called, at least one and
// at most maxReplicasTried in random order, and the view that names them. The
// provider must serve the capability.
func (h *handlers) serving(ctx context.Context, id, capability string) (fsm.View, []*pb.Provider, error) {
	view, err := h.settle(ctx, func(view fsm.View) prospect { return callable(view.ProviderReplicas(id)...) })
	if err != nil {
		return view, nil, err
	}
	p, err := providerOf(view, id)
	if err != nil {
		return view, nil, err
	}
	if serves := capabilityOf[p.GetSpec().GetType()]; serves != capability {
		return view, nil, invalid("provider %s serves the capability %s, not %s", id, serves, capability).
			With("provider", id).With("type", p.GetSpec().GetType()).
			Next("wasmatrix provider list")
	}
	all := view.ProviderReplicas(id)
	var running []*pb.Provider
	for _, replica := range all {
		if callable(replica) == ready {
			running = append(running, replica)
		}
	}
	if len(running) == 0 {
		return view, nil, errProviderUnavailable(all)
	}
	rand.Shuffle(len(running), func(i, j int) { running[i], running[j] = running[j], running[i] })
	return view, running[:min(len(running), maxReplicasTried)], nil
}

// callOn calls one replica. again says that the call certainly had no effect, so
// that another replica may be tried.
func (h *handlers) callOn(ctx context.Context, view fsm.View, p *pb.Provider, req *pb.CallProviderRequest) (resp *pb.CallProviderResponse, again bool, err error) {
	node := p.GetPlacement().GetNodeId()
	agent, address, err := h.agentOf(view, node)
	if err != nil {
		return nil, true, err
	}
	caller, _ := identity.Caller(ctx)
	// grpc fills this in once the call has a stream, that is when it may have left.
	var reached peer.Peer
	answer, err := agent.InvokeCapability(ctx, &pb.InvokeCapabilityRequest{
		Caller:     &pb.InvokeCapabilityRequest_User{User: &pb.UserCaller{User: caller.Name, Bucket: req.GetBucket()}},
		ProviderId: p.GetId(),
		Capability: req.GetCapability(),
		Operation:  req.GetOperation(),
		Payload:    req.GetPayload(),
	}, grpc.Peer(&reached))
	if err == nil {
		return &pb.CallProviderResponse{Payload: answer.GetPayload()}, false, nil
	}
	failure := apierror.From(err)
	if failure.Code() == pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
		unreached := errNodeUnreached(node, address, failure)
		if reached.Addr == nil {
			return nil, ctx.Err() == nil, unreached
		}
		return nil, false, apierror.From(unreached).With(apierror.DetailOutcome, apierror.OutcomeUnknown)
	}
	return nil, refusedUnserved(failure) && ctx.Err() == nil, failure
}

// refusedUnserved reports whether an agent said that it does not serve the
// provider, or does not any more, before the call had any effect.
func refusedUnserved(failure *apierror.Error) bool {
	switch failure.Code() {
	case pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE:
		return failure.Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown
	default:
		return false
	}
}

// callable says whether one of the replicas can be called, now or soon. One that
// failed, drains or is lost makes nobody wait.
func callable(replicas ...*pb.Provider) prospect {
	best := never
	for _, p := range replicas {
		if !p.GetDesiredRunning() {
			continue
		}
		switch p.GetStatus().GetState() {
		case pb.ProviderState_PROVIDER_STATE_RUNNING:
			return ready
		case pb.ProviderState_PROVIDER_STATE_PENDING, pb.ProviderState_PROVIDER_STATE_ASSIGNED,
			pb.ProviderState_PROVIDER_STATE_STARTING:
			best = soon
		default:
		}
	}
	return best
}

// errProviderUnavailable tells where the replicas of a provider stand instead of
// serving; there is at least one.
func errProviderUnavailable(replicas []*pb.Provider) error {
	first := replicas[0]
	state := providerState(first)
	e := apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "provider %s does not serve: it is %s", first.GetId(), state).
		With("provider", first.GetId()).With("state", state)
	if message := first.GetStatus().GetMessage(); message != "" {
		e = e.With("status", message)
	}
	for _, p := range replicas[1:] {
		text := providerState(p)
		if message := p.GetStatus().GetMessage(); message != "" {
			text += ": " + message
		}
		e = e.With(fsm.ReplicaName(p.GetId(), p.GetReplica()), text)
	}
	if !first.GetDesiredRunning() {
		return e.Next("wasmatrix provider start %s", first.GetId())
	}
	return e.Next("wasmatrix provider get %s", first.GetId())
}

func providerState(p *pb.Provider) string {
	return strings.TrimPrefix(p.GetStatus().GetState().String(), "PROVIDER_STATE_")
}
