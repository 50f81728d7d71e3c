//go:build wasip1

// Relay is a guest for tests: it makes whatever capability call it is asked for
// and answers with what the host said, byte for byte. The build tags kv, http,
// messaging and provider say which capabilities it imports, for a guest that
// imports what it was not granted does not start.
//
// It does not use the SDK: what is tested with it is the host.
package main

import (
	"encoding/binary"
	"strconv"
	"strings"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

type hostCall func(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

// calls are the imported functions by "capability/operation".
var calls = map[string]hostCall{}

//go:wasmimport wasmatrix:result/v1 read
func resultRead(out unsafe.Pointer, outCap uint32) uint32

// Fields of wasmatrix.v1.InvokeRequest and InvokeResponse.
const (
	requestPayload  = 2
	responsePayload = 1
)

// unknownCall is the status of a call that this guest does not import.
const unknownCall = 1<<32 - 1

var (
	input, output []byte
	answer        [64 << 10]byte
)

//go:wasmexport wasmatrix_alloc
func alloc(size uint32) unsafe.Pointer {
	if uint32(cap(input)) < size || cap(input) == 0 {
		input = make([]byte, max(size, 4096))
	}
	return unsafe.Pointer(unsafe.SliceData(input))
}

// onInvoke takes "capability/operation" or "capability/operation times", a line
// feed, and the request message. It makes the call that often, until one fails, and
// answers with the status of the last (4 bytes, little endian), how many succeeded
// (4 bytes), and what the host said last.
//
//go:wasmexport wasmatrix_on_invoke
func onInvoke(_ unsafe.Pointer, size uint32) uint64 {
	head, message, _ := strings.Cut(string(field(input[:size], requestPayload)), "\n")
	name, count, _ := strings.Cut(head, " ")
	times, err := strconv.Atoi(count)
	if err != nil {
		times = 1
	}
	status, said, done := uint32(unknownCall), []byte(nil), uint32(0)
	if f := calls[name]; f != nil {
		for range times {
			if status, said = call(f, []byte(message)); status != 0 {
				break
			}
			done++
		}
	}
	out := binary.LittleEndian.AppendUint32(nil, status)
	out = binary.LittleEndian.AppendUint32(out, done)
	return give(protowire.AppendBytes(protowire.AppendTag(nil, responsePayload, protowire.BytesType), append(out, said...)))
}

func call(f hostCall, request []byte) (status uint32, said []byte) {
	r := f(unsafe.Pointer(unsafe.SliceData(request)), uint32(len(request)), unsafe.Pointer(&answer[0]), uint32(len(answer)))
	status, size := uint32(r>>32), uint32(r)
	if size <= uint32(len(answer)) {
		return status, answer[:size]
	}
	said = make([]byte, size)
	return status, said[:min(resultRead(unsafe.Pointer(unsafe.SliceData(said)), size), size)]
}

func give(b []byte) uint64 {
	output = b
	if len(b) == 0 {
		return 0
	}
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))<<32 | uint64(len(b))
}

// field returns the last field of a number that holds bytes.
func field(message []byte, wanted protowire.Number) (found []byte) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return found
		}
		message = message[n:]
		size := protowire.ConsumeFieldValue(number, kind, message)
		if size < 0 {
			return found
		}
		if number == wanted && kind == protowire.BytesType {
			found, _ = protowire.ConsumeBytes(message)
		}
		message = message[size:]
	}
	return found
}

func main() {}
