package dispatch

import (
	"context"
	"errors"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// proofsPerTTL says how old a proof of leadership may be when a renewal relies
// on it, as a part of the TTL. What is left of the TTL goes to the agent.
const proofsPerTTL = 8

// errEnded: this peer lost leadership while it worked on a request.
var errEnded = errors.New("this peer does not lead any more")

// RegisterNode implements AgentSessionService.
func (d *Dispatcher) RegisterNode(ctx context.Context, req *pb.RegisterNodeRequest) (*pb.RegisterNodeResponse, error) {
	t, err := d.term()
	if err != nil {
		return nil, err
	}
	nodeID := req.GetInfo().GetId()
	if err := authorize(ctx, nodeID); err != nil {
		return nil, err
	}
	ttl, epoch := t.leaseTTL(), req.GetEpoch()
	// An epoch can be kept only while its lease lives, and the lease must not end
	// while the command is on its way.
	deadline := t.clock.Now().Add(held(ttl))
	if epoch != 0 && t.leases.renew(holder{nodeID, epoch}, deadline) != nil {
		epoch = 0
	}
	result, err := t.peer.Propose(ctx, &pb.Command{
		Actor: actor,
		Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{
			Info: req.GetInfo(), Providers: req.GetProviders(), Epoch: epoch,
		}},
	})
	if err != nil {
		return nil, err
	}
	h := holder{nodeID, result.GetEpoch()}
	if err := t.leases.grant(h, result.GetIndex(), t.clock.Now().Add(held(ttl))); err != nil {
		return nil, registerAgain(h, err)
	}
	view, err := t.view(ctx)
	if err != nil {
		return nil, err
	}
	d.log.InfoContext(ctx, "node registered", "node", nodeID, "epoch", h.epoch, "kept", h.epoch == req.GetEpoch())
	// The commit proves that this peer led after the request was sent, so the whole
	// TTL is left.
	return &pb.RegisterNodeResponse{
		Epoch: h.epoch, LeaseTtl: durationpb.New(ttl), PeerApiAddresses: peerAddresses(view),
	}, nil
}

// Heartbeat implements AgentSessionService.
func (d *Dispatcher) Heartbeat(ctx context.Context, req *pb.HeartbeatRequest) (*pb.HeartbeatResponse, error) {
	t, err := d.term()
	if err != nil {
		return nil, err
	}
	if err := authorize(ctx, req.GetNodeId()); err != nil {
		return nil, err
	}
	h := holder{req.GetNodeId(), req.GetEpoch()}
	ttl, arrived := t.leaseTTL(), t.clock.Now()
	// Extended before the proof too: a longer lease here harms nobody, and a slow
	// disk must not end the leases of nodes that do renew.
	if err := t.leases.renew(h, arrived.Add(held(ttl))); err != nil {
		return nil, registerAgain(h, err)
	}
	proved, err := t.proofs.since(ctx, arrived.Add(-ttl/proofsPerTTL), t.ended)
	if errors.Is(err, errEnded) {
		return nil, d.noLeader()
	}
	if err != nil {
		return nil, err
	}
	now := t.clock.Now()
	if err := t.leases.renew(h, now.Add(held(ttl))); err != nil {
		return nil, registerAgain(h, err)
	}
	left := ttl - now.Sub(proved)
	if left <= 0 {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "leadership was confirmed too late to renew the lease").
			Next("renew again")
	}
	view, err := t.view(ctx)
	if err != nil {
		return nil, err
	}
	t.metrics.renewals.Inc()
	return &pb.HeartbeatResponse{LeaseTtl: durationpb.New(left), PeerApiAddresses: peerAddresses(view)}, nil
}

// ReportStatus implements AgentSessionService.
func (d *Dispatcher) ReportStatus(ctx context.Context, req *pb.ReportStatusRequest) (*pb.ReportStatusResponse, error) {
	t, view, err := d.heard(ctx, holder{req.GetNodeId(), req.GetEpoch()})
	if err != nil {
		return nil, err
	}
	if len(req.GetInstances()) == 0 && len(req.GetProviders()) == 0 && len(req.GetDenials()) == 0 {
		return &pb.ReportStatusResponse{Index: view.Index()}, nil
	}
	for _, report := range req.GetInstances() {
		if report.GetStatus() != nil {
			// How much an instance used is asked of its agent; it is no fact to keep.
			report.Status.Usage = nil
		}
	}
	result, err := t.peer.Propose(ctx, &pb.Command{
		Actor:   actor,
		Payload: &pb.Command_ReportStatus{ReportStatus: req},
	})
	if err != nil {
		return nil, err
	}
	t.metrics.reports.Add(float64(len(req.GetInstances()) + len(req.GetProviders())))
	return &pb.ReportStatusResponse{Index: result.GetIndex()}, nil
}

