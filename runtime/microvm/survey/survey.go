// Package survey finds out whether and how this node can run virtual machines:
// QEMU, a kernel with its modules, the init, and an accelerator that works. What
// is missing it names, with the package that brings it.
//
// It imports the driver and what it needs, and nothing else of wasmatrix.
package survey

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// Values of Options.Accelerator.
const (
	// Auto means KVM when a short boot proves it, and no virtual machines else.
	Auto = "auto"
	// KVM is the processor's own virtualisation.
	KVM = "kvm"
	// TCG is emulation, which has to be asked for.
	TCG = "tcg"
)

// Options say what to use. Zero values mean to look for it.
type Options struct {
	// Accelerator is Auto, KVM or TCG; empty means Auto.
	Accelerator string
	// Binary is the path of QEMU.
	Binary string
	// Kernel and Modules are the paths of a kernel image and of the directory with
	// its modules.
	Kernel, Modules string
	// Init is the path of the init; empty means Embedded, or without one this program
	// itself with SelfArguments.
	Init string
	// Embedded returns an init that this program holds; nil, or a nil result, means
	// that it holds none.
	Embedded func() ([]byte, error)
	// SelfArguments make this program the init of a machine.
	SelfArguments []string
	// Identities is the first of the user and group ids that machines run under, one
	// each; 0 means under that of this process. It takes root.
	Identities uint32
}

// Finding is the answer to one question about this node.
type Finding struct {
	// Name says what was looked at: "qemu", "kernel", "init", "kvm", "boot".
	Name string
	// OK is whether it is as it should be.
	OK bool
	// Detail says what was found, or why not and what to do.
	Detail string
}

// Survey is what was found.
type Survey struct {
	// Findings are in the order in which they were made.
	Findings []Finding
	// Isolation is what keeps machines apart, once a driver has been opened.
	Isolation vmm.Isolation
}

// Open opens a driver for this node's machines, after asking everything that it
// depends on. Its error wraps vmm.ErrUnavailable when this node cannot run them as
// the options want; the findings say why in either case.
func (s *Survey) Open(ctx context.Context, o Options) (vmm.Driver, error) {
	if o.Accelerator == "" {
		o.Accelerator = Auto
	}
	if o.Accelerator != Auto && o.Accelerator != KVM && o.Accelerator != TCG {
		return nil, s.miss("accelerator", fmt.Errorf("%q: want auto, kvm or tcg", o.Accelerator))
	}
	if err := supported(); err != nil {
		return nil, s.miss("platform", err)
	}
	image, err := s.image(o)
	if err != nil {
		s.look(o) // all that is missing is to be told at once
		return nil, err
	}
	return s.open(ctx, o, image)
}

// image is what machines boot from.
type image struct {
	kernel, initramfs []byte
	hz                int
	arguments         []string
}

func (s *Survey) image(o Options) (image, error) {
	k, err := kernel.Find(kernel.Options{Image: o.Kernel, Modules: o.Modules}, "virtio_mmio", "virtio_console")
	if err != nil {
		return image{}, s.miss("kernel", err)
	}
	content, err := os.ReadFile(k.Image)
	if err != nil {
		return image{}, s.miss("kernel", err)
	}
	s.hit("kernel", "%s (%s)", k.Release, k.Image)
	init, from, arguments, err := findInit(o)
	if err == nil {
		err = static(init)
	}
	if err != nil {
		return image{}, s.miss("init", fmt.Errorf("%s: %w", from, err))
	}
	initramfs, err := kernel.Initramfs(init, k.Modules)
	if err != nil {
		return image{}, s.miss("kernel", err)
	}
	s.hit("init", "%s, %.1f MiB", from, float64(len(init))/(1<<20))
	return image{kernel: kernel.Unpack(content), initramfs: initramfs, hz: k.HZ, arguments: arguments}, nil
}

// findInit returns the init, where it is from, and its arguments.
func findInit(o Options) (program []byte, from string, arguments []string, err error) {
	if o.Init != "" {
		program, err = os.ReadFile(o.Init)
		return program, o.Init, nil, err
	}
	if o.Embedded != nil {
		if program, err = o.Embedded(); program != nil || err != nil {
			return program, "part of this program", nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, "this program", nil, err
	}
	program, err = os.ReadFile(self)
	return program, self, o.SelfArguments, err
}

func (s *Survey) hit(name, format string, args ...any) {
	s.Findings = append(s.Findings, Finding{Name: name, OK: true, Detail: fmt.Sprintf(format, args...)})
}

// miss notes what is not as it should be and makes it the reason.
func (s *Survey) miss(name string, err error) error {
	s.Findings = append(s.Findings, Finding{Name: name, Detail: err.Error()})
	if errors.Is(err, vmm.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", vmm.ErrUnavailable, name, err)
}
