package reactor

import (
	"bytes"
	"testing"
	"unsafe"
)

func TestRoomIsReusedAndGrows(t *testing.T) {
	small := room(3)
	copy(unsafe.Slice((*byte)(small), 3), "one")
	var got []byte
	if r := Serve(3, func(in []byte) []byte { got = bytes.Clone(in); return nil }); r != 0 || string(got) != "one" {
		t.Errorf("an empty answer is %x, the input %q", r, got)
	}
	if room(minBuffer) != small {
		t.Error("room for what fits was made anew")
	}
	large := room(minBuffer + 1)
	if large == small {
		t.Error("room for more than there was is the same")
	}
	r := Serve(minBuffer+1, func(in []byte) []byte { return in[:5] })
	if uint32(r) != 5 || uint32(r>>32) != uint32(uintptr(large)) {
		t.Errorf("the answer is %x: want its place and 5 bytes", r)
	}
}
