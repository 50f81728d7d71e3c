//go:build !linux

package wasm

import goruntime "runtime"

// limitMemory does nothing where address space cannot be bounded; the watch on
// memory remains.
func limitMemory(uint64) error { return nil }

// resident returns what Go has taken from the system, without what it gave back.
func resident() uint64 {
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	return m.Sys - m.HeapReleased
}
