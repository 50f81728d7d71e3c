//go:build linux && amd64

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// consoleBytes is how much of the end of the console is kept, and of stderr.
const consoleBytes = 8 << 10

// machine is one QEMU process.
type machine struct {
	cmd     *exec.Cmd
	monitor *monitor
	channel *net.UnixConn
	// size is the size of the memory in bytes.
	size    uint64
	console tail
	stderr  tail
	// files are ends of this process that are closed with the machine.
	files []io.Closer

	ended  chan struct{}
	ending vmm.Ending

	mu sync.Mutex
	// memory is the machine's memory where it may become a template's; nil in a clone.
	memory *os.File
}

var _ vmm.Machine = (*machine)(nil)

// pair returns two ends of a socket: one for this process, one to be inherited.
func pair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has a copy
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("making a socketpair: %w", err), theirs.Close())
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.Join(errors.New("a socketpair is no Unix socket"), conn.Close(), theirs.Close())
	}
	return unixConn, theirs, nil
}

// launch starts QEMU with arguments for a machine of this size; files become its
// descriptors from 6 on. They stay the caller's.
func (d *Driver) launch(size uint64, arguments []string, files ...*os.File) (_ *machine, err error) {
	m := &machine{size: size, ended: make(chan struct{})}
	var inherited []*os.File
	defer func() {
		for _, f := range inherited {
			_ = f.Close() // QEMU has its own copies
		}
		if err != nil {
			for _, f := range m.files {
				_ = f.Close() // the first error tells more
			}
		}
	}()
	var conns [3]*net.UnixConn
	for n := range conns {
		ours, theirs, err := pair()
		if err != nil {
			return nil, err
		}
		conns[n] = ours
		m.files = append(m.files, ours)
		inherited = append(inherited, theirs)
	}
	complaints, theirErrors, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	m.files = append(m.files, complaints)
	command := d.limited(size, arguments)
	m.cmd = exec.Command(command[0], command[1:]...)
	m.cmd.Dir, m.cmd.Env = "/", []string{}
	m.cmd.Stderr = theirErrors
	m.cmd.ExtraFiles = append(append([]*os.File{}, inherited...), files...)
	inherited = append(inherited, theirErrors)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: d.credential()}
	m.monitor, m.channel = newMonitor(conns[0]), conns[1]
	if err := d.spawner.start(m.cmd); err != nil {
		return nil, fmt.Errorf("starting %s: %w", d.config.Binary, err)
	}
	var reading sync.WaitGroup
	reading.Go(m.monitor.run)
	reading.Go(func() { _, _ = io.Copy(&m.console, conns[2]) })  // it ends with QEMU
	reading.Go(func() { _, _ = io.Copy(&m.stderr, complaints) }) // it ends with QEMU
	go m.reap(&reading)
	return m, nil
}

// reap waits for QEMU's end and says how it was.
func (m *machine) reap(reading *sync.WaitGroup) {
	err := m.cmd.Wait()
	reading.Wait() // all of these ends are closed now, and all was read
	for _, f := range m.files {
		_ = f.Close() // nothing was buffered
	}
	if memory := m.takeMemory(); memory != nil {
		_ = memory.Close() // nothing was buffered
	}
	m.ending = m.explain(err)
	close(m.ended)
}

// explain makes words of the way QEMU ended.
func (m *machine) explain(err error) vmm.Ending {
	console := m.console.String()
	reason := m.monitor.shutdownReason()
	state := m.cmd.ProcessState.Sys()
	status, _ := state.(syscall.WaitStatus)
	switch {
	case outOfMemory(console):
		return vmm.Ending{OutOfMemory: true, Message: "the virtual machine ran out of memory"}
	case strings.Contains(console, "Kernel panic"):
		return vmm.Ending{Message: "the kernel of the virtual machine panicked: " + after(console, "Kernel panic - not syncing: ")}
	case reason != "":
		return vmm.Ending{Message: "the virtual machine ended by itself (" + reason + ")" + said(console)}
	case status.Signaled():
		return vmm.Ending{Message: fmt.Sprintf("QEMU was killed by signal %d (%s)", int(status.Signal()), status.Signal())}
	case err != nil:
		return vmm.Ending{Message: fmt.Sprintf("QEMU failed: %v%s", err, said(m.stderr.String()))}
	}
	return vmm.Ending{Message: "QEMU ended" + said(m.stderr.String())}
}

// outOfMemory reports whether the kernel, or Go in the init, says that there is no
// memory left. The init is the only process, so the kernel cannot kill another.
func outOfMemory(console string) bool {
	for _, words := range []string{"System is deadlocked on memory", "Out of memory", "runtime: out of memory", "cannot allocate memory"} {
		if strings.Contains(console, words) {
			return true
		}
	}
	return false
}

// said returns the last line of a text as an explanation.
func said(text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return ""
	}
	return ": " + clean(text[strings.LastIndexByte(text, '\n')+1:])
}

// after returns the rest of the line behind a marker.
func after(text, marker string) string {
	_, rest, _ := strings.Cut(text, marker)
	line, _, _ := strings.Cut(rest, "\n")
	return clean(line)
}

// clean keeps what is fit to print of a line that a machine wrote.
func clean(line string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, line[:min(len(line), 300)])
}

// Channel implements vmm.Machine.
func (m *machine) Channel() io.ReadWriter { return m.channel }

// Process implements vmm.Machine.
func (m *machine) Process() int { return m.cmd.Process.Pid }

// Resume implements vmm.Machine.
func (m *machine) Resume(ctx context.Context) error { return m.monitor.do(ctx, "cont", nil) }

// Pause implements vmm.Machine.
func (m *machine) Pause(ctx context.Context) error { return m.monitor.do(ctx, "stop", nil) }

// Kill implements vmm.Machine.
func (m *machine) Kill() {
	_ = m.cmd.Process.Kill() // it fails only when the process has ended
	<-m.ended
}

// Ended implements vmm.Machine.
func (m *machine) Ended() <-chan struct{} { return m.ended }

// Ending implements vmm.Machine.
func (m *machine) Ending() vmm.Ending { return m.ending }

// takeMemory hands over the memory that a template may be made of.
func (m *machine) takeMemory() *os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.memory
	m.memory = nil
	return f
}

// tail keeps the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write keeps the end of what was written.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if over := t.buf.Len() - consoleBytes; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

// String returns what was kept.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// keepMemory notes the memory that a template may be made of.
func (m *machine) keepMemory(memory *os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.memory = memory
}
