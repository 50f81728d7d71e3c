// Package microvm tests what is different about instances in virtual machines, on
// whole clusters of the built binary with emulated machines: where they are placed
// and how that is told, machines that are killed, and that none is ever left. That
// everything else is the same is shown by the tests of test/e2e and test/capability
// themselves, with WASM_RUNTIME_BACKEND=microvm; `make microvm` runs both. Tests here
// begin with TestMicroVM, by which it picks them.
package microvm
