package agent

import (
	"context"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// recordTimeout bounds one try to record a subscription.
const recordTimeout = 5 * time.Second

// recordSubscription has the leader commit that a subscription begins or ends. It
// waits for a session, and tries again with the next, until ctx ends. Repeating it
// changes nothing; but existed then tells of the first time.
func (s *session) recordSubscription(ctx context.Context, call provider.Call, id, subject string, subscribed bool) (existed bool, err error) {
	var last error
	for tries := 1; ; tries++ {
		st, changed := s.watchStatus()
		if st.leader != "" {
			resp, err := s.recordOnce(ctx, st, &pb.RecordSubscriptionRequest{
				NodeId: s.info.GetId(), Epoch: st.epoch, InstanceId: call.Instance, Generation: call.Generation,
				ProviderId: id, Subject: subject, Subscribed: subscribed,
			})
			if err == nil {
				return resp.GetExisted(), nil
			}
			last = err
			if !s.recordAgain(apierror.CodeOf(err), st) {
				return false, err
			}
		}
		pause := time.NewTimer(searchBackoff.delay(tries, 0))
		select {
		case <-changed:
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return false, errNotRecorded(ctx, last)
		}
		pause.Stop()
	}
}

func (s *session) recordOnce(ctx context.Context, st sessionStatus, req *pb.RecordSubscriptionRequest) (*pb.RecordSubscriptionResponse, error) {
	conn, err := s.conn(st.leader)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	return pb.NewAgentSessionServiceClient(conn).RecordSubscription(ctx, req)
}

// recordAgain says whether a failure may be due to the session, which ended
// meanwhile or will soon.
func (s *session) recordAgain(code pb.ErrorCode, used sessionStatus) bool {
	switch code {
	case pb.ErrorCode_ERROR_CODE_NO_LEADER, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, pb.ErrorCode_ERROR_CODE_TIMEOUT:
		return true
	case pb.ErrorCode_ERROR_CODE_CONFLICT:
		now := s.current()
		return now.epoch != used.epoch || now.leader != used.leader
	default:
		return false
	}
}

func errNotRecorded(ctx context.Context, last error) error {
	why := "there is no session with the control plane"
	if last != nil {
		why = apierror.From(last).Error()
	}
	code := pb.ErrorCode_ERROR_CODE_TIMEOUT
	if ctx.Err() == context.Canceled {
		code = pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE
	}
	return apierror.New(code, "the subscription was not recorded in time: %s", why).
		With(provider.DetailOutcome, provider.OutcomeUnknown).Next("wasmatrix status")
}
