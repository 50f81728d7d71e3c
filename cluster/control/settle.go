package control

import (
	"context"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// settleTime bounds how long a call waits for this peer's state to show what the
// caller may know already from another peer.
const settleTime = time.Second

// prospect is what a view lets a call hope for.
type prospect int

const (
	// never: a newer state may say otherwise, waiting for one that is new enough decides.
	never prospect = iota
	// soon: it is on its way.
	soon
	// ready: go ahead.
	ready
)

// settle returns the first local view in which look is ready. A call may follow
// a write that this peer has not applied yet, so when look is not ready it waits
// up to settleTime; it waits no longer than the leader's index when look says
// never. Without a leader it just waits. The last view seen is returned when
// nothing became ready.
func (h *handlers) settle(ctx context.Context, look func(fsm.View) prospect) (fsm.View, error) {
	view, err := h.local(ctx)
	if err != nil || look(view) == ready {
		return view, err
	}
	bounded, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	newEnough, known := h.leaderIndex(bounded)
	for {
		if view, err = h.local(ctx); err != nil {
			return view, err
		}
		seen := look(view)
		if seen == ready || seen == never && known && view.Index() >= newEnough {
			return view, nil
		}
		select {
		case <-bounded.Done():
			return view, nil
		case <-h.closing:
			return view, nil
		case <-h.Viewer.Changed(view.Index()):
		}
	}
}

// leaderIndex returns an index at which everything acknowledged before now is
// applied. It reports false when no leader says so in time.
func (h *handlers) leaderIndex(ctx context.Context) (uint64, bool) {
	conn, err := h.LeaderConn(ctx)
	if err != nil {
		return 0, false
	}
	if conn == nil {
		view, err := h.latest(ctx)
		return view.Index(), err == nil
	}
	// An empty page carries the index of a linearizable read and nothing else.
	resp, err := pb.NewControlPlaneServiceClient(conn).ListInstances(identity.ForwardCaller(ctx), &pb.ListInstancesRequest{
		Name: "-", PageSize: 1,
	})
	return resp.GetIndex(), err == nil
}

// forwarded reports whether another peer passed the call of ctx on.
func forwarded(ctx context.Context) bool {
	return len(metadata.ValueFromIncomingContext(ctx, identity.ForwardedCallerKey)) > 0
}

func errNoLeaderHere() error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "the call was passed on to this peer, which does not lead any more").
		With("outcome", "failed").
		Next("try again with the same request id")
}
