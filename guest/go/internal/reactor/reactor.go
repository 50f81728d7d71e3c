package reactor

import "unsafe"

// minBuffer is the smallest room for an input, in bytes: most inputs fit, so
// that it is seldom made anew.
const minBuffer = 4096

// input holds what the host writes before it calls a handler; output holds the
// handler's answer until the next call. A module handles one call at a time, so
// one of each is enough, and reusing them keeps the garbage collector idle.
var input, output []byte

func room(size uint32) unsafe.Pointer {
	if uint32(cap(input)) < size || cap(input) == 0 {
		input = make([]byte, max(size, minBuffer))
	}
	return unsafe.Pointer(unsafe.SliceData(input))
}

// Serve runs a handler on the input of size bytes that the host has written,
// and returns what the handler's export returns. The input is valid until f returns.
func Serve(size uint32, f func(in []byte) []byte) uint64 {
	return answer(f(input[:size:size]))
}

func answer(b []byte) uint64 {
	output = b
	if len(b) == 0 {
		return 0
	}
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))<<32 | uint64(len(b))
}
