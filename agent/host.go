package agent

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// The capabilities that the agent serves itself, and their operations.
const (
	capabilityLog     = "log"
	operationWrite    = "write"
	capabilityContext = "context"
	operationGet      = "get"
)

// port is one instance's way to its providers; *provider.Port is one. Its
// errors wrap the sentinels of package provider.
type port interface {
	Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error)
	// End makes every further call fail; Settle then waits until none made before
	// can have an effect any more.
	End()
	Settle(ctx context.Context) error
}

// host is the guest's only way out, for one generation of one instance.
type host struct {
	inst  *pb.Instance
	log   *instanceLog
	port  port
	toAPI func(error) *apierror.Error
	// lease is nil unless the instance is tied to it.
	lease *lease
}

// Call serves one call of a capability import. Its errors are *runtime.Failure.
func (h *host) Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	if correlation.ID(ctx) == "" {
		ctx = correlation.With(ctx, h.inst.GetCorrelationId())
	}
	answer, err := h.serve(ctx, capability, operation, payload)
	if err != nil {
		return nil, h.failure(ctx, err)
	}
	return answer, nil
}

// end closes the way out: the guest has ended.
func (h *host) end() { h.port.End() }

// settle waits until no call of the guest can have an effect any more.
func (h *host) settle(ctx context.Context) error { return h.port.Settle(ctx) }

func (h *host) serve(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	switch capability {
	case capabilityLog:
		return h.write(ctx, operation, payload)
	case capabilityContext:
		return h.get(ctx, operation, payload)
	}
	if h.lease == nil {
		return h.port.Call(ctx, capability, operation, payload)
	}
	bound, release, err := h.lease.bind(ctx, h.inst.GetPlacement().GetNodeEpoch())
	if err != nil {
		return nil, h.leaseEnded()
	}
	defer release()
	answer, err := h.port.Call(bound, capability, operation, payload)
	if err != nil && errors.Is(context.Cause(bound), errLeaseEnded) {
		return nil, h.leaseEnded()
	}
	return answer, err
}

// leaseEnded refuses a call because the instance is tied to the node's lease.
func (h *host) leaseEnded() error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the lease of the node has ended and instance %s is tied to it", h.inst.GetId()).
		With("instance", h.inst.GetId()).With("on_disconnect", onDisconnectStop)
}

// write serves wasmatrix:log/v1.
func (h *host) write(ctx context.Context, operation string, payload []byte) ([]byte, error) {
	req := &pb.LogWriteRequest{}
	if err := decode(capabilityLog, operation, operationWrite, payload, req); err != nil {
		return nil, err
	}
	level := req.GetLevel()
	if level < pb.LogLevel_LOG_LEVEL_DEBUG || level > pb.LogLevel_LOG_LEVEL_ERROR {
		level = pb.LogLevel_LOG_LEVEL_INFO
	}
	h.log.add(&pb.LogEntry{
		Stream: pb.LogStream_LOG_STREAM_LOG, Level: level, Message: req.GetMessage(),
		Attributes: cutAttributes(req.GetAttributes()), CorrelationId: correlation.ID(ctx),
		Generation: h.inst.GetPlacement().GetGeneration(),
	})
	return proto.Marshal(&pb.LogWriteResponse{})
}

// get serves wasmatrix:context/v1.
func (h *host) get(ctx context.Context, operation string, payload []byte) ([]byte, error) {
	if err := decode(capabilityContext, operation, operationGet, payload, &pb.ContextGetRequest{}); err != nil {
		return nil, err
	}
	resp := &pb.ContextGetResponse{
		InstanceId: h.inst.GetId(), InstanceName: h.inst.GetName(),
		Generation: h.inst.GetPlacement().GetGeneration(), CorrelationId: correlation.ID(ctx),
	}
	if deadline, ok := ctx.Deadline(); ok {
		// 0 would mean that there is no limit.
		resp.DeadlineMs = uint64(max(time.Until(deadline).Milliseconds(), 1))
	}
	return proto.Marshal(resp)
}

// decode checks the operation and reads the request message.
func decode(capability, operation, want string, payload []byte, into proto.Message) error {
	if operation != want {
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "capability %s has no operation %q", capability, operation).
			Next("call %s", want)
	}
	if err := proto.Unmarshal(payload, into); err != nil {
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the request of %s %s is not a %s: %s",
			capability, operation, into.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// failure puts an error into the shape that a guest gets.
func (h *host) failure(ctx context.Context, err error) error {
	e := h.toAPI(err)
	full := e.Proto(ctx)
	if full.GetCode() == pb.ErrorCode_ERROR_CODE_UNSPECIFIED {
		full.Code = pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR
	}
	encoded, encodeErr := proto.Marshal(full)
	if encodeErr != nil {
		// The text of a provider's error need not be valid UTF-8.
		encoded, _ = proto.Marshal(&pb.Error{
			Code: full.GetCode(), Message: "the failure could not be described", CorrelationId: full.GetCorrelationId(),
		})
	}
	return &runtime.Failure{Code: uint32(full.GetCode()), Encoded: encoded}
}