// RecordSubscription implements AgentSessionService. An agent that got no answer
// may ask again: the second time changes nothing, and says that the subscription
// existed.
func (d *Dispatcher) RecordSubscription(ctx context.Context, req *pb.RecordSubscriptionRequest) (*pb.RecordSubscriptionResponse, error) {
	t, view, err := d.heard(ctx, holder{req.GetNodeId(), req.GetEpoch()})
	if err != nil {
		return nil, err
	}
	if _, ok := view.Instance(req.GetInstanceId()); !ok {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance has the id %q", req.GetInstanceId()).
			With("instance", req.GetInstanceId()).
			Next("wasmatrix instance list")
	}
	if err := t.quotas.take(req.GetInstanceId(), t.clock.Now()); err != nil {
		return nil, err
	}
	result, err := t.peer.Propose(ctx, &pb.Command{
		Actor:   actor,
		Payload: &pb.Command_RecordSubscription{RecordSubscription: req},
	})
	if err != nil {
		return nil, err
	}
	changed := len(result.GetIds()) > 0
	return &pb.RecordSubscriptionResponse{Existed: changed != req.GetSubscribed(), Index: result.GetIndex()}, nil
}

// WatchAssignments implements AgentSessionService.
func (d *Dispatcher) WatchAssignments(req *pb.WatchAssignmentsRequest, stream grpc.ServerStreamingServer[pb.WatchAssignmentsResponse]) error {
	ctx := stream.Context()
	t, err := d.term()
	if err != nil {
		return err
	}
	if err := authorize(ctx, req.GetNodeId()); err != nil {
		return err
	}
	t.metrics.sessions.Inc()
	defer t.metrics.sessions.Dec()
	h := holder{req.GetNodeId(), req.GetEpoch()}
	log := d.log.With("node", h.node, "epoch", h.epoch)
	log.DebugContext(ctx, "session stream opened")
	err = t.stream(ctx, h, stream.Send)
	log.DebugContext(ctx, "session stream ended", "reason", err)
	if errors.Is(err, errEnded) {
		return d.noLeader()
	}
	return err
}

// stream sends what h must know until ctx ends, its epoch is over, or this peer
// does not lead any more.
func (t *term) stream(ctx context.Context, h holder, send func(*pb.WatchAssignmentsResponse) error) error {
	s := newSession(h, t.dirs)
	for {
		select {
		case <-t.ended:
			return errEnded
		default:
		}
		view, err := t.view(ctx)
		if err != nil {
			return err
		}
		if err := checkEpoch(view, h); err != nil {
			return err
		}
		for _, message := range s.next(view) {
			if err := send(message); err != nil {
				return err
			}
			t.metrics.messages.Inc()
			t.metrics.changes.Add(float64(len(message.GetChanges())))
		}
		// What changed while the messages were on their way has fired already.
		ws := memdb.NewWatchSet()
		s.watch(ws)
		ws.Add(t.ended)
		if err := ws.WatchCtx(ctx); err != nil {
			return err
		}
		t.metrics.wakes.Inc()
	}
}

// heard lets a node tell something in its living epoch. The registry checks that
// again at its place in the log; this spares the log what a node says that is known
// to be stale.
func (d *Dispatcher) heard(ctx context.Context, h holder) (*term, fsm.View, error) {
	t, err := d.term()
	if err != nil {
		return nil, fsm.View{}, err
	}
	if err := authorize(ctx, h.node); err != nil {
		return nil, fsm.View{}, err
	}
	view, err := t.view(ctx)
	if err != nil {
		return nil, fsm.View{}, err
	}
	return t, view, checkEpoch(view, h)
}

// checkEpoch refuses an epoch that is not the node's living one.
func checkEpoch(view fsm.View, h holder) error {
	node, ok := view.Node(h.node)
	switch {
	case !ok:
		return registerAgain(h, errNoLease)
	case node.GetEpoch() != h.epoch:
		return registerAgain(h, errOtherEpoch)
	case !fsm.Ready(node):
		return registerAgain(h, errExpired)
	default:
		return nil
	}
}

func peerAddresses(view fsm.View) []string {
	var out []string
	for _, peer := range view.Peers(nil) {
		if address := peer.GetApiAddress(); address != "" {
			out = append(out, address)
		}
	}
	return out
}
