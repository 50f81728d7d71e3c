//go:build linux && amd64

package qemu

import (
	"fmt"
	"os"
	"syscall"
)

// IdentityCount is how many ids machines are spread over.
const IdentityCount = 1 << 20

const (
	// ownAddresses is the address space that QEMU takes besides the machine's memory.
	ownAddresses = 4 << 30
	// maxFiles is more than the descriptors that QEMU uses, maxThreads than its threads.
	maxFiles, maxThreads = 128, 64
)

// credential is the identity of the next machine; nil for this process's own. No
// two machines share one, so that a guest that has taken over its QEMU finds no
// process that it may touch.
func (d *Driver) credential() *syscall.Credential {
	if d.config.Identities == 0 {
		return nil
	}
	id := d.config.Identities + d.identity.Add(1)%IdentityCount
	c := &syscall.Credential{Uid: id, Gid: id}
	if d.config.Accelerator == KVM {
		if info, err := os.Stat("/dev/kvm"); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				c.Groups = []uint32{st.Gid}
			}
		}
	}
	return c
}

// limited returns the command that runs QEMU with bounds on what it may take.
// prlimit(1) sets them and becomes QEMU: setting them from here after the start
// takes a capability where QEMU has an identity of its own, and would be late.
func (d *Driver) limited(size uint64, arguments []string) []string {
	command := []string{
		d.limiter,
		"--core=0",  // memory of guests does not belong on disk
		"--fsize=0", // nor does anything else
		fmt.Sprintf("--nofile=%d", maxFiles),
		fmt.Sprintf("--as=%d", size+ownAddresses),
	}
	if d.config.Identities != 0 { // else the agent's own would count
		command = append(command, fmt.Sprintf("--nproc=%d", maxThreads))
	}
	return append(append(command, "--", d.config.Binary), arguments...)
}
