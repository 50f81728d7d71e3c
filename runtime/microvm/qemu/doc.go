// Package qemu drives QEMU as the monitor of virtual machines: it implements
// vmm.Driver on Linux and x86-64.
//
// A machine is one QEMU process with the machine type "microvm" and a single
// virtio-serial port. It opens no file by path, no socket and no port: QMP, the
// channel and the console are inherited socketpairs; kernel, initramfs, memory
// and device state are inherited memfds and pipes. So it needs no directory, can
// run under an id of its own, and leaves nothing behind.
//
// A template is the memory of a machine in a sealed memfd, which no clone can
// change, and its device state, some 60 KiB. A clone maps that memory privately
// and takes a page of its own only where it writes.
//
// Each process dies with the agent, whatever ends the agent: it gets SIGKILL when
// the thread that forked it ends. That thread therefore lives as long as the Driver.
//
// It imports the contract in package vmm and nothing else of wasmatrix.
package qemu
