//go:build wasip1

package invoke

import (
	"unsafe"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/reactor"
)

//go:wasmexport wasmatrix_on_invoke
func onInvoke(_ unsafe.Pointer, size uint32) uint64 { return reactor.Serve(size, serve) }
