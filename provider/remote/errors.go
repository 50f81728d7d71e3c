package remote

import (
	"context"
	"errors"
	"maps"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// pairs joins the sentinels and the API's codes. Of several that fit an error
// the first wins.
var pairs = []struct {
	sentinel error
	code     pb.ErrorCode
}{
	{provider.ErrInvalid, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
	{provider.ErrDenied, pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED},
	{provider.ErrNotFound, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND},
	{provider.ErrInstanceNotFound, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND},
	{provider.ErrUnavailable, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE},
	{provider.ErrExhausted, pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED},
	{provider.ErrTimeout, pb.ErrorCode_ERROR_CODE_TIMEOUT},
	{provider.ErrCommunication, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
	{provider.ErrConflict, pb.ErrorCode_ERROR_CODE_CONFLICT},
	{provider.ErrInternal, pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR},
}

// ToAPI returns a provider's error in the shape of the API: its code, message,
// details and next step, and the time and correlation id when it came from
// another node. An error that wraps none of the sentinels becomes what
// apierror.From makes of it. Nil stays nil.
func ToAPI(err error) *apierror.Error {
	if err == nil {
		return nil
	}
	code := pb.ErrorCode_ERROR_CODE_UNSPECIFIED
	for _, c := range pairs {
		if errors.Is(err, c.sentinel) {
			code = c.code
			break
		}
	}
	if code == pb.ErrorCode_ERROR_CODE_UNSPECIFIED {
		return apierror.From(err)
	}
	out := &pb.Error{Code: code, Message: err.Error()}
	if own, ok := errors.AsType[*provider.Error](err); ok {
		out.Details, out.NextStep = maps.Clone(own.Details), own.Next
	}
	if origin, ok := errors.AsType[*apierror.Error](err); ok {
		if from := read(origin); from.GetCorrelationId() != "" {
			out.CorrelationId, out.Timestamp = from.GetCorrelationId(), from.GetTimestamp()
		}
	}
	return apierror.FromProto(out)
}

// FromAPI returns an error of the API, such as the gRPC status that a call of
// another agent ended with, as an error of package provider. Codes that a
// provider call cannot have become ErrInternal, NO_LEADER becomes
// ErrCommunication. Nil stays nil.
func FromAPI(err error) error {
	if err == nil {
		return nil
	}
	api := apierror.From(err)
	kind := provider.ErrInternal
	for _, c := range pairs {
		if c.code == api.Code() {
			kind = c.sentinel
		}
	}
	if api.Code() == pb.ErrorCode_ERROR_CODE_NO_LEADER {
		kind = provider.ErrCommunication
	}
	full := read(api)
	return provider.Errorf(kind, "%s", full.GetMessage()).WithAll(full.GetDetails()).
		NextStep("%s", full.GetNextStep()).Because(api)
}

// read returns what the error holds; there is no request to complete it from.
func read(e *apierror.Error) *pb.Error {
	return e.Proto(context.Background()) //nolint:forbidigo // only its values would be used
}
