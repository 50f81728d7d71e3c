package wasm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// addressSlack is the address space that a Go program reserves without using it,
// with room to spare; the limit on address space only backs the watch on memory.
const addressSlack = 4 << 30

// limitMemory bounds the address space of this process.
func limitMemory(memory uint64) error {
	limit := unix.Rlimit{Cur: memory + addressSlack, Max: memory + addressSlack}
	if err := unix.Setrlimit(unix.RLIMIT_AS, &limit); err != nil {
		return fmt.Errorf("limiting the address space: %w", err)
	}
	return nil
}

// resident returns the memory this process holds in bytes; 0 when it cannot tell.
func resident() uint64 {
	content, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := bytes.Fields(content)
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(string(fields[1]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}
