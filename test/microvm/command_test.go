package microvm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// command is the built binary with an environment of its own.
type command struct {
	t   *testing.T
	env []string
}

func (c *command) cmd(args ...string) *exec.Cmd {
	c.t.Helper()
	binary, _ := harness.Binary(c.t)
	cmd := exec.CommandContext(c.t.Context(), binary, args...)
	cmd.Env = append(os.Environ(), append([]string{"NO_COLOR=1", node.EnvRuntime + "=", node.EnvAccel + "="}, c.env...)...)
	return cmd
}

// run returns what it printed, and its exit code.
func (c *command) run(args ...string) harness.Output {
	c.t.Helper()
	cmd := c.cmd(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return harness.Output{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// TestMicroVMInDev starts a development cluster whose default runtime the environment
// names in its other spelling, runs a workload that names none, and ends the
// cluster in two ways: no virtual machine is left.
func TestMicroVMInDev(t *testing.T) {
	harness.NeedMicroVM(t)
	for _, end := range []struct {
		name   string
		signal syscall.Signal
	}{{"Ctrl-C", syscall.SIGINT}, {"kill -9", syscall.SIGKILL}} {
		t.Run(end.name, func(t *testing.T) {
			machines := harness.NewMachines(t)
			dir := t.TempDir()
			contextPath := filepath.Join(dir, "context.yaml")
			c := &command{t: t, env: []string{
				"PATH=" + filepath.Dir(machines.QEMU()) + ":" + os.Getenv("PATH"), "TMPDIR=" + dir, "WASMATRIX_CONTEXT=" + contextPath,
				node.EnvRuntime + "=micro-kvm", node.EnvAccel + "=tcg",
			}}
			dev := c.cmd("dev", "--port-base", fmt.Sprint(harness.FreePortBase(1)), "--metrics-port", "0", "--write-context", contextPath)
			stderr := harness.StartDev(t, dev)
			guest := filepath.Join(dir, "echo.wasm")
			if err := os.WriteFile(guest, runtimetest.Echo(), 0o600); err != nil {
				t.Fatal(err)
			}
			if out := c.run("run", guest, "--wait-timeout", settleTime.String()); out.Code != 0 {
				t.Errorf("run: %+v", out)
			}
			if out := c.run("ps"); !strings.Contains(out.Stdout, "microvm (emulated)") {
				t.Errorf("ps: %+v", out)
			}
			if len(machines.Running()) == 0 {
				t.Error("no virtual machine runs")
			}
			if err := dev.Process.Signal(end.signal); err != nil {
				t.Fatal(err)
			}
			if err := dev.Wait(); end.signal == syscall.SIGINT && err != nil {
				t.Errorf("the end of dev: %v\n%s", err, stderr.String())
			}
			if err := machines.Gone(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestMicroVMRefused asks a node for virtual machines that it cannot run: it does
// not start, with one error that says what to install.
func TestMicroVMRefused(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "node.yaml")
	if err := os.WriteFile(config, []byte("node: {name: n1}\ndata_dir: "+dir+"/data\njoin: {bootstrap_expect: 1}\nmicrovm: {accel: tcg, qemu: "+dir+"/none}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	nothing := &command{t: t, env: []string{"PATH=" + dir, "WASMATRIX_CONTEXT=" + filepath.Join(dir, "context.yaml")}}
	port := fmt.Sprint(harness.FreePortBase(1))
	for name, args := range map[string][]string{
		"a configuration":            {"agent", "--config", config},
		"a flag of dev":              {"dev", "--microvm-accel", "tcg", "--port-base", port, "--metrics-port", "0"},
		"the default runtime of dev": {"dev", "--runtime", "microvm", "--microvm-accel", "tcg", "--port-base", port, "--metrics-port", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			c := &command{t: t, env: nothing.env}
			out := c.run(args...)
			if out.Code != 2 || strings.Count(out.Stderr, "error: ") != 1 || !strings.Contains(out.Stderr, "install the Debian package") {
				t.Errorf("%v: %+v", args, out)
			}
		})
	}
}

// diagnosis is what doctor says as JSON.
type diagnosis struct {
	Works     bool
	Isolation string
	Findings  []struct {
		Name   string
		OK     bool
		Detail string
	}
	Next []string
}

func (d *diagnosis) finding(name string) string {
	for _, f := range d.Findings {
		if f.Name == name {
			return fmt.Sprint(f.OK, " ", f.Detail)
		}
	}
	return ""
}

// TestMicroVMDiagnosed asks what this machine can do, as it is and without QEMU.
func TestMicroVMDiagnosed(t *testing.T) {
	harness.NeedMicroVM(t)
	c := &command{t: t}
	out := c.run("doctor", "--microvm-accel", "tcg", "-o", "json")
	var d diagnosis
	if err := json.Unmarshal([]byte(out.Stdout), &d); err != nil {
		t.Fatalf("%v: %+v", err, out)
	}
	if out.Code != 0 || !d.Works || d.Isolation != "emulated" || len(d.Next) != 0 {
		t.Errorf("with emulation: exit %d, %+v", out.Code, d)
	}
	for _, name := range []string{"kernel", "init", "qemu", "snapshot", "guest", "tcg"} {
		if !strings.HasPrefix(d.finding(name), "true ") {
			t.Errorf("%s: %q", name, d.finding(name))
		}
	}
	if !strings.Contains(d.finding("init"), "part of this program") {
		t.Errorf("the binary brings no init of its own: %q", d.finding("init"))
	}
	without := &command{t: t, env: []string{"PATH=" + t.TempDir()}}
	if out := without.run("doctor"); out.Code != 1 || !strings.Contains(out.Stdout, "next: install, as root on Debian: apt-get install --no-install-recommends qemu-system-x86\n") {
		t.Errorf("without QEMU: %+v", out)
	}
	if out := c.run("doctor", "--microvm-accel", "warp"); out.Code != 2 || !strings.Contains(out.Stderr, "auto, kvm, tcg or off") {
		t.Errorf("an accelerator that is none: %+v", out)
	}
}

// TestMicroVMWithoutItsInit builds the binary as plain go build does, without the
// init inside: then it is its own.
func TestMicroVMWithoutItsInit(t *testing.T) {
	harness.NeedMicroVM(t)
	plain := filepath.Join(t.TempDir(), "wasmatrix")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", plain, "../../cmd/wasmatrix")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	c := &command{t: t}
	cmd := c.cmd("doctor", "--microvm-accel", "tcg")
	cmd.Path = plain
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "ok  init      "+plain) {
		t.Errorf("doctor: %v\n%s", err, out)
	}
}
