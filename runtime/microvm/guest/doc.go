// Package guest is the inside of a virtual machine: what runs there as its only
// process. Serve executes one instance with runtime/wasm at the behest of the
// host, over the frames of package channel; Main, for Linux, first makes a
// machine fit for that.
//
// The machine has no network and no disk. What a guest module calls out for goes
// over the channel to the runtime.Host of the instance, on the host.
//
// It imports the contract, runtime/wasm, the channel and correlation, and nothing
// of the host's side.
package guest
