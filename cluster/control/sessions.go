package control

import (
	"context"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// OpenSession implements pb.ControlPlaneServiceServer. The id is random, so that
// no late write of another session, or of another cluster, is ever taken for one
// of this session.
func (h *handlers) OpenSession(ctx context.Context, req *pb.OpenSessionRequest) (*pb.OpenSessionResponse, error) {
	idle := req.GetIdleTimeout()
	if idle == nil {
		idle = durationpb.New(fsm.DefaultSessionIdle)
	}
	res, _, err := h.commit(ctx, req, req.GetRequestId(), &pb.Command{Payload: &pb.Command_OpenSession{
		OpenSession: &pb.OpenSessionCommand{SessionId: uuid.NewString(), IdleTimeout: idle},
	}})
	if err != nil {
		return nil, err
	}
	return &pb.OpenSessionResponse{SessionId: res.GetIds()[0], IdleTimeout: idle, Index: res.GetIndex()}, nil
}
