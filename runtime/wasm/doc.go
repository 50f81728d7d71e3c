// Package wasm executes guest modules with wazero: it implements
// runtime.Runtime for reactor and command modules of guest interface version 1.
//
// On its way to execution a module is decoded and checked against limits,
// rewritten so that it can always be stopped (both in package module), checked
// against the guest interface, compiled by a child process with bounds on time
// and memory that leaves its result in a cache on disk, and loaded from there.
// wazero itself ignores a context while it compiles, checks one only at loops
// while it runs, and takes as much memory as a hostile module makes it take.
//
// Each loaded module has a wazero runtime of its own, about half a millisecond
// of work: modules share no lock and no store, and freeing one frees all of it.
// Linear memories are mapped outside of Go's heap, bounded per instance, and
// given back at once.
//
// On machines for which wazero has no compiler it interprets; everything but
// speed and the use of the disk cache stays the same.
//
// It imports the contract in package runtime, proto and apierror for the errors
// that guests see, and never cluster, fsm, agent or provider.
package wasm
