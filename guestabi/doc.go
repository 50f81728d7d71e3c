// Package guestabi is the guest interface, version 1, as far as it is names: what
// a guest may import, what makes it a reactor or a command, and reading both from
// a module's bytes. The control plane refuses with it what no host could run, and
// the executors build their imports from the same table.
//
// It reads no function body: whether code is valid is for the executor to say. It
// imports apierror and the messages and nothing else of wasmatrix.
package guestabi
