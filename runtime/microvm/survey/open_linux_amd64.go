package survey

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/qemu"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

const (
	// proofTimeout bounds the boot that proves KVM; it takes a third of a second.
	proofTimeout = 10 * time.Second
	// proofBytes is the memory of the machine that proves it.
	proofBytes = 256 << 20
)

// open opens QEMU with the accelerator that the options want.
func (s *Survey) open(ctx context.Context, o Options, from image) (vmm.Driver, error) {
	if o.Accelerator == TCG {
		d, err := s.qemu(ctx, o, qemu.TCG, from)
		if err != nil {
			return nil, err
		}
		s.Isolation = vmm.Emulated
		return d, nil
	}
	d, err := s.kvm(ctx, o, from)
	if err == nil {
		s.Isolation = vmm.Hardware
		return d, nil
	}
	return nil, fmt.Errorf("%w; without hardware virtualisation, machines can be emulated (slower, and the emulator is what isolates): set microvm.accel to tcg", err)
}

// kvm opens QEMU on KVM and proves it by a boot.
func (s *Survey) kvm(ctx context.Context, o Options, from image) (vmm.Driver, error) {
	if err := quickKVM(); err != nil {
		return nil, s.miss("kvm", err)
	}
	d, err := s.qemu(ctx, o, qemu.KVM, from)
	if err != nil {
		return nil, err
	}
	took, err := prove(ctx, d)
	if err != nil {
		return nil, errors.Join(s.miss("kvm", fmt.Errorf("%s exists, but a machine does not boot with it: %w", kvmDevice, err)), d.Close())
	}
	s.hit("kvm", "a machine booted in %s", took.Round(time.Millisecond))
	return d, nil
}

// prove boots a machine and ends it.
func prove(ctx context.Context, d vmm.Driver) (time.Duration, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	m, err := d.Boot(ctx, proofBytes)
	if err != nil {
		return 0, err
	}
	defer m.Kill()
	stop := context.AfterFunc(ctx, m.Kill)
	defer stop()
	f, err := channel.New(m.Channel(), channel.MaxFromGuest).Receive()
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("it was not ready after %s", proofTimeout)
	case err != nil:
		m.Kill()
		return 0, errors.New(m.Ending().Message)
	case f.Kind != channel.Ready:
		return 0, channel.ErrMalformed
	}
	return time.Since(began), nil
}

// qemu opens QEMU.
func (s *Survey) qemu(ctx context.Context, o Options, a qemu.Accelerator, from image) (*qemu.Driver, error) {
	binary, err := findQEMU(o, a)
	if err != nil {
		return nil, s.miss("qemu", err)
	}
	d, err := qemu.New(ctx, qemu.Config{
		Binary: binary, Accelerator: a, Kernel: from.kernel, Initramfs: from.initramfs, HZ: from.hz,
		InitArguments: from.arguments, Identities: o.Identities,
	})
	if err != nil {
		return nil, s.miss("qemu", err)
	}
	s.hit("qemu", "%s (%s)", d.Version(), binary)
	return d, nil
}

// supported says whether there is a driver for this platform.
func supported() error { return nil }

// look notes whether there is QEMU without asking it anything.
func (s *Survey) look(o Options) {
	if binary, err := findQEMU(o, qemu.TCG); err != nil {
		_ = s.miss("qemu", err) // the finding is what counts
	} else {
		s.hit("qemu", "%s", binary)
	}
}

func findQEMU(o Options, a qemu.Accelerator) (string, error) {
	if o.Binary == "" {
		return qemu.Find(a)
	}
	if _, err := os.Stat(o.Binary); err != nil {
		return "", fmt.Errorf("%w: %w; install the Debian package %s", vmm.ErrUnavailable, err, qemu.Package)
	}
	return o.Binary, nil
}
