package kernel_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"testing"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
)

// TestUnpackTheKernelOfThisMachine holds that what comes out is a kernel, where
// this machine has one.
func TestUnpackTheKernelOfThisMachine(t *testing.T) {
	k, err := kernel.Find(kernel.Options{})
	var image []byte
	if err == nil {
		image, err = os.ReadFile(k.Image)
	}
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatal(err)
	case err != nil:
		t.Skip(err)
	}
	unpacked := kernel.Unpack(image)
	if bytes.Equal(unpacked, image) {
		t.Skipf("%s is not packed with LZ4", k.Image)
	}
	f, err := elf.NewFile(bytes.NewReader(unpacked))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Off+p.Filesz > uint64(len(unpacked)) {
			t.Fatalf("%d bytes lack a segment that ends at %d", len(unpacked), p.Off+p.Filesz)
		}
	}
}

// packed is a bzImage around a payload.
func packed(payload []byte) []byte {
	image := make([]byte, 0x400, 0x400+len(payload))
	copy(image[0x202:], "HdrS")
	image[0x1f1] = 1
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(image, payload...)
}

// FuzzUnpack holds that no image makes Unpack panic, and that what it cannot make
// anything of comes back as it is.
func FuzzUnpack(f *testing.F) {
	block := []byte{0x15, 'a', 1, 0, 0x10, 'b'} // "a", 9 copies of it, "b"
	lz4 := append([]byte{0x02, 0x21, 0x4c, 0x18, byte(len(block)), 0, 0, 0}, block...)
	f.Add(append(lz4, 11, 0, 0, 0))
	f.Add([]byte{0x02, 0x21, 0x4c, 0x18})
	f.Add([]byte{0x1f, 0x8b, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, payload []byte) {
		image := packed(payload)
		if got := kernel.Unpack(image); !bytes.Equal(got, image) {
			if _, err := elf.NewFile(bytes.NewReader(got)); err != nil {
				t.Fatalf("no kernel: %v", err)
			}
		}
	})
}
