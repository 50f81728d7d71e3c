package apierror

import (
	"context"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The details of the error of a write.
const (
	// DetailOutcome says whether the write may have happened: OutcomeFailed or OutcomeUnknown.
	DetailOutcome = "outcome"
	// OutcomeFailed: the write did not happen and never will.
	OutcomeFailed = "failed"
	// OutcomeUnknown: the write may have happened, or may still happen; repeat it with the same request id.
	OutcomeUnknown = "unknown"
	// DetailAttempt says, when the outcome is unknown, that this attempt certainly did
	// nothing (OutcomeFailed): only an earlier one may have.
	DetailAttempt = "attempt"
	// DetailRequestID is the request id with which to repeat the write.
	DetailRequestID = "request_id"
	// DetailIndex is the Raft index at which the state refused the write. Such an
	// answer is the one answer to the request id, whatever became of other attempts.
	DetailIndex = "index"
)

// OfWrite returns the error of a write with the outcome and the request id that
// it lacks; nil stays nil. What refuses a request before anything is done has
// failed for certain; of anything else nobody knows.
func OfWrite(ctx context.Context, err error, requestID string) error {
	if err == nil {
		return nil
	}
	e := From(err)
	if e.Detail(DetailOutcome) != "" && (requestID == "" || e.Detail(DetailRequestID) != "") {
		return err
	}
	out := FromProto(e.Proto(ctx))
	if out.Detail(DetailOutcome) == "" {
		out = out.With(DetailOutcome, outcomeOf(e.Code()))
	}
	if requestID != "" && out.Detail(DetailRequestID) == "" {
		out = out.With(DetailRequestID, requestID)
	}
	return out
}

func outcomeOf(code pb.ErrorCode) string {
	switch code {
	case pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND,
		pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND,
		pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
		pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE,
		pb.ErrorCode_ERROR_CODE_CONFLICT:
		return OutcomeFailed
	default:
		return OutcomeUnknown
	}
}

// Attempts remembers what the attempts of one write may have done. The zero
// value is ready; it is not safe for concurrent use.
type Attempts struct{ doubtful bool }

// Note takes in the failure of an attempt, which OfWrite has completed.
func (a *Attempts) Note(err error) {
	if err == nil {
		return
	}
	switch e := From(err); {
	case e.Detail(DetailIndex) != "":
		a.doubtful = false
	case e.Detail(DetailOutcome) != OutcomeFailed && e.Detail(DetailAttempt) != OutcomeFailed:
		a.doubtful = true
	}
}

// Doubtful reports whether one of them may have had the effect, or may still have it.
func (a *Attempts) Doubtful() bool { return a.doubtful }

// Conclude returns the error of the whole write: the last one's, but with an
// unknown outcome when an earlier attempt is in doubt and the state itself has
// not answered.
func (a *Attempts) Conclude(ctx context.Context, err error, requestID string) error {
	err = OfWrite(ctx, err, requestID)
	e := From(err)
	if err == nil || !a.doubtful || e.Detail(DetailIndex) != "" || e.Detail(DetailOutcome) == OutcomeUnknown {
		return err
	}
	return FromProto(e.Proto(ctx)).With(DetailOutcome, OutcomeUnknown)
}
