//go:build reactor

package main

import "unsafe"

var buffer []byte

//go:wasmexport wasmatrix_alloc
func alloc(size int32) int32 {
	if int(size) > len(buffer) {
		buffer = make([]byte, size)
	}
	return int32(uintptr(unsafe.Pointer(&buffer[0])))
}

//go:wasmexport wasmatrix_on_invoke
func onInvoke(_, size int32) int64 {
	answer := []byte(work(uint32(size)) + string(buffer[:size]))
	buffer = answer
	return int64(uintptr(unsafe.Pointer(&answer[0])))<<32 | int64(len(answer))
}
