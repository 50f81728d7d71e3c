package agent

import (
	"fmt"
	"io"
	"math"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/quantity"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// What an unset field of InstanceLimits means.
const (
	defaultMemory      = 64 << 20
	maxMemory          = 4 << 30
	defaultCallTimeout = 30 * time.Second
	defaultConcurrency = 1
)

// runtimeSpec translates an assigned instance into what its executor needs; this
// is the one place where a message of the wire becomes a type of the runtime.
// module has been verified. Its errors mean that the spec can never run.
func runtimeSpec(inst *pb.Instance, module moduleFile, stdout, stderr io.Writer) (runtime.Spec, error) {
	spec, limits := inst.GetSpec(), inst.GetSpec().GetLimits()
	memory, err := memoryLimit(limits.GetMemory())
	if err != nil {
		return runtime.Spec{}, err
	}
	timeout := limits.GetTimeout().AsDuration()
	if timeout <= 0 && !module.command {
		timeout = defaultCallTimeout
	}
	concurrency := limits.GetConcurrency()
	if concurrency == 0 {
		concurrency = defaultConcurrency
	}
	if concurrency > math.MaxInt32 {
		return runtime.Spec{}, fmt.Errorf("limits.concurrency is %d", concurrency)
	}
	return runtime.Spec{
		InstanceID:  inst.GetId(),
		Name:        inst.GetName(),
		Generation:  inst.GetPlacement().GetGeneration(),
		Digest:      spec.GetModule(),
		ModulePath:  module.path,
		MemoryBytes: memory,
		Timeout:     timeout,
		Concurrency: int(concurrency),
		Args:        spec.GetArgs(),
		Env:         spec.GetEnv(),
		Stdin:       spec.GetStdin(),
		Stdout:      stdout,
		Stderr:      stderr,
	}, nil
}

// memoryLimit reads limits.memory; empty means the default.
func memoryLimit(s string) (uint64, error) {
	if s == "" {
		return defaultMemory, nil
	}
	n, err := quantity.ParseBytes(s)
	if err != nil {
		return 0, fmt.Errorf("limits.memory: %w", err)
	}
	if n > maxMemory {
		return 0, fmt.Errorf("limits.memory is %s, the most is %s", s, quantity.FormatBytes(maxMemory))
	}
	return n, nil
}

// tiedToLease reports whether the instance stops itself when the node is cut off.
func tiedToLease(inst *pb.Instance) bool {
	return inst.GetSpec().GetOnDisconnect() == onDisconnectStop || plant.On(plant.StopsWhenCutOff)
}

// onDisconnectStop is the value of WorkloadSpec.on_disconnect that ties an
// instance to the lease of its node.
const onDisconnectStop = "stop"
