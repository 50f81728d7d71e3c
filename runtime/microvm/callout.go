package microvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

const (
	// maxOutputs bounds the outputs that wait to be handed on. A machine writes one
	// at a time and waits for it; more come only from one that does not keep to that.
	maxOutputs = 16
	// maxCallsPerSlot bounds the calls of the host under way, for the same reason.
	// Those that the guest has abandoned count until they return.
	maxCallsPerSlot = 16
)

// errTooMuch: the machine does not wait for what it asked for.
var errTooMuch = fmt.Errorf("%w: more at once than a guest can ask for", channel.ErrMalformed)

// called implements owner: the guest makes a capability call.
func (i *instance) called(id uint64, payload []byte) error {
	call, err := channel.DecodeCapabilityCall(payload)
	if err != nil {
		return err
	}
	s := &i.state
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fenced() {
		return nil
	}
	if s.calls[id] != nil || len(s.calls) >= maxCallsPerSlot*i.spec.Concurrency {
		return errTooMuch
	}
	origin := s.origin
	if v := s.invocations[call.Invocation]; v != nil {
		origin = v.ctx
	}
	if origin == nil {
		return fmt.Errorf("%w: a capability call before the start", channel.ErrMalformed)
	}
	s.usage.CapabilityCalls++
	// Of the caller's context, calls take the values and the deadline: its end by
	// other means is not that of the guest.
	ctx, cut := context.WithCancel(context.WithoutCancel(origin))
	s.calls[id] = cut
	i.work.Go(func() {
		defer cut()
		if s.mu.Lock(); s.fenced() {
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		if deadline, ok := origin.Deadline(); ok {
			var stop context.CancelFunc
			ctx, stop = context.WithDeadline(ctx, deadline)
			defer stop()
		}
		answer, err := i.callHost(ctx, call)
		s.mu.Lock()
		delete(s.calls, id)
		over := s.phase == ended
		s.mu.Unlock()
		if !over {
			i.respond(ctx, id, answer, err)
		}
	})
	return nil
}

// fenced reports whether no call of the host may begin any more. The lock is held.
func (s *state) fenced() bool {
	return s.phase == ended || s.phase == stopping && !time.Now().Before(s.until)
}

// respond answers a capability call. A machine that has gone needs no answer.
func (i *instance) respond(ctx context.Context, id uint64, answer []byte, err error) {
	if err != nil {
		_ = i.link.conn.Send(channel.Refusal, id, channel.EncodeRefusal(i.failure(ctx, err)))
		return
	}
	_ = i.link.conn.Send(channel.Answer, id, answer)
}

// callHost calls the host and turns a panic of it into an error.
func (i *instance) callHost(ctx context.Context, call channel.CapabilityCall) (answer []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			i.logger.Error("capability call panicked", "capability", call.Capability, "operation", call.Operation, "panic", r)
			answer, err = nil, apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "%s %s failed", call.Capability, call.Operation)
		}
	}()
	return i.host.Call(ctx, call.Capability, call.Operation, call.Input)
}

// failure is an error of the host as the guest sees it.
func (i *instance) failure(ctx context.Context, err error) *runtime.Failure {
	if failure, ok := errors.AsType[*runtime.Failure](err); ok {
		return failure
	}
	message := apierror.From(err).Proto(ctx)
	encoded, err := proto.Marshal(message)
	if err != nil {
		i.logger.Error("encoding the error of a capability call", "error", err)
	}
	return &runtime.Failure{Code: uint32(max(message.GetCode(), 1)), Encoded: encoded}
}

// abandoned implements owner: the guest does not wait for a capability call any more.
func (i *instance) abandoned(id uint64) {
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	if cut := i.state.calls[id]; cut != nil {
		cut()
	}
}

// wrote implements owner: the guest wrote to an output stream.
func (i *instance) wrote(id uint64, payload []byte) error {
	if len(payload) == 0 || len(payload) > 1+channel.MaxOutput {
		return fmt.Errorf("%w: output of %d bytes", channel.ErrMalformed, len(payload))
	}
	writer := i.spec.Stdout
	switch channel.Stream(payload[0]) {
	case channel.Stdout:
	case channel.Stderr:
		writer = i.spec.Stderr
	default:
		return fmt.Errorf("%w: output stream %d", channel.ErrMalformed, payload[0])
	}
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	if i.state.phase == ended {
		return nil
	}
	if i.state.outputs >= maxOutputs {
		return errTooMuch
	}
	i.state.outputs++
	i.work.Go(func() { i.handOn(id, writer, payload[1:]) })
	return nil
}

// handOn writes output. Writers do not fail; what they do with it is theirs.
func (i *instance) handOn(id uint64, writer io.Writer, text []byte) {
	i.output.Lock()
	_, err := writer.Write(text)
	i.output.Unlock()
	if err != nil {
		i.logger.Warn("output of a guest was not taken", "error", err)
	}
	i.state.mu.Lock()
	i.state.outputs--
	i.state.mu.Unlock()
	_ = i.link.conn.Send(channel.Written, id) // a machine that has gone needs no answer
}

// grown implements owner: the linear memories have changed their size.
func (i *instance) grown(payload []byte) error {
	size, rest, err := channel.DecodeNumber(payload)
	if err == nil && len(rest) > 0 {
		err = channel.ErrMalformed
	}
	if err == nil {
		i.memory.Store(size)
	}
	return err
}
