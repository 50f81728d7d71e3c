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

// limitMemory bounds the address space of this process, unless it has reserved
// more from the start, as programs do that look for data races.
func limitMemory(memory uint64) error {
	if virtual, _ := statm(); virtual > addressSlack {
		return nil
	}
	limit := unix.Rlimit{Cur: memory + addressSlack, Max: memory + addressSlack}
	if err := unix.Setrlimit(unix.RLIMIT_AS, &limit); err != nil {
		return fmt.Errorf("limiting the address space: %w", err)
	}
	return nil
}

// resident returns the memory this process holds in bytes; 0 when it cannot tell.
func resident() uint64 {
	_, resident := statm()
	return resident
}

// statm returns the address space and the memory of this process in bytes; zeros
// when it cannot tell.
func statm() (virtual, resident uint64) {
	content, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, 0
	}
	fields := bytes.Fields(content)
	if len(fields) < 2 {
		return 0, 0
	}
	// What is no number counts as zero.
	virtual, _ = strconv.ParseUint(string(fields[0]), 10, 64)
	resident, _ = strconv.ParseUint(string(fields[1]), 10, 64)
	page := uint64(os.Getpagesize())
	return virtual * page, resident * page
}
