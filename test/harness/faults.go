//go:build linux

package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// syncCalls are the system calls that make a file durable.
const syncCalls = "fsync,fdatasync"

// attachWithin bounds how long strace may take to take hold of a process.
const attachWithin = 20 * time.Second

// detachWithin bounds how long strace may take to let go of it.
const detachWithin = 10 * time.Second

// Missing ends a test that needs something of the machine which is not there:
// skipped with the reason elsewhere, failed in CI.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("needed in CI and missing: "+format, args...)
	}
	t.Skipf("missing: "+format, args...)
}

// NeedRoot ends the test unless it runs as root on Linux with the given commands at hand.
func NeedRoot(t testing.TB, commands ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root")
	}
	for _, name := range commands {
		if _, err := exec.LookPath(name); err != nil {
			Missing(t, "the command %s (scripts/setup.sh installs it)", name)
		}
	}
}

// Trace is a fault that strace injects into the system calls of one process.
type Trace struct {
	cmd  *exec.Cmd
	said chan struct{} // closed when strace has nothing more to say
	stop func() error
}

// Inject makes strace tamper with system calls of the process pid and of all its
// threads, as -e inject of strace(1) describes it: "fsync:error=EIO". It returns once
// strace has hold of the process. Stop the trace. The process may end meanwhile.
func Inject(pid int, inject string) (*Trace, error) {
	calls, _, _ := strings.Cut(inject, ":")
	cmd := exec.Command("strace", "-f", "-p", fmt.Sprint(pid), "-o", "/dev/null", "-e", "trace="+calls, "-e", "inject="+inject)
	said, err := cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("strace: %w", err)
	}
	// A process group of its own: what interrupts the test must not leave the
	// traced process stopped by a tracer that died half way. No signal for the death
	// of the parent: it comes with that of the thread that started strace, and the
	// threads of a Network die early. Strace ends with the process that it traces.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("strace: %w", err)
	}
	tr := &Trace{cmd: cmd, said: make(chan struct{})}
	tr.stop = sync.OnceValue(tr.end)
	attached := make(chan string, 1)
	go tr.read(said, attached)
	timer := time.NewTimer(attachWithin)
	defer timer.Stop()
	select {
	case line := <-attached:
		if strings.Contains(line, "attached") {
			return tr, nil
		}
		return nil, errors.Join(fmt.Errorf("strace of pid %d: %s", pid, line), tr.Stop())
	case <-timer.C:
		return nil, errors.Join(fmt.Errorf("strace did not attach to pid %d within %s", pid, attachWithin), tr.Stop())
	}
}

// read tells the first line that strace says and reads on, so that it never blocks.
func (tr *Trace) read(said io.Reader, attached chan<- string) {
	defer close(tr.said)
	lines := bufio.NewScanner(said)
	if lines.Scan() {
		attached <- lines.Text()
	} else {
		attached <- "it ended without a word"
	}
	_, _ = io.Copy(io.Discard, said)
}

// Stop ends the fault and waits until strace has let go of the process.
func (tr *Trace) Stop() error { return tr.stop() }

func (tr *Trace) end() error {
	// SIGTERM makes strace detach; a Go program under it goes on as before.
	if err := tr.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop strace: %w", err)
	}
	// When the process ends at that very moment, strace may wait for ever for a
	// thread that is gone already.
	hangs := time.AfterFunc(detachWithin, func() { _ = tr.cmd.Process.Kill() })
	defer hangs.Stop()
	<-tr.said
	_ = tr.cmd.Wait() // it ends by the signal, or before it with its process
	return nil
}

// SlowSync makes each fsync and fdatasync of the process take longer by delay,
// until stop is called or the test ends.
func SlowSync(t testing.TB, pid int, delay time.Duration) (stop func()) {
	t.Helper()
	return inject(t, pid, fmt.Sprintf("%s:delay_enter=%d", syncCalls, delay.Microseconds()))
}

// FailSync makes each fsync and fdatasync of the process fail with EIO, until
// stop is called or the test ends.
func FailSync(t testing.TB, pid int) (stop func()) {
	t.Helper()
	return inject(t, pid, syncCalls+":error=EIO")
}

func inject(t testing.TB, pid int, what string) (stop func()) {
	t.Helper()
	NeedRoot(t, "strace")
	tr, err := Inject(pid, what)
	if err != nil {
		t.Fatal(err)
	}
	stop = func() {
		if err := tr.Stop(); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// Tmpfs returns the directory of a new file system of the given size in memory,
// which is unmounted when the test ends: a disk that can be full. What runs on it
// must have ended by then.
func Tmpfs(t testing.TB, sizeBytes int64) string {
	t.Helper()
	NeedRoot(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NODEV|syscall.MS_NOSUID, fmt.Sprintf("size=%d,mode=0700", sizeBytes)); err != nil {
		Missing(t, "the right to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// Pause stops the process with SIGSTOP and returns once all its threads stand. It
// goes on when the test ends, at the latest.
func Pause(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatalf("pause pid %d: %v", pid, err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	err := Until(t.Context(), fmt.Sprintf("pid %d to stand", pid), func(context.Context) error {
		return stands(pid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Resume lets a paused process go on.
func Resume(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatalf("resume pid %d: %v", pid, err)
	}
}

// stands returns nil when the process is stopped.
func stands(pid int) error {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	// The name, in brackets, may hold anything; the state follows it.
	_, rest, _ := strings.Cut(string(raw[strings.LastIndexByte(string(raw), ')'):]), " ")
	if !strings.HasPrefix(rest, "T") && !strings.HasPrefix(rest, "t") {
		return fmt.Errorf("its state is %.1s", rest)
	}
	return nil
}
