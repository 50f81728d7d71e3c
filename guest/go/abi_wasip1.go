//go:build wasip1

package wasmatrix

import "unsafe"

//go:wasmimport wasmatrix:kv/v1 get
func kvGet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:kv/v1 set
func kvSet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:kv/v1 delete
func kvDelete(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:kv/v1 list
func kvList(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:kv/v1 cas
func kvCas(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:log/v1 write
func logWrite(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:context/v1 get
func contextGet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:result/v1 read
func resultRead(out unsafe.Pointer, outCap uint32) uint32

// input holds what the host writes before it calls a handler; output holds the
// handler's answer until the next call. A module handles one call at a time, so
// one of each is enough, and reusing them keeps the garbage collector idle.
var input, output []byte

//go:wasmexport wasmatrix_alloc
func alloc(size uint32) unsafe.Pointer {
	if uint32(cap(input)) < size || cap(input) == 0 {
		input = make([]byte, max(size, minBuffer))
	}
	return unsafe.Pointer(unsafe.SliceData(input))
}

//go:wasmexport wasmatrix_on_invoke
func onInvoke(_ unsafe.Pointer, size uint32) uint64 {
	return answer(serveInvoke(input[:size:size]))
}

//go:wasmexport wasmatrix_on_drain
func onDrain() uint32 {
	if drainHandler != nil {
		drainHandler()
	}
	return 0
}

func answer(b []byte) uint64 {
	output = b
	if len(b) == 0 {
		return 0
	}
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))<<32 | uint64(len(b))
}
