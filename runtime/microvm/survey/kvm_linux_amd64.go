package survey

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	kvmDevice = "/dev/kvm"

	// ioctls of KVM (Documentation/virt/kvm/api.rst).
	kvmCreateVM     = 0xae01
	kvmMmapSize     = 0xae04
	kvmCreateVCPU   = 0xae41
	kvmSetMemory    = 0x4020ae46
	kvmRun          = 0xae80
	kvmSetRegisters = 0x4090ae82
	kvmGetSegments  = 0x8138ae83
	kvmSetSegments  = 0x4138ae84

	kvmExitReasonAt = 8
	kvmExitHalt     = 5

	// loopTries is how often the loop runs; a busy node may interrupt it.
	loopTries = 5
	// loopLimit is how long 131,000 instructions may take. A processor takes a
	// tenth of a millisecond; a KVM that emulates each takes more than that in
	// microseconds, and a boot then takes minutes.
	loopLimit = 10 * time.Millisecond
)

// loop is a program of the processor's real mode: mov cx, 0xffff; dec cx; jnz -3; hlt.
var loop = []byte{0xb9, 0xff, 0xff, 0x49, 0x75, 0xfd, 0xf4}

// quickKVM refuses a KVM that is missing or no faster than emulation, within a
// fraction of a second.
func quickKVM() error {
	best := time.Duration(1<<63 - 1)
	for range loopTries {
		took, err := runLoop()
		if err != nil {
			return err
		}
		if best = min(best, took); best <= loopLimit {
			return nil
		}
		if took > 5*loopLimit {
			break // no interruption takes that long, and an agent waits for the answer
		}
	}
	return fmt.Errorf("%s emulates the processor: 131,000 instructions take %s, at most %s are usual", kvmDevice, best.Round(time.Millisecond), loopLimit)
}

// runLoop runs the loop in a machine without anything else and returns how long it took.
func runLoop() (time.Duration, error) {
	device, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("no hardware virtualisation: %w", err)
	}
	defer func() { _ = device.Close() }() // nothing was buffered
	vm, err := ioctl(device.Fd(), kvmCreateVM, 0, "making a machine")
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(int(vm)) }() // it ends the machine
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		return 0, fmt.Errorf("making a machine: %w", err)
	}
	defer func() { _ = unix.Munmap(page) }() // it fails only for what is no mapping
	copy(page, loop)
	region := struct {
		slot, flags         uint32
		guest, size, memory uint64
	}{0, 0, 0, uint64(len(page)), uint64(uintptr(unsafe.Pointer(&page[0])))}
	if _, err := ioctl(vm, kvmSetMemory, uintptr(unsafe.Pointer(&region)), "giving a machine memory"); err != nil {
		return 0, err
	}
	cpu, err := ioctl(vm, kvmCreateVCPU, 0, "making a processor")
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(int(cpu)) }() // as above
	if err := reset(cpu); err != nil {
		return 0, err
	}
	size, err := ioctl(device.Fd(), kvmMmapSize, 0, "mapping a processor")
	if err != nil {
		return 0, err
	}
	state, err := unix.Mmap(int(cpu), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mapping a processor: %w", err)
	}
	defer func() { _ = unix.Munmap(state) }() // as above
	began := time.Now()
	for {
		_, err := ioctl(cpu, kvmRun, 0, "running a processor")
		if err == nil {
			break
		}
		if time.Since(began) > loopLimit*100 {
			return time.Since(began), nil
		}
	}
	if reason := binary.NativeEndian.Uint32(state[kvmExitReasonAt:]); reason != kvmExitHalt {
		return 0, fmt.Errorf("a processor of %s stopped for reason %d", kvmDevice, reason)
	}
	return time.Since(began), nil
}

// reset lets a processor begin at address 0 in real mode.
func reset(cpu uintptr) error {
	var segments [0x138]byte
	if _, err := ioctl(cpu, kvmGetSegments, uintptr(unsafe.Pointer(&segments[0])), "setting up a processor"); err != nil {
		return err
	}
	// The first segment is that of the code: its base, and 12 bytes on its selector.
	binary.NativeEndian.PutUint64(segments[0:], 0)
	binary.NativeEndian.PutUint16(segments[12:], 0)
	if _, err := ioctl(cpu, kvmSetSegments, uintptr(unsafe.Pointer(&segments[0])), "setting up a processor"); err != nil {
		return err
	}
	var registers [18]uint64
	registers[17] = 2 // the flag that is always set
	_, err := ioctl(cpu, kvmSetRegisters, uintptr(unsafe.Pointer(&registers[0])), "setting up a processor")
	return err
}

func ioctl(fd, request, argument uintptr, what string) (uintptr, error) {
	v, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, argument)
	if errno != 0 {
		return 0, fmt.Errorf("%s with %s: %w", what, kvmDevice, errno)
	}
	return v, nil
}
