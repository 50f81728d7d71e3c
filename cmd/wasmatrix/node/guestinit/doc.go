// Package guestinit holds the init of virtual machines inside the binary of the
// node: `make build` builds runtime/microvm/init, packs it, and embeds it here
// under the build tag guestinit. It is a third of the size of wasmatrix itself,
// which is the init where a binary was built without the tag.
//
// It imports nothing of wasmatrix.
package guestinit
