// Package apierror is the one shape of a failure at every edge of wasmatrix: a
// Go error that carries a pb.Error, travels as a gRPC status detail and comes
// out at the other side as the same Go error. It imports only proto and
// correlation.
package apierror

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Error is a failure in the shape of the API. Make one with New and complete it
// with With and Next before it is shared; it is not changed afterwards.
type Error struct {
	proto *pb.Error
}

// New makes an Error. The message is one sentence in lower case without a final
// stop; it says what failed.
func New(code pb.ErrorCode, format string, args ...any) *Error {
	return &Error{proto: &pb.Error{Code: code, Message: fmt.Sprintf(format, args...)}}
}

// FromProto wraps an Error that came from the registry or from a guest call.
// It returns nil for nil.
func FromProto(e *pb.Error) *Error {
	if e == nil {
		return nil
	}
	return &Error{proto: e}
}

// With adds a detail of the state that was found and returns e.
func (e *Error) With(key, value string) *Error {
	if e.proto.Details == nil {
		e.proto.Details = map[string]string{}
	}
	e.proto.Details[key] = value
	return e
}

// Next sets what to try next and returns e.
func (e *Error) Next(format string, args ...any) *Error {
	e.proto.NextStep = fmt.Sprintf(format, args...)
	return e
}

// Error returns the message.
func (e *Error) Error() string { return e.proto.GetMessage() }

// Code returns the kind of failure.
func (e *Error) Code() pb.ErrorCode { return e.proto.GetCode() }

// Detail returns one detail, or "".
func (e *Error) Detail(key string) string { return e.proto.GetDetails()[key] }

// Proto returns a copy of the failure as a message, with the time and the
// correlation id of ctx filled in where they are missing.
func (e *Error) Proto(ctx context.Context) *pb.Error {
	out, ok := proto.Clone(e.proto).(*pb.Error)
	if !ok {
		return &pb.Error{Code: pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, Message: e.Error()}
	}
	if out.Timestamp == nil {
		out.Timestamp = timestamppb.New(time.Now())
	}
	if out.CorrelationId == "" {
		out.CorrelationId = correlation.ID(ctx)
	}
	return out
}

// Is reports whether target is an *Error with the same code, so that
// errors.Is(err, apierror.New(code, "")) works.
func (e *Error) Is(target error) bool {
	other, ok := errors.AsType[*Error](target)
	return ok && other.Code() == e.Code()
}

// GRPCStatus makes grpc-go send e with its detail.
func (e *Error) GRPCStatus() *status.Status {
	return e.Status(context.Background()) //nolint:forbidigo // the interface has no context
}

// Status returns the gRPC status that carries e, completed from ctx.
func (e *Error) Status(ctx context.Context) *status.Status {
	full := e.Proto(ctx)
	st := status.New(GRPCCode(full.Code), full.Message)
	if with, err := st.WithDetails(full); err == nil {
		return with
	}
	return st
}

// CodeOf returns the code of the failure in err's chain: of an *Error, of a
// gRPC status with our detail, or by the meaning of a context error or a plain
// gRPC status. It returns ERROR_CODE_UNSPECIFIED for nil.
func CodeOf(err error) pb.ErrorCode {
	if err == nil {
		return pb.ErrorCode_ERROR_CODE_UNSPECIFIED
	}
	return From(err).Code()
}

// From turns any error into an *Error; nil stays nil. What it does not know
// becomes INTERNAL_ERROR with the error's own text.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	if own, ok := errors.AsType[*Error](err); ok {
		if own.Error() == err.Error() {
			return own
		}
		wrapped := FromProto(own.Proto(context.Background())) //nolint:forbidigo // only the fields are wanted
		wrapped.proto.Message = err.Error()
		return wrapped
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "%s", err)
	case errors.Is(err, context.Canceled):
		return New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "%s", err)
	}
	st, ok := status.FromError(err)
	if !ok {
		return New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "%s", err)
	}
	for _, d := range st.Details() {
		if e, ok := d.(*pb.Error); ok {
			return FromProto(e)
		}
	}
	return New(fromGRPC(st.Code()), "%s", st.Message())
}

// GRPCCode returns the gRPC status code that stands for code.
func GRPCCode(code pb.ErrorCode) codes.Code {
	switch code {
	case pb.ErrorCode_ERROR_CODE_INVALID_REQUEST:
		return codes.InvalidArgument
	case pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND,
		pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND:
		return codes.NotFound
	case pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED:
		return codes.PermissionDenied
	case pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED:
		return codes.ResourceExhausted
	case pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE,
		pb.ErrorCode_ERROR_CODE_NO_LEADER:
		return codes.Unavailable
	case pb.ErrorCode_ERROR_CODE_TIMEOUT:
		return codes.DeadlineExceeded
	case pb.ErrorCode_ERROR_CODE_CONFLICT:
		return codes.FailedPrecondition
	default:
		return codes.Internal
	}
}

func fromGRPC(c codes.Code) pb.ErrorCode {
	switch c {
	case codes.InvalidArgument, codes.OutOfRange, codes.Unimplemented:
		return pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
	case codes.PermissionDenied, codes.Unauthenticated:
		return pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
	case codes.ResourceExhausted:
		return pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED
	case codes.DeadlineExceeded:
		return pb.ErrorCode_ERROR_CODE_TIMEOUT
	case codes.Unavailable, codes.Canceled, codes.Aborted:
		return pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE
	case codes.FailedPrecondition, codes.AlreadyExists:
		return pb.ErrorCode_ERROR_CODE_CONFLICT
	default:
		return pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR
	}
}
