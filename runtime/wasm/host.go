package wasm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	goruntime "runtime"
	"slices"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// buildHost adds to r everything that guests may import.
func buildHost(ctx context.Context, r wazero.Runtime) error {
	i32, i64 := api.ValueTypeI32, api.ValueTypeI64
	builders := []wazero.HostModuleBuilder{buildWASI(r)}
	for _, name := range slices.Sorted(maps.Keys(capabilities)) {
		b := r.NewHostModuleBuilder(guestabi.Prefix + name + "/" + guestabi.Version)
		for _, operation := range capabilities[name] {
			b.NewFunctionBuilder().
				WithGoModuleFunction(capabilityFunction(name, operation), []api.ValueType{i32, i32, i32, i32}, []api.ValueType{i64}).
				Export(operation)
		}
		builders = append(builders, b)
	}
	builders = append(builders,
		r.NewHostModuleBuilder(guestabi.Result).NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(readResult), []api.ValueType{i32, i32}, []api.ValueType{i32}).
			Export("read"),
		r.NewHostModuleBuilder(module.CheckpointModule).NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(checkpoint), nil, []api.ValueType{i64}).
			Export(module.CheckpointName),
	)
	for _, b := range builders {
		if _, err := b.Instantiate(ctx); err != nil {
			return fmt.Errorf("building the guest's imports: %w", err)
		}
	}
	return nil
}

// wasiTypes returns the types of the functions of WASI preview 1 that exist.
func wasiTypes(ctx context.Context) (map[string]module.FuncType, error) {
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	compiled, err := buildWASI(r).Compile(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("building WASI: %w", err), r.Close(ctx))
	}
	types := map[string]module.FuncType{}
	for name, f := range compiled.ExportedFunctions() {
		types[name] = module.FuncType{Params: valueTypes(f.ParamTypes()), Results: valueTypes(f.ResultTypes())}
	}
	return types, r.Close(ctx)
}

func valueTypes(types []api.ValueType) []module.ValueType {
	out := make([]module.ValueType, len(types))
	for i, t := range types {
		out[i] = module.ValueType(t)
	}
	return out
}

// checkpoint is called by a metered guest whose budget is used up. It gives way:
// Go cannot take the processor from compiled guests otherwise, and neither other
// guests nor the agent's own work should wait for the ten milliseconds after
// which it would try.
func checkpoint(ctx context.Context, _ api.Module, stack []uint64) {
	slotOf(ctx).interruptible()
	goruntime.Gosched()
	stack[0] = budget
}

// capabilityFunction is one imported function of a capability.
func capabilityFunction(capability, operation string) api.GoModuleFunc {
	return func(ctx context.Context, mod api.Module, stack []uint64) {
		s := slotOf(ctx)
		status, size := s.capability(mod.Memory(), capability, operation, stack)
		stack[0] = uint64(status)<<32 | uint64(size)
	}
}

// capability makes one call of the host. The guest is interrupted before and
// after, so that a call neither begins nor returns after the instance has ended.
func (s *slot) capability(mem api.Memory, capability, operation string, stack []uint64) (status, size uint32) {
	s.answer, s.waiting = nil, false
	ctx := s.hostContext()
	unwanted := s.cutOff()
	s.instance.capabilityCalls.Add(1)
	inPtr, inLen := uint32(stack[0]), uint32(stack[1])
	outPtr, outCap := uint32(stack[2]), uint32(stack[3])
	var out []byte
	if outCap > 0 {
		var ok bool
		if out, ok = mem.Read(outPtr, outCap); !ok {
			return s.refuse(nil, "output of %d bytes at %d is outside of the guest's memory", outCap, outPtr)
		}
	}
	if inLen > maxInput {
		return s.refuse(out, "input of %d bytes, at most %d are allowed", inLen, maxInput)
	}
	in, ok := mem.Read(inPtr, inLen)
	if !ok {
		return s.refuse(out, "input of %d bytes at %d is outside of the guest's memory", inLen, inPtr)
	}
	if unwanted {
		f := s.failure(apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "the caller's deadline has passed"))
		return f.Code, s.deliver(out, f.Encoded)
	}
	answer, err := s.callHost(ctx, capability, operation, s.copied(in))
	s.cutOff()
	if err != nil {
		var failure *runtime.Failure
		if !errors.As(err, &failure) {
			failure = s.failure(apierror.From(err))
		}
		// Status 0 would tell the guest that the call succeeded.
		return max(failure.Code, 1), s.deliver(out, failure.Encoded)
	}
	return 0, s.deliver(out, answer)
}

// keptInput is the longest input whose memory a slot keeps for its next call.
const keptInput = 64 << 10

// copied returns a copy of a call's input, valid until the next one. The host gets
// no memory of the guest: that is unmapped when the guest ends, and a host that held
// on to it by mistake would bring down the process.
func (s *slot) copied(in []byte) []byte {
	if len(in) > keptInput {
		return bytes.Clone(in)
	}
	s.input = append(s.input[:0], in...)
	return s.input
}

// cutOff ends the guest like interruptible, and reports whether only the context
// for calls of the host has ended: nobody waits for what they achieve.
func (s *slot) cutOff() (unwanted bool) {
	select {
	case <-s.call.hostDone:
		s.interruptible()
		return true
	default:
		return false
	}
}

// callHost calls the host and turns a panic of it into an error.
func (s *slot) callHost(ctx context.Context, capability, operation string, payload []byte) (answer []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			s.instance.logger().Error("capability call panicked", "capability", capability, "operation", operation, "panic", r)
			answer, err = nil, apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "%s %s failed", capability, operation)
		}
	}()
	return s.instance.host.Call(ctx, capability, operation, payload)
}

// deliver writes an answer to the guest's output, or keeps it when it does not fit.
func (s *slot) deliver(out, answer []byte) uint32 {
	if len(answer) > len(out) {
		s.answer, s.waiting = answer, true
	} else {
		copy(out, answer)
	}
	return uint32(len(answer))
}

func (s *slot) refuse(out []byte, format string, args ...any) (status, size uint32) {
	f := s.failure(apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, format, args...))
	return f.Code, s.deliver(out, f.Encoded)
}

func (s *slot) failure(e *apierror.Error) *runtime.Failure {
	message := e.Proto(s.hostContext())
	encoded, err := proto.Marshal(message)
	if err != nil {
		s.instance.logger().Error("encoding the error of a capability call", slog.Any("error", err))
	}
	return &runtime.Failure{Code: uint32(max(message.GetCode(), 1)), Encoded: encoded}
}

// noResult is what wasmatrix:result/v1 read returns when no answer waits or the
// range is outside of memory.
const noResult = -1

// readResult copies the answer that did not fit into the output of the last
// capability call and returns its length. With too little room it copies
// nothing, and the answer goes on waiting.
func readResult(ctx context.Context, mod api.Module, stack []uint64) {
	s := slotOf(ctx)
	s.interruptible()
	capacity := uint32(stack[1])
	out, ok := mod.Memory().Read(uint32(stack[0]), min(capacity, uint32(len(s.answer))))
	if !s.waiting || !ok {
		stack[0] = api.EncodeI32(noResult)
		return
	}
	stack[0] = uint64(uint32(len(s.answer)))
	if uint64(capacity) < uint64(len(s.answer)) {
		return
	}
	copy(out, s.answer)
	s.answer, s.waiting = nil, false
}
