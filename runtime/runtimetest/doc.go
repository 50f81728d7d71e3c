// Package runtimetest is what tests of and around executors need: the suite
// that every executor passes (Run), an executor without WebAssembly whose
// instances do what a test scripts (Fake), and a small assembler for guest
// modules (Module) so that no toolchain has to be installed.
//
// Only tests import it. It imports the runtime contract and never an executor.
package runtimetest
