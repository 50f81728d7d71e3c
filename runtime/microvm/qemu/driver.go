//go:build linux && amd64

package qemu

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// Package is the Debian package that brings QEMU.
const Package = "qemu-system-x86"

// Accelerator is what runs a machine's code.
type Accelerator string

// The accelerators.
const (
	// KVM is the processor's own virtualisation.
	KVM Accelerator = "kvm"
	// TCG is emulation by a program.
	TCG Accelerator = "tcg"
)

// Isolation says what keeps machines apart under this accelerator.
func (a Accelerator) Isolation() vmm.Isolation {
	if a == KVM {
		return vmm.Hardware
	}
	return vmm.Emulated
}

// Config configures a Driver. All but the identity is required.
type Config struct {
	// Binary is the path of QEMU.
	Binary string
	// Accelerator runs the machines' code.
	Accelerator Accelerator
	// Kernel and Initramfs are what machines boot from.
	Kernel, Initramfs []byte
	// HZ is the number of ticks per second that the kernel was built for.
	HZ int
	// InitArguments are what the init is started with.
	InitArguments []string
	// Identities is the first of the IdentityCount user and group ids that machines
	// run under, each with one of its own; 0 means under that of this process. It
	// takes root.
	Identities uint32
}

// Driver starts QEMU. Make one with New, close it after all its machines.
type Driver struct {
	config      Config
	version     string
	commandLine string
	kernel      *os.File
	initramfs   *os.File
	content     [sha256.Size]byte
	spawner     *spawner
	// limiter is the path of prlimit(1).
	limiter string
	// identity counts the machines, to give each an id of its own.
	identity atomic.Uint32
}

var _ vmm.Driver = (*Driver)(nil)

// Find returns the path of QEMU, the smaller binary for micro-VMs where it fits.
// Its error wraps vmm.ErrUnavailable and names the package to install.
func Find(a Accelerator) (string, error) {
	names := []string{"qemu-system-x86_64"}
	if a == KVM {
		names = []string{"qemu-system-x86_64-microvm", "qemu-system-x86_64"}
	}
	for _, n := range names {
		if path, err := exec.LookPath(n); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s is not in PATH; install the Debian package %s", vmm.ErrUnavailable, names[len(names)-1], Package)
}

// New makes a Driver: it asks QEMU for its version and keeps kernel and initramfs
// in sealed memory. It starts no machine. It takes a fifth of a second under TCG.
func New(ctx context.Context, config Config) (_ *Driver, err error) {
	out, err := exec.CommandContext(ctx, config.Binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%w: asking %s for its version: %w", vmm.ErrUnavailable, config.Binary, err)
	}
	d := &Driver{config: config, spawner: newSpawner()}
	if d.limiter, err = exec.LookPath("prlimit"); err != nil {
		return nil, fmt.Errorf("%w: prlimit is not in PATH; install the Debian package util-linux", vmm.ErrUnavailable)
	}
	d.identity.Store(rand.Uint32()) // so that agents on one node rarely meet
	d.version, _, _ = strings.Cut(string(out), "\n")
	var khz uint64
	if config.Accelerator == TCG {
		if khz, err = counterKHz(ctx); err != nil {
			return nil, fmt.Errorf("measuring the time-stamp counter: %w", err)
		}
	}
	d.commandLine = commandLine(config, khz)
	if d.kernel, err = sealed("kernel", config.Kernel); err != nil {
		return nil, err
	}
	if d.initramfs, err = sealed("initramfs", config.Initramfs); err != nil {
		return nil, errors.Join(err, d.kernel.Close())
	}
	h := sha256.New()
	h.Write(config.Kernel)
	h.Write(config.Initramfs)
	h.Sum(d.content[:0])
	d.config.Kernel, d.config.Initramfs = nil, nil
	return d, nil
}

// Version is QEMU's, in its own words.
func (d *Driver) Version() string { return d.version }

// Key implements vmm.Driver. It looks at the file of QEMU each time: an upgrade
// under a running agent makes the templates stale.
func (d *Driver) Key() string {
	file := "gone"
	if info, err := os.Stat(d.config.Binary); err == nil {
		file = fmt.Sprint(info.Size(), info.ModTime().UnixNano())
	}
	h := sha256.New()
	fmt.Fprintln(h, d.config.Binary, file, d.version, d.commandLine, d.common(0, true), d.cloneArguments(0, false))
	h.Write(d.content[:])
	return fmt.Sprintf("%x", h.Sum(nil))
}

// Close implements vmm.Driver.
func (d *Driver) Close() error {
	d.spawner.close()
	return errors.Join(d.kernel.Close(), d.initramfs.Close())
}

// Boot implements vmm.Driver.
func (d *Driver) Boot(_ context.Context, size uint64) (vmm.Machine, error) {
	memory, err := newMemory("machine", size)
	if err != nil {
		return nil, err
	}
	m, err := d.launch(size, d.bootArguments(size), d.kernel, memory, d.initramfs)
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	m.keepMemory(memory)
	if _, err := m.monitor.send("qmp_capabilities", nil); err != nil {
		m.Kill()
		return nil, fmt.Errorf("%w: %s", err, m.ending.Message)
	}
	return m, nil
}
