package microvm

import (
	"errors"
	"log/slog"
	goruntime "runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// Config configures a Runtime. Driver and Logger are required.
type Config struct {
	// Driver starts the machines. It belongs to the Runtime, whose Close closes it.
	Driver vmm.Driver
	// Isolation says what keeps the machines apart.
	Isolation vmm.Isolation
	// BootTimeout bounds the boot of a machine; 0 means one minute.
	BootTimeout time.Duration
	// CloneTimeout bounds the start of a clone; 0 means 20 seconds.
	CloneTimeout time.Duration
	// CompileTimeout bounds the compilation of a module; 0 means two minutes.
	CompileTimeout time.Duration
	// Overtime is how much longer than its time limit a guest may take before its
	// machine is killed; inside the machine the limit itself holds. 0 means 10 seconds.
	Overtime time.Duration
	// TemplateBytes bounds the memory of the modules' templates; those used longest
	// ago go first. 0 means 1 GiB.
	TemplateBytes uint64
	// Starting is how many machines are booted or cloned at once; 0 means twice the
	// number of processors.
	Starting int
	// Spares is how many paused clones are kept of each module that was started
	// lately; negative means none, 0 one.
	Spares int
	// Logger takes what operators should know; guests' output never goes there.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() (Config, error) {
	if c.Driver == nil || c.Logger == nil {
		return c, errors.New("the micro-VM runtime needs a driver and a logger")
	}
	for _, d := range []struct {
		value     *time.Duration
		otherwise time.Duration
	}{
		{&c.BootTimeout, time.Minute},
		{&c.CloneTimeout, 20 * time.Second},
		{&c.CompileTimeout, 2 * time.Minute},
		{&c.Overtime, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.otherwise
		}
	}
	if c.TemplateBytes == 0 {
		c.TemplateBytes = 1 << 30
	}
	if c.Starting == 0 {
		c.Starting = 2 * goruntime.NumCPU()
	}
	if c.Spares == 0 {
		c.Spares = 1
	}
	return c, nil
}

const (
	// ownBytes is what a machine needs besides linear memories: its kernel, its
	// init, and the code and the compiler of the module.
	ownBytes = 112 << 20
	// leastBytes is the smallest machine.
	leastBytes = 256 << 20
	// maxLinearBytes is the most that the linear memories of an instance may take.
	maxLinearBytes = 64 << 30
)

// machineBytes returns the size of a machine for linear memories of so many bytes:
// a power of two, so that few base templates serve all. Memory that a machine does
// not touch costs nothing.
func machineBytes(linear uint64) uint64 {
	size := uint64(leastBytes)
	for size < linear+ownBytes {
		size *= 2
	}
	return size
}
