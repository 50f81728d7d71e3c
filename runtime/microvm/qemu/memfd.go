//go:build linux && amd64

package qemu

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// seals make a memfd immutable for everybody, its owner included.
const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL

// newMemory returns a memfd of a size that can be sealed.
func newMemory(name string, size uint64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("making a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(int64(size)); err != nil {
		_ = f.Close() // the first error tells more
		return nil, fmt.Errorf("making a memory file of %d bytes: %w", size, err)
	}
	return f, nil
}

// seal makes f immutable. It fails while anybody maps it for writing.
func seal(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("sealing a memory file: %w", err)
	}
	return nil
}

// sealed returns content as a sealed memfd.
func sealed(name string, content []byte) (_ *os.File, err error) {
	f, err := newMemory(name, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the first error tells more
		}
	}()
	if _, err := f.Write(content); err != nil {
		return nil, fmt.Errorf("filling a memory file: %w", err)
	}
	return f, seal(f)
}

// resident returns how many bytes of a memfd take memory.
func resident(f *os.File) uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0
	}
	return uint64(st.Blocks) * 512
}

// pageBytes is the unit in which memory is compared with zeros.
const pageBytes = 4096

// dataRuns calls data for each run of pages that are not all zero, and empty for
// each run of pages that are and yet take memory; either may be nil.
func dataRuns(file *os.File, size uint64, data, empty func(content []byte, start int64) error) error {
	memory, err := unix.Mmap(int(file.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("reading a template: %w", err)
	}
	defer func() { _ = unix.Munmap(memory) }() // it fails only for what is no mapping
	for at := int64(0); at < int64(size); {
		start, err := unix.Seek(int(file.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			return nil // nothing but a hole follows
		}
		end, err := unix.Seek(int(file.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("reading a template: %w", err)
		}
		for start < end {
			zero := isZero(memory[start : start+pageBytes])
			run := start
			for run < end && isZero(memory[run:run+pageBytes]) == zero {
				run += pageBytes
			}
			call := data
			if zero {
				call = empty
			}
			if call != nil {
				if err := call(memory[start:run], start); err != nil {
					return err
				}
			}
			start = run
		}
		at = end
	}
	return nil
}

var zeroPage [pageBytes]byte

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:]) }

// duplicate returns a copy of a memfd of this size that can be written. Pages of
// zeros take no memory in it.
func duplicate(from *os.File, size uint64) (*os.File, error) {
	to, err := newMemory("machine", size)
	if err != nil {
		return nil, err
	}
	err = dataRuns(from, size, func(content []byte, start int64) error {
		_, err := to.WriteAt(content, start)
		return err
	}, nil)
	if err != nil {
		_ = to.Close() // the first error tells more
		return nil, fmt.Errorf("copying a template: %w", err)
	}
	return to, nil
}

// shrink gives back the pages of a memfd that are all zero.
func shrink(f *os.File, size uint64) error {
	return dataRuns(f, size, nil, func(content []byte, start int64) error {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start, int64(len(content))); err != nil {
			return fmt.Errorf("shrinking a template: %w", err)
		}
		return nil
	})
}
