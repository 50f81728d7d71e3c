//go:build linux && amd64

package qemu

import (
	"fmt"
	"strconv"
	"strings"
)

// The descriptors that QEMU inherits.
const (
	fdMonitor = 3
	fdChannel = 4
	fdConsole = 5
	// Of a machine that boots.
	fdKernel    = 6
	fdMemory    = 7
	fdInitramfs = 8
	// Of a clone, besides fdMemory.
	fdState = 6
)

func inherited(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// machineType is the smallest PC there is: no PCI, no legacy devices but a serial
// line. Without rtc the kernel waits two seconds for one, and without acpi
// Debian's kernels do not find virtio-mmio.
const machineType = "microvm,x-option-roms=off,rtc=on,acpi=on,pcie=off,isa-serial=on,memory-backend=mem"

// common are the arguments that a machine and its clones share: the device state
// of one is loaded into the other.
func (d *Driver) common(size uint64, shared bool) []string {
	share := "off"
	if shared {
		share = "on"
	}
	megabytes := strconv.FormatUint(size>>20, 10)
	return []string{
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-accel", d.config.accelerator(), "-cpu", d.config.processor(), "-m", megabytes, "-smp", "1",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdMonitor), "-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=ch,fd=%d", fdChannel),
		"-chardev", fmt.Sprintf("socket,id=con,fd=%d", fdConsole), "-serial", "chardev:con",
		"-object", fmt.Sprintf("memory-backend-file,id=mem,size=%sM,mem-path=%s,share=%s", megabytes, inherited(fdMemory), share),
		"-M", machineType, "-bios", "qboot.rom",
		"-device", "virtio-serial-device,max_ports=2", "-device", "virtserialport,chardev=ch,name=agent,nr=1",
		"-global", "migration.store-global-state=off",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
}

func (d *Driver) bootArguments(size uint64) []string {
	return append(d.common(size, true),
		"-kernel", inherited(fdKernel), "-initrd", inherited(fdInitramfs), "-append", d.commandLine)
}

func (d *Driver) cloneArguments(size uint64, shared bool) []string {
	return append(d.common(size, shared), "-S", "-incoming", "defer")
}

// accelerator is what runs the machine's code.
func (c Config) accelerator() string {
	if c.Accelerator == KVM {
		return "kvm"
	}
	return "tcg,tb-size=64"
}

// processor is the model that the machine sees. Under TCG it is an old one that has
// what wazero's compiler needs (SSE4.1): the kernel patches itself for each feature
// at the boot, and each clone translates more code to use it. RDRAND seeds the
// kernel's random numbers. QEMU 7.2 crashes now and then in the kernel's use of
// cmpxchg16b. With ARAT the kernel trusts the timer of an idle processor and can stop its
// tick: an idle machine takes a sixth of the time that it would take otherwise.
func (c Config) processor() string {
	if c.Accelerator == KVM {
		return "host"
	}
	return "Nehalem-v1,-cx16,+rdrand,+arat"
}

// commandLine is the kernel's. The machine has one program and no network, so the
// kernel guards nothing inside of it, keeps no accounts, and need not wipe memory
// between uses. Go has the machine's one processor and takes it from no goroutine by a
// signal: guests yield it at their checkpoints. All of that would be code that each
// clone has to run for the first time. Under TCG the kernel is told the frequency of the
// time-stamp counter, in kHz, since it cannot measure it on a busy node, and timers end
// with its tick, every 4 ms: setting one for each pause would double the time of a call.
func commandLine(c Config, khz uint64) string {
	words := []string{
		"console=ttyS0", "reboot=t", "panic=-1", "quiet", "cryptomgr.notests", "audit=0", "no_timer_check",
		"mitigations=off", "random.trust_cpu=on", "init_on_alloc=0", "ipv6.disable=1", "nokaslr",
		"lsm=capability", "hardened_usercopy=off", "psi=0", "cgroup_disable=memory",
		"GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1", "GOTRACEBACK=none",
	}
	if c.Accelerator == TCG {
		words = append(words, "highres=off", "tsc=reliable", fmt.Sprintf("tsc_early_khz=%d", khz), fmt.Sprintf("lpj=%d", khz*1000/uint64(max(c.HZ, 1))))
	}
	if len(c.InitArguments) > 0 {
		words = append(append(words, "--"), c.InitArguments...)
	}
	return strings.Join(words, " ")
}
