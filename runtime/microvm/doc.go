// Package microvm executes guest modules inside virtual machines: it implements
// runtime.Runtime with the same guest interface and the same limits as
// runtime/wasm, which does the work inside each machine. A guest that breaks out
// of its sandbox finds itself alone in a machine without network and disk, whose
// only way out is the same runtime.Host as everywhere else.
//
// One instance has one machine, which is never handed on. Machines are cloned from
// templates, so that a start need not boot: a base template for each size of
// machine, and one for each module, in which the module is compiled and no code of
// it has run. What is the same in all clones of a template is taken from them
// before anything else happens: the clock is set and the random numbers are seeded.
//
// Under KVM the processor keeps machines apart. Under TCG a program emulates the
// processor: that is for tests and for nodes without virtualisation, and has to be
// asked for.
//
//	instance   the host's side of one instance
//	link       the conversation with one machine (package channel)
//	templates  machines to clone, kept by least recent use
//	vmm, qemu  the contract of a driver of machines, and QEMU behind it
//	kernel     what machines boot from
//	guest      what runs inside
//
// It imports the contract, proto and apierror for the errors that guests see, and
// never cluster, fsm, agent or provider. A driver comes from outside.
package microvm
