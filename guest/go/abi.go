package wasmatrix

import (
	"unsafe"
)

// minBuffer is the smallest buffer for inputs and answers, in bytes: most
// messages fit, so that most calls cross the boundary once.
const minBuffer = 4096

// hostCall is the signature that all capability imports share.
type hostCall func(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

// call makes one capability call. The answer is a fresh slice.
func call(f hostCall, request []byte) ([]byte, error) {
	out := make([]byte, minBuffer)
	r := f(pointer(request), uint32(len(request)), pointer(out), uint32(len(out)))
	status, size := uint32(r>>32), uint32(r)
	if size > uint32(len(out)) {
		out = make([]byte, size)
		size = min(resultRead(pointer(out), size), size)
	}
	out = out[:size]
	if status != 0 {
		return nil, decodeError(Code(status), out)
	}
	return out, nil
}

func pointer(b []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(b)) }
