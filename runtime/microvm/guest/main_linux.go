package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
)

const (
	// port is the virtio-serial port that the channel goes over.
	port = "/dev/vport0p1"
	// portPatience is how long the port may take to appear.
	portPatience = 30 * time.Second
	// emptyReads is how many reads in a row may find no host at the other end
	// before the host counts as gone, and emptyPause the time between them.
	emptyReads = 50
	emptyPause = 5 * time.Millisecond
)

// IsInit reports whether this process is the first of a machine.
func IsInit() bool { return os.Getpid() == 1 }

// Main is the whole life of a virtual machine's only process. It never returns:
// when the host has gone or anything fails it switches the machine off, having
// written the reason to the console.
func Main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if err := run(context.Background(), log); err != nil { //nolint:forbidigo // the machine ends with it
		log.Error("the machine ends", "error", err)
	}
	switchOff()
}

// switchOff ends the machine at once: it has nothing to lose. The emulator is told
// not to start it again.
func switchOff() {
	for {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // there is nobody to tell
	}
}

func run(ctx context.Context, log *slog.Logger) error {
	if err := unix.Mount("dev", "/dev", "devtmpfs", unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("mounting /dev: %w", err)
	}
	if err := loadModules(); err != nil {
		return err
	}
	machine, err := newVM()
	if err != nil {
		return err
	}
	stream, err := openPort()
	if err != nil {
		return err
	}
	return Serve(ctx, stream, machine, "/tmp", log)
}

// loadModules loads the kernel's modules in the order of their names.
func loadModules() error {
	files, err := os.ReadDir(kernel.ModuleDir)
	if err != nil {
		return fmt.Errorf("looking for kernel modules: %w", err)
	}
	slices.SortFunc(files, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, f := range files {
		if err := loadModule(filepath.Join(kernel.ModuleDir, f.Name())); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("loading a kernel module: %w", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(int(f.Fd()), "", flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("loading the kernel module %s: %w", filepath.Base(path), err)
	}
	return os.Remove(path)
}

// openPort opens the channel as soon as the kernel has found it.
func openPort() (io.ReadWriter, error) {
	deadline := time.Now().Add(portPatience)
	for {
		fd, err := unix.Open(port, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			return &stream{file: os.NewFile(uintptr(fd), port)}, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("opening %s: %w", port, err)
		}
		time.Sleep(time.Millisecond)
	}
}

// stream reads and writes the port through Go's poller: with blocking calls, each
// wait would keep Go's only processor until its monitor takes it away.
type stream struct {
	file *os.File
	used bool
}

// Read returns io.EOF when the host has gone. Before the first byte the host may
// just not be there yet.
func (s *stream) Read(p []byte) (int, error) {
	for empty := 0; ; {
		n, err := s.file.Read(p)
		switch {
		case n > 0:
			s.used = true
			return n, nil
		case err != nil && !errors.Is(err, io.EOF):
			return 0, fmt.Errorf("reading %s: %w", port, err)
		default:
			empty++
			if s.used && empty > emptyReads {
				return 0, io.EOF
			}
			time.Sleep(emptyPause)
		}
	}
}

// Write writes all of p.
func (s *stream) Write(p []byte) (int, error) { return s.file.Write(p) }
