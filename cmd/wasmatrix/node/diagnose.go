package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/survey"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// qemuPackage is the Debian package that brings QEMU.
const qemuPackage = "qemu-system-x86"

// Diagnosis is what this machine can do as a node that runs guests in virtual machines.
type Diagnosis struct {
	// Works is true when the runtime microvm works as configured.
	Works bool `json:"works"`
	// Accel is the value of microvm.accel that was asked for.
	Accel string `json:"accel"`
	// Isolation is what would keep the machines apart; empty unless it works.
	Isolation string `json:"isolation,omitempty"`
	// Findings are in the order in which they were made.
	Findings []Finding `json:"findings"`
	// Next are the steps to take, the first of them first; none where it works.
	Next []string `json:"next,omitempty"`

	reasons []error // why it does not work
}

// Finding is the answer to one question about this machine.
type Finding struct {
	// Name says what was looked at: "kernel", "init", "qemu", "kvm", "tcg".
	Name string `json:"name"`
	// OK is whether it is as it should be.
	OK bool `json:"ok"`
	// Detail says what was found, or why not.
	Detail string `json:"detail"`
}

// Diagnose finds out whether this machine can run guests in virtual machines as c
// wants, by running one. Where KVM is wanted and does not work, it finds out
// whether emulation would. tell is called with each finding as it is made.
func Diagnose(ctx context.Context, c MicroVMConfig, tell func(Finding)) Diagnosis {
	d := Diagnosis{Accel: c.Accel}
	note := func(f Finding) {
		if !slices.Contains(d.Findings, f) {
			d.Findings = append(d.Findings, f)
			tell(f)
		}
	}
	emulated := false
	switch c.Accel {
	case accelOff:
		note(Finding{Name: survey.KVM, Detail: "not looked for: microvm.accel is off"})
	case survey.TCG:
		d.Works = d.try(ctx, c, note)
		emulated = d.Works
	default:
		if d.Works = d.try(ctx, c, note); !d.Works {
			c.Accel = survey.TCG
			emulated = d.try(ctx, c, note)
		}
	}
	switch {
	case d.Works && emulated:
		d.Isolation = string(vmm.Emulated)
	case d.Works:
		d.Isolation = string(vmm.Hardware)
	default:
		d.Next = d.steps(emulated)
	}
	return d
}

// try finds out whether machines run with the accelerator that c names.
func (d *Diagnosis) try(ctx context.Context, c MicroVMConfig, note func(Finding)) bool {
	var s survey.Survey
	driver, err := s.Open(ctx, c.SurveyOptions())
	for _, f := range s.Findings {
		note(Finding{Name: f.Name, OK: f.OK, Detail: trimmed(f.Detail)})
	}
	if err != nil {
		d.reasons = append(d.reasons, err)
		return false
	}
	if err := runGuest(ctx, driver, s.Isolation, note); err != nil {
		note(Finding{Name: "guest", Detail: trimmed(err.Error())})
		d.reasons = append(d.reasons, err)
		return false
	}
	if s.Isolation == vmm.Emulated {
		note(Finding{Name: survey.TCG, OK: true, Detail: "emulation works"})
	}
	return true
}

// runGuest boots a machine, makes a template of it, and runs a guest in a clone.
func runGuest(ctx context.Context, driver vmm.Driver, isolation vmm.Isolation, note func(Finding)) (err error) {
	r, err := microvm.New(ctx, microvm.Config{Driver: driver, Isolation: isolation, Logger: slog.New(slog.DiscardHandler), Spares: -1})
	if err != nil {
		return errors.Join(err, driver.Close())
	}
	defer func() { err = errors.Join(err, r.Close(context.WithoutCancel(ctx))) }()
	began := time.Now()
	if err := r.Warm(ctx); err != nil {
		return err
	}
	note(Finding{Name: "snapshot", OK: true, Detail: "a machine was booted and a template made of it in " + time.Since(began).Round(time.Millisecond).String()})
	began = time.Now()
	if err := r.Try(ctx); err != nil {
		return err
	}
	note(Finding{Name: "guest", OK: true, Detail: "a module was compiled, and run in a clone, in " + time.Since(began).Round(time.Millisecond).String()})
	return nil
}

// trimmed is an error's text without the words that all of them begin with.
func trimmed(text string) string { return strings.TrimPrefix(text, vmm.ErrUnavailable.Error()+": ") }

// steps says what to do, given that it does not work and whether emulation would.
func (d *Diagnosis) steps(emulated bool) (out []string) {
	var packages []string
	for _, f := range d.Findings {
		switch {
		case f.OK:
		case f.Name == "qemu":
			packages = append(packages, qemuPackage)
		case f.Name == "kernel":
			packages = append(packages, kernel.Package)
		}
	}
	if len(packages) > 0 {
		slices.Sort(packages)
		out = append(out, "install, as root on Debian: apt-get install --no-install-recommends "+strings.Join(slices.Compact(packages), " "))
	}
	reason := errors.Join(d.reasons...)
	switch {
	case d.Accel == accelOff:
		out = append(out, "set microvm.accel to auto, kvm or tcg")
	case errors.Is(reason, fs.ErrPermission):
		out = append(out, "let this user open /dev/kvm: adduser USER kvm, and log in again")
	case emulated:
		out = append(out, "for hardware isolation: a machine with virtualisation on in its firmware, or nested virtualisation in what hosts it")
	}
	if emulated {
		out = append(out, "or emulation, which is slower and isolates by a program: microvm.accel: tcg, WASMATRIX_MICROVM_ACCEL=tcg, or --microvm-accel tcg")
	}
	return out
}
