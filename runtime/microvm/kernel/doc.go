// Package kernel finds a Linux kernel with its modules on this machine and packs
// an initramfs for it: what a virtual machine boots from. It needs no tool for
// that, neither depmod nor cpio.
//
// It imports nothing of wasmatrix.
package kernel
