//go:build linux && amd64

package qemu_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/qemu"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// patience bounds every wait for a machine.
const patience = 2 * time.Minute

const memory = 256 << 20

var initOnce = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "init")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/wasmatrix/wasmatrix/runtime/microvm/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return text, err
	}
	return os.ReadFile(out)
})

// unavailable ends a test that needs what this machine does not have.
func unavailable(t testing.TB, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
}

func open(t testing.TB) *qemu.Driver {
	t.Helper()
	init, err := initOnce()
	if err != nil {
		t.Fatalf("%v: %s", err, init)
	}
	return openInit(t, init)
}

// openInit opens a driver whose machines have this init.
func openInit(t testing.TB, init []byte) *qemu.Driver {
	t.Helper()
	path, err := qemu.Find(qemu.TCG)
	if err != nil {
		unavailable(t, err)
	}
	k, err := kernel.Find(kernel.Options{}, "virtio_mmio", "virtio_console")
	if err != nil {
		unavailable(t, err)
	}
	image, err := os.ReadFile(k.Image)
	if err != nil {
		unavailable(t, err)
	}
	initramfs, err := kernel.Initramfs(init, k.Modules)
	if err != nil {
		t.Fatal(err)
	}
	d, err := qemu.New(t.Context(), qemu.Config{Binary: path, Accelerator: qemu.TCG, Kernel: kernel.Unpack(image), Initramfs: initramfs, HZ: k.HZ})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

func bounded(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// receive takes one frame of a kind from a machine.
func receive(t testing.TB, m vmm.Machine, conn *channel.Conn, want channel.Kind) channel.Frame {
	t.Helper()
	if c, ok := m.Channel().(net.Conn); ok {
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	f, err := conn.Receive()
	if err != nil {
		m.Kill()
		t.Fatalf("%v: %s", err, m.Ending().Message)
	}
	if f.Kind != want {
		t.Fatalf("frame of kind %d, want %d: %s", f.Kind, want, f.Payload)
	}
	return f
}

// greet makes a clone answer.
func greet(t *testing.T, m vmm.Machine) {
	t.Helper()
	if err := m.Resume(bounded(t)); err != nil {
		t.Fatal(err)
	}
	conn := channel.New(m.Channel(), channel.MaxFromGuest)
	if err := conn.Send(channel.Hello, 1, channel.Greeting{Now: time.Now(), Entropy: make([]byte, 64)}.Encode()); err != nil {
		t.Fatal(err)
	}
	receive(t, m, conn, channel.Done)
}

// TestTemplatesOfTemplates boots a machine, makes a template of it, and a template
// of a fork of that; clones of both answer.
func TestTemplatesOfTemplates(t *testing.T) {
	d := open(t)
	m, err := d.Boot(bounded(t), memory)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Kill()
	receive(t, m, channel.New(m.Channel(), channel.MaxFromGuest), channel.Ready)
	base, err := d.Copy(bounded(t), m)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	select {
	case <-m.Ended():
	default:
		t.Fatal("the machine lives on beside its template")
	}
	f, err := d.Fork(bounded(t), base)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Kill()
	greet(t, f)
	second, err := d.Copy(bounded(t), f)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	before := checksum(t, second)
	for _, template := range []vmm.Template{base, second, base} {
		if template.Bytes() == 0 || template.Bytes() > memory+1<<20 {
			t.Fatalf("a template of %d bytes", template.Bytes())
		}
		c, err := d.Clone(bounded(t), template)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Kill()
		if _, err := d.Copy(bounded(t), c); err == nil {
			t.Fatal("a clone became a template: it shares the memory of another")
		}
		if c, err = d.Clone(bounded(t), template); err != nil {
			t.Fatal(err)
		}
		defer c.Kill()
		greet(t, c)
	}
	sealed(t, second)
	if checksum(t, second) != before {
		t.Fatal("a template has changed under its clones")
	}
	damaged, err := qemu.Damaged(second)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := d.Clone(bounded(t), damaged); err == nil {
		c.Kill()
		t.Fatal("a damaged template was cloned")
	}
}

// checksum reads all of a template's memory.
func checksum(t *testing.T, template vmm.Template) [sha256.Size]byte {
	t.Helper()
	f, err := qemu.MemoryOf(template)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, memory)); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// sealed tries every way to change a template's memory that its owner has; a clone
// has no more.
func sealed(t *testing.T, template vmm.Template) {
	t.Helper()
	f, err := qemu.MemoryOf(template)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, 0); err == nil {
		t.Error("it can be written")
	}
	if err := f.Truncate(0); err == nil {
		t.Error("it can be cut off")
	}
	if err := f.Truncate(2 * memory); err == nil {
		t.Error("it can be lengthened")
	}
	if m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		_ = unix.Munmap(m)
		t.Error("it can be mapped for writing")
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, 0); err == nil {
		t.Error("its seals can be changed")
	}
}

