//go:build wasip1

package drain

//go:wasmexport wasmatrix_on_drain
func onDrain() uint32 {
	run()
	return 0
}
