//go:build wasip1

// Ledger is a guest for tests: it writes one key after another, each named after
// its generation and a counter, until it is ended. The versions of the keys say
// in which order the provider let them in, so that a test can see afterwards
// whether the effects of two generations ever overlapped.
//
// It is a command, and so it cannot use the SDK, whose exports make a reactor.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

//go:wasmimport wasmatrix:kv/v1 set
func kvSet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:context/v1 get
func contextGet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

// generationField is that of wasmatrix.v1.ContextGetResponse, keyField that of
// wasmatrix.v1.KvSetRequest.
const (
	generationField = 3
	keyField        = 2
)

var answer [1 << 12]byte

func call(f func(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64, request []byte) []byte {
	status := f(unsafe.Pointer(unsafe.SliceData(request)), uint32(len(request)), unsafe.Pointer(&answer[0]), uint32(len(answer)))
	return answer[:min(uint32(status), uint32(len(answer)))]
}

func generation() uint64 {
	b := call(contextGet, nil)
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		b = b[n:]
		if number == generationField {
			g, _ := protowire.ConsumeVarint(b)
			return g
		}
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			break
		}
		b = b[n:]
	}
	fmt.Fprintln(os.Stderr, "the host does not say which generation this is")
	os.Exit(1)
	return 0
}

func main() {
	pace := flag.Duration("pace", 2*time.Millisecond, "time between two effects")
	flag.Parse()
	of := generation()
	for n := 0; ; n++ {
		request := protowire.AppendTag(nil, keyField, protowire.BytesType)
		request = protowire.AppendString(request, fmt.Sprintf("effect/%06d/%08d", of, n))
		// A refusal is what the test wants to see; it shows in what is missing.
		call(kvSet, request)
		time.Sleep(*pace)
	}
}
