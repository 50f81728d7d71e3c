//go:build linux && amd64

package microvm_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// only returns the one machine of this process.
func only(t *testing.T) int {
	t.Helper()
	pids := children(t, os.Getpid())
	if len(pids) != 1 {
		t.Fatalf("processes %v, want one", pids)
	}
	return pids[0]
}

// status returns the fields of /proc/PID/status.
func status(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	return fields
}

// TestConfinement looks at QEMU from outside: its identity, its limits, its filter
// of system calls, and what it holds.
func TestConfinement(t *testing.T) {
	r := onQEMU(t)
	rt.Started(t, r, rt.Spec(t, rt.Echo()), rt.NoHost(t))
	pid := only(t)
	fields := status(t, pid)
	if os.Geteuid() == 0 {
		for _, name := range []string{"Uid", "Gid"} {
			for id := range strings.FieldsSeq(fields[name]) {
				if len(id) < 6 {
					t.Errorf("%s is %s", name, fields[name])
				}
			}
		}
	}
	for name, want := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "Groups": ""} {
		if fields[name] != want {
			t.Errorf("%s is %q, want %q", name, fields[name], want)
		}
	}
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
		if strings.Trim(fields[name], "0") != "" {
			t.Errorf("%s is %s", name, fields[name])
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Max core file size", "Max file size", "Max open files", "Max address space"} {
		_, rest, _ := strings.Cut(string(limits), name)
		if line, _, _ := strings.Cut(rest, "\n"); strings.Contains(line, "unlimited") || line == "" {
			t.Errorf("%s: %q", name, line)
		}
	}
	if environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || len(environ) > 0 {
		t.Errorf("environment %q, %v", environ, err)
	}
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(descriptors) == 0 {
		t.Fatalf("%d descriptors, %v", len(descriptors), err)
	}
	for _, d := range descriptors {
		file, err := os.Readlink(d)
		if err != nil {
			t.Fatal(err)
		}
		known := false
		for _, prefix := range []string{"socket:", "pipe:", "anon_inode:", "/memfd:machine", "/dev/null"} {
			known = known || strings.HasPrefix(file, prefix)
		}
		if !known {
			t.Errorf("descriptor %s is %s", filepath.Base(d), file)
		}
	}
}

// chatter is a command that makes capability calls without end.
func chatter() []byte {
	var m rt.Module
	get := m.Import("wasmatrix:kv/v1", "get", []byte{rt.I32, rt.I32, rt.I32, rt.I32}, []byte{rt.I64})
	m.Memory(1)
	m.Func("_start", nil, nil, nil,
		rt.Loop(rt.I32Const(0), rt.I32Const(0), rt.I32Const(64), rt.I32Const(64), rt.Call(get), rt.Drop, rt.Br(0)))
	return m.Bytes()
}

// TestNoCallAfterTheEnd freezes a machine in the middle of its calls, as a node that
// is short of processors may, and ends its instance: nothing that the machine had
// sent takes effect after that.
func TestNoCallAfterTheEnd(t *testing.T) {
	r := onQEMU(t)
	var calls atomic.Int64
	called := make(chan struct{}, 1)
	i := rt.Started(t, r, rt.Spec(t, chatter()), rt.HostFunc(func(context.Context, string, string, []byte) ([]byte, error) {
		calls.Add(1)
		select {
		case called <- struct{}{}:
		default:
		}
		return nil, nil
	}))
	select {
	case <-called:
	case <-time.After(patience):
		t.Fatal("the guest makes no calls")
	}
	pid := only(t)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := i.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	before := calls.Load()
	if !gone(pid) {
		t.Fatal("the machine lives on")
	}
	if err := i.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := calls.Load(); after != before {
		t.Fatalf("%d calls after the end", after-before)
	}
}
