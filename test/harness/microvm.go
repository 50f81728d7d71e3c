package harness

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/survey"
)

// MicroVM is the name of the runtime in virtual machines.
const MicroVM = "microvm"

const qemu = "qemu-system-x86_64"

// goneWithin is how long a virtual machine may outlive the agent that ran it.
const goneWithin = 20 * time.Second

// Backend returns the runtime of workloads that name none, on every cluster of this
// test process: what WASM_RUNTIME_BACKEND says, else "wasm". So the same tests run
// with either.
func Backend() string {
	if os.Getenv(node.EnvRuntime) == MicroVM {
		return MicroVM
	}
	return "wasm"
}

// withBackend has the nodes of a cluster execute guests as the test process was
// told; a test's own adjustments win. A node does not look for what could run
// virtual machines unless it is to run some.
func withBackend(t testing.TB, o *dev.Options) *Machines {
	t.Helper()
	if Backend() == MicroVM {
		NeedMicroVM(t)
	}
	adjust, machines := o.Adjust, NewMachines(t)
	o.Adjust = func(i int, cfg *node.Config) {
		cfg.MicroVM.Accel = "off"
		if Backend() == MicroVM {
			cfg.Runtime.Default, cfg.MicroVM.Accel = MicroVM, survey.TCG
		}
		if adjust != nil {
			adjust(i, cfg)
		}
		if cfg.MicroVM.Accel == survey.TCG && cfg.MicroVM.QEMU == "" {
			cfg.MicroVM.QEMU = machines.QEMU()
		}
	}
	return machines
}

// NeedMicroVM ends the test where virtual machines cannot be emulated: skipped with
// the reason, failed in CI.
func NeedMicroVM(t testing.TB) {
	t.Helper()
	binary, _ := Binary(t)
	var s survey.Survey
	driver, err := s.Open(t.Context(), survey.Options{Accelerator: survey.TCG, Init: binary})
	if err == nil {
		err = driver.Close()
	}
	if err != nil {
		Missing(t, "%v (scripts/setup.sh installs it as root)", err)
	}
}

// Machines tells the virtual machines of one cluster from all others, by the name
// that QEMU is started by.
type Machines struct {
	t   testing.TB
	dir string
}

// NewMachines returns the machines of a cluster that the test starts itself, with
// QEMU as its QEMU.
func NewMachines(t testing.TB) *Machines { return &Machines{t: t} }

// QEMU returns the path by which only this cluster starts QEMU.
func (m *Machines) QEMU() string {
	m.t.Helper()
	if m.dir != "" {
		return filepath.Join(m.dir, qemu)
	}
	program, err := exec.LookPath(qemu)
	if err != nil {
		Missing(m.t, "%v (scripts/setup.sh installs it as root)", err)
	}
	// Not in the test's own directory: machines run under ids of their own.
	if m.dir, err = os.MkdirTemp("", "qemu-"); err != nil {
		m.t.Fatal(err)
	}
	dir := m.dir
	m.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // nothing in it is secret
		m.t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(dir, qemu)); err != nil {
		m.t.Fatal(err)
	}
	return filepath.Join(dir, qemu)
}

// Running returns the ids of the processes that run virtual machines: instances,
// templates that are made, and paused clones.
func (m *Machines) Running() []int {
	m.t.Helper()
	if m.dir == "" {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		m.t.Fatal(err)
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// One that ends meanwhile has no command line any more.
		line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if program, _, _ := bytes.Cut(line, []byte{0}); string(program) == filepath.Join(m.dir, qemu) {
			out = append(out, pid)
		}
	}
	return out
}

// RunningOf returns those that the process of an agent has started.
func (m *Machines) RunningOf(agent int) []int {
	m.t.Helper()
	var out []int
	for _, pid := range m.Running() {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // as above
		// The fields behind the name, which may hold anything: the state and the parent.
		if fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]); len(fields) > 1 && string(fields[1]) == strconv.Itoa(agent) {
			out = append(out, pid)
		}
	}
	return out
}

// Gone waits until the given machines, or all if none is given, have ended.
func (m *Machines) Gone(pids ...int) error {
	return m.left("virtual machines to end", func(running []int) []int {
		if len(pids) == 0 {
			return running
		}
		return slices.DeleteFunc(running, func(pid int) bool { return !slices.Contains(pids, pid) })
	})
}

// Fewer waits until one of the given machines, if there are any, has ended.
func (m *Machines) Fewer(pids []int) error {
	return m.left("a virtual machine to end", func(running []int) []int {
		if slices.ContainsFunc(pids, func(pid int) bool { return !slices.Contains(running, pid) }) {
			return nil
		}
		return pids
	})
}

// left waits until too many, asked with the machines that run, names none.
func (m *Machines) left(what string, tooMany func(running []int) []int) error {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.t.Context()), goneWithin)
	defer cancel()
	return Until(ctx, what, func(context.Context) error {
		if pids := tooMany(m.Running()); len(pids) > 0 {
			return fmt.Errorf("processes %v run", pids)
		}
		return nil
	})
}
