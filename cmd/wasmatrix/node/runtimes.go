package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node/guestinit"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/survey"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// The names of the runtimes.
const (
	runtimeWasm    = "wasm"
	runtimeMicroVM = "microvm"
)

// accelOff is the value of microvm.accel for a node without virtual machines.
const accelOff = "off"

// vmIdentities is the first of the ids that virtual machines run under when the
// agent is root: far above those that people and services get.
const vmIdentities = 1_900_000_000

// initArguments make this program the init of a virtual machine; see BecomeInit.
var initArguments = []string{"internal", "microvm-init"}

// MicroVMConfig says how guests are executed in virtual machines.
type MicroVMConfig struct {
	// Accel is "auto" (KVM where it works, else no virtual machines), "kvm", "tcg"
	// (emulation) or "off"; default "auto".
	Accel string `yaml:"accel"`
	// QEMU is the path of QEMU; empty means to look for it in PATH.
	QEMU string `yaml:"qemu"`
	// Kernel is the path of the kernel image that machines boot; empty means to look for one.
	Kernel string `yaml:"kernel"`
	// Modules is the directory with the modules of Kernel; empty means to look for it.
	Modules string `yaml:"modules"`
	// Init is the path of the init of the machines; empty means the one inside this
	// program, or without one this program itself.
	Init string `yaml:"init"`
}

// Check tells a value that is none of those there are.
func (c MicroVMConfig) Check() error {
	if !slices.Contains([]string{survey.Auto, survey.KVM, survey.TCG, accelOff}, c.Accel) {
		return fmt.Errorf("microvm.accel %q: want auto, kvm, tcg or off", c.Accel)
	}
	return nil
}

// SurveyOptions returns what decides whether this node can run virtual machines.
func (c MicroVMConfig) SurveyOptions() survey.Options {
	o := survey.Options{
		Accelerator: c.Accel, Binary: c.QEMU, Kernel: c.Kernel, Modules: c.Modules, Init: c.Init,
		Embedded: guestinit.Program, SelfArguments: initArguments,
	}
	if os.Geteuid() == 0 {
		o.Identities = vmIdentities
	}
	return o
}

// runtimeName understands other spellings of a runtime's name.
func runtimeName(name string) string {
	switch name {
	case "wazero":
		return runtimeWasm
	case "micro-kvm":
		return runtimeMicroVM
	default:
		return name
	}
}

// ErrMicroVM is returned when a node was asked for virtual machines that it cannot
// run. The message says why, and what to do.
var ErrMicroVM = errors.New("this node was asked for the runtime microvm, and cannot offer it")

// wantsMicroVM reports whether the node is of no use without virtual machines to
// whoever configured it. With "auto" it does without them.
func (c *Config) wantsMicroVM() bool {
	return c.Runtime.Default == runtimeMicroVM || c.MicroVM.Accel == survey.KVM || c.MicroVM.Accel == survey.TCG
}

// CheckMicroVM finds out whether the node can run virtual machines if it was asked
// for them. Its error wraps ErrMicroVM.
func CheckMicroVM(ctx context.Context, cfg Config) error {
	if !cfg.wantsMicroVM() {
		return nil
	}
	var s survey.Survey
	driver, err := s.Open(ctx, cfg.MicroVM.SurveyOptions())
	if err != nil {
		return unavailable(err)
	}
	return driver.Close()
}

// unavailable makes ErrMicroVM of what a survey found.
func unavailable(err error) error {
	return fmt.Errorf("%w: %s; wasmatrix doctor says more", ErrMicroVM, trimmed(err.Error()))
}

// runtimes are the executors of an agent.
type runtimes struct {
	all     map[string]runtime.Runtime
	microvm *microvm.Runtime // nil on a node without virtual machines
	log     *slog.Logger
}

// openRuntimes opens every executor that this node can offer. A node that cannot
// run virtual machines says why and goes on without, unless they are what it was
// asked for.
func openRuntimes(ctx context.Context, cfg Config, log *slog.Logger, metrics prometheus.Registerer) (_ *runtimes, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r := &runtimes{all: map[string]runtime.Runtime{}, log: log}
	r.all[runtimeWasm], err = wasm.New(ctx, wasm.Config{
		CacheDir: filepath.Join(cfg.DataDir, "agent", "compiled"), CompileCommand: []string{self, "internal", "compile"},
		Logger: log, Registerer: metrics,
	})
	if err != nil {
		return nil, err
	}
	if cfg.MicroVM.Accel == accelOff {
		return r, nil
	}
	err = r.openMicroVM(ctx, cfg.MicroVM.SurveyOptions(), metrics)
	switch {
	case err == nil:
		return r, nil
	case !errors.Is(err, vmm.ErrUnavailable):
		return nil, errors.Join(fmt.Errorf("opening the runtime microvm: %w", err), r.close(ctx))
	case cfg.wantsMicroVM():
		return nil, errors.Join(unavailable(err), r.close(ctx))
	}
	log.Info("this node offers no runtime microvm", "reason", trimmed(err.Error()))
	return r, nil
}

func (r *runtimes) openMicroVM(ctx context.Context, o survey.Options, metrics prometheus.Registerer) error {
	var s survey.Survey
	driver, err := s.Open(ctx, o)
	if err != nil {
		return err
	}
	vm, err := microvm.New(ctx, microvm.Config{Driver: driver, Isolation: s.Isolation, Logger: r.log, Registerer: metrics})
	if err != nil {
		return errors.Join(err, driver.Close())
	}
	if s.Isolation == vmm.Emulated {
		r.log.Warn("virtual machines are emulated on this node: slower, and what isolates them is the emulator, not the processor", "accel", o.Accelerator)
	}
	r.microvm, r.all[runtimeMicroVM] = vm, vm
	return nil
}

// names returns the names of the runtimes, sorted.
func (r *runtimes) names() []string { return slices.Sorted(maps.Keys(r.all)) }

// isolationSandbox is the word for what keeps guests of the runtime wasm apart.
const isolationSandbox = "sandbox"

// infos tells of each runtime what keeps its instances apart, and by what.
func (r *runtimes) infos() []*pb.RuntimeInfo {
	out := []*pb.RuntimeInfo{{Name: runtimeWasm, Isolation: isolationSandbox}}
	if r.microvm == nil {
		return out
	}
	accelerator := survey.KVM
	if r.microvm.Isolation() == vmm.Emulated {
		accelerator = survey.TCG
	}
	return append(out, &pb.RuntimeInfo{Name: runtimeMicroVM, Isolation: string(r.microvm.Isolation()), Accelerator: accelerator})
}

// Run makes what the first virtual machine would have to wait for. It returns nil
// in any case: a start meets the same failure and says so.
func (r *runtimes) Run(ctx context.Context) error {
	if r.microvm == nil {
		return nil
	}
	if err := r.microvm.Warm(ctx); err != nil && ctx.Err() == nil {
		r.log.Warn("the template of virtual machines could not be made", "error", err)
	}
	return nil
}

func (r *runtimes) close(ctx context.Context) error {
	var errs []error
	for _, name := range r.names() {
		errs = append(errs, r.all[name].Close(context.WithoutCancel(ctx)))
	}
	return errors.Join(errs...)
}
