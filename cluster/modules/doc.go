// Package modules keeps the bytes of wasm modules on the disks of the
// control-plane peers, under their digest. The replicated state holds only what
// guestabi.Inspect reads from a module; the bytes never enter the Raft log.
//
// A Store is one peer's disk. A Replicator brings an upload to a majority of the
// voters before it is registered, and pulls what this peer lacks from the
// others. Service is what peers ask of each other.
//
// The package never imports agent, runtime or provider: it executes nothing and
// reads no function body. The executor validates code on its own.
package modules