// program is a static program for x86-64 that consists of this code.
func program(code []byte) []byte {
	const at, header = 0x400000, 64 + 56
	size := uint64(header + len(code))
	h := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	for _, v := range []uint16{2, 62} { // an executable, for x86-64
		h = binary.LittleEndian.AppendUint16(h, v)
	}
	h = binary.LittleEndian.AppendUint32(h, 1)
	for _, v := range []uint64{at + header, 64, 0} { // entry, program header, no sections
		h = binary.LittleEndian.AppendUint64(h, v)
	}
	h = binary.LittleEndian.AppendUint32(h, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		h = binary.LittleEndian.AppendUint16(h, v)
	}
	for _, v := range []uint32{1, 5} { // to be loaded, readable and executable
		h = binary.LittleEndian.AppendUint32(h, v)
	}
	for _, v := range []uint64{0, at, at, size, size, 4096} {
		h = binary.LittleEndian.AppendUint64(h, v)
	}
	return append(h, code...)
}

// TestEndsOfTheirOwn boots machines whose init ends, or takes all memory, and
// holds that each ends soon, for a reason that is told.
func TestEndsOfTheirOwn(t *testing.T) {
	for name, test := range map[string]struct {
		code []byte
		want func(vmm.Ending) bool
	}{
		"panic": {
			[]byte{0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05}, // exit(0)
			func(e vmm.Ending) bool { return strings.Contains(e.Message, "panicked") && !e.OutOfMemory },
		},
		"out of memory": {
			[]byte{
				0xb8, 9, 0, 0, 0, 0x31, 0xff, 0xbe, 0, 0, 0, 0x40, 0xba, 3, 0, 0, 0, // mmap(0, 1 GiB, read and write,
				0x41, 0xba, 0x22, 0x40, 0, 0, 0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, // private, anonymous, unreserved, -1,
				0x45, 0x31, 0xc9, 0x0f, 0x05, // 0)
				0xc6, 0x00, 1, 0x48, 0x05, 0, 0x10, 0, 0, 0xeb, 0xf5, // for each page: write to it
			},
			func(e vmm.Ending) bool { return e.OutOfMemory },
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := openInit(t, program(test.code)).Boot(bounded(t), memory)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Kill()
			select {
			case <-m.Ended():
			case <-time.After(patience):
				t.Fatal("it has not ended")
			}
			if !test.want(m.Ending()) {
				t.Fatalf("ending %+v", m.Ending())
			}
			if err := syscall.Kill(m.Process(), 0); !errors.Is(err, syscall.ESRCH) {
				t.Fatalf("its process is still there: %v", err)
			}
		})
	}
}

// TestMachineTooSmall boots a machine that is too small: it ends by itself, and says so.
func TestMachineTooSmall(t *testing.T) {
	m, err := open(t).Boot(bounded(t), 32<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Kill()
	select {
	case <-m.Ended():
	case <-time.After(patience):
		t.Fatal("it has not ended")
	}
	if m.Ending().Message == "" {
		t.Fatalf("ending %+v", m.Ending())
	}
	t.Logf("%+v", m.Ending())
}
