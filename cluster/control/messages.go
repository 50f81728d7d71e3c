package control

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// SubscribeMessages implements pb.ControlPlaneServiceServer. It goes by this
// peer's own state and passes on what the agent of a running replica sends, so
// that it needs no leader. Once messages came it does not turn to another replica:
// the caller must know that some may be missing.
func (h *handlers) SubscribeMessages(req *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
	if err := checkSubject(req.GetSubject()); err != nil {
		return err
	}
	view, replicas, err := h.serving(stream.Context(), req.GetProviderId(), permission.Messaging)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() {
		defer cancel()
		select {
		case <-h.closing:
		case <-ctx.Done():
		}
	}()
	for _, p := range replicas {
		var begun bool
		if begun, err = h.relayMessages(ctx, view, p, req, stream.Send); begun || ctx.Err() != nil {
			break
		}
	}
	select {
	case <-h.closing:
		return errClosing()
	default:
		return err
	}
}

// relayMessages hands what one replica's agent sends to send until either ends.
// begun says that something came.
func (h *handlers) relayMessages(ctx context.Context, view fsm.View, p *pb.Provider, req *pb.SubscribeMessagesRequest,
	send func(*pb.SubscribeMessagesResponse) error,
) (begun bool, err error) {
	node := p.GetPlacement().GetNodeId()
	agent, address, err := h.agentOf(view, node)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	messages, err := agent.SubscribeMessages(ctx, req)
	for err == nil {
		var m *pb.SubscribeMessagesResponse
		if m, err = messages.Recv(); err != nil {
			break
		}
		begun = true
		if err := send(m); err != nil {
			return begun, err
		}
	}
	if errors.Is(err, io.EOF) {
		return begun, nil
	}
	failure := apierror.From(err)
	if failure.Code() == pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
		return begun, errNodeUnreached(node, address, failure)
	}
	return begun, failure
}

// checkSubject refuses what is no subject, wildcards allowed.
func checkSubject(subject string) error {
	_, err := permission.Parse("msg:subscribe:" + subject)
	var syntax *permission.SyntaxError
	if !errors.As(err, &syntax) {
		return nil
	}
	return invalid("%s", syntax.Reason).With("subject", subject).
		Next("join tokens by dots, * for one token, > at the end for the rest: orders.*.created")
}
