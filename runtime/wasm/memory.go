package wasm

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/tetratelabs/wazero/experimental"
)

// account keeps the size of an instance's linear memories, or of a spare slot's.
type account struct {
	bytes atomic.Int64
	gauge prometheus.Gauge
}

func (a *account) add(delta int64) {
	a.bytes.Add(delta)
	a.gauge.Add(float64(delta))
}

// linearMemory is the memory of one slot. wazero calls it on the goroutine that
// runs the guest, and frees it when the module is closed.
type linearMemory struct {
	account *account
	// limit bounds its size in bytes.
	limit uint64
	// refused is set when the guest asked for more than limit.
	refused bool

	region []byte
	size   uint64
}

var (
	_ experimental.MemoryAllocator = (*linearMemory)(nil)
	_ experimental.LinearMemory    = (*linearMemory)(nil)
)

// Allocate reserves address space for the most that the memory can become, so
// that growing never moves or copies it.
func (m *linearMemory) Allocate(_, most uint64) experimental.LinearMemory {
	m.region = reserve(min(most, m.limit))
	return m
}

// Reallocate grows the memory, or returns nil when it may not.
func (m *linearMemory) Reallocate(size uint64) []byte {
	if size > m.limit {
		m.refused = true
		return nil
	}
	if size > uint64(len(m.region)) || !commit(m.region, m.size, size) {
		m.refused = true
		return nil
	}
	m.account.add(int64(size) - int64(m.size))
	m.size = size
	if size == 0 {
		return []byte{}
	}
	return m.region[:size:size]
}

// move charges the memory to another account from now on.
func (m *linearMemory) move(to *account) {
	if m.account != to {
		m.account.add(-int64(m.size))
		m.account = to
		m.account.add(int64(m.size))
	}
}

// Free gives the memory back. Nothing may use it afterwards.
func (m *linearMemory) Free() {
	m.account.add(-int64(m.size))
	release(m.region)
	m.region, m.size = nil, 0
}
