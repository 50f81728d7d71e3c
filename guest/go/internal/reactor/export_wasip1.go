//go:build wasip1

package reactor

import "unsafe"

//go:wasmexport wasmatrix_alloc
func alloc(size uint32) unsafe.Pointer { return room(size) }
