package wasm

import "golang.org/x/sys/unix"

// reserve maps address space without memory behind it; nil when there is none left.
func reserve(size uint64) []byte {
	if size == 0 {
		return nil
	}
	region, err := unix.Mmap(-1, 0, int(size), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil
	}
	return region
}

// commit makes the bytes from old to size usable; they read as zero.
func commit(region []byte, old, size uint64) bool {
	if size == old {
		return true
	}
	return unix.Mprotect(region[old:size], unix.PROT_READ|unix.PROT_WRITE) == nil
}

func release(region []byte) {
	if region != nil {
		// It fails only for a region that is no mapping, which cannot be here.
		_ = unix.Munmap(region)
	}
}
