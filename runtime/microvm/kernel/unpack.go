package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pierrec/lz4/v4"
)

const (
	// Fields of the header of a bzImage (the Linux/x86 boot protocol).
	setupSectors  = 0x1f1
	payloadOffset = 0x248
	payloadLength = 0x24c
	sectorBytes   = 512

	// lz4Magic begins what `lz4 -l` makes, which is how kernels are packed with it;
	// each block has its length before it, and the size of all stands at the end.
	lz4Magic = 0x184c2102
	// maxUnpacked bounds an unpacked kernel.
	maxUnpacked = 256 << 20

	// pvhNote is the type of the ELF note that names a kernel's entry point for
	// machines without firmware tables (XEN_ELFNOTE_PHYS32_ENTRY).
	pvhNote = 18
)

var errPacked = errors.New("the packed kernel is damaged")

// Unpack returns the kernel inside a bzImage as what can be booted directly, so
// that no machine has to unpack it: that takes an emulated processor a third of a
// second. An image that is packed in another way than with LZ4, or that cannot be
// booted directly, comes back as it is.
func Unpack(image []byte) []byte {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return image
	}
	at := (uint64(image[setupSectors])+1)*sectorBytes + uint64(binary.LittleEndian.Uint32(image[payloadOffset:]))
	size := uint64(binary.LittleEndian.Uint32(image[payloadLength:]))
	if size < 8 || at+size > uint64(len(image)) {
		return image
	}
	unpacked, err := unpackLZ4(image[at : at+size])
	if err != nil || !direct(unpacked) {
		return image
	}
	return unpacked
}

// unpackLZ4 unpacks blocks of LZ4.
func unpackLZ4(packed []byte) ([]byte, error) {
	if binary.LittleEndian.Uint32(packed) != lz4Magic {
		return nil, errPacked
	}
	size := int(binary.LittleEndian.Uint32(packed[len(packed)-4:]))
	if size > maxUnpacked {
		return nil, errPacked
	}
	out := make([]byte, size)
	done := 0
	for blocks := packed[4 : len(packed)-4]; len(blocks) >= 4; {
		n := uint64(binary.LittleEndian.Uint32(blocks))
		if n > uint64(len(blocks)-4) {
			return nil, errPacked
		}
		unpacked, err := lz4.UncompressBlock(blocks[4:4+n], out[done:])
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errPacked, err)
		}
		done += unpacked
		blocks = blocks[4+n:]
	}
	if done != size {
		return nil, errPacked
	}
	return out, nil
}

// direct reports whether a kernel says where machines without firmware enter it.
func direct(kernel []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil || f.Machine != elf.EM_X86_64 {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err != nil {
			return false
		}
		for len(notes) >= 12 {
			name := (uint64(binary.LittleEndian.Uint32(notes)) + 3) &^ 3
			value := (uint64(binary.LittleEndian.Uint32(notes[4:])) + 3) &^ 3
			if binary.LittleEndian.Uint32(notes[8:]) == pvhNote && bytes.HasPrefix(notes[12:], []byte("Xen\x00")) {
				return true
			}
			if name+value > uint64(len(notes)-12) {
				break
			}
			notes = notes[12+name+value:]
		}
	}
	return false
}
