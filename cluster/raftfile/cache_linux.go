package raftfile

import (
	"os"

	"golang.org/x/sys/unix"
)

// dropCache makes the next reads come from the disk. It is advice: where the
// kernel does not follow it, reads are as good as without.
func dropCache(f *os.File) { _ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }
