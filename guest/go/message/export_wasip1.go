//go:build wasip1

package message

import (
	"unsafe"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/reactor"
)

//go:wasmexport wasmatrix_on_message
func onMessage(_ unsafe.Pointer, size uint32) uint64 { return reactor.Serve(size, serve) }
