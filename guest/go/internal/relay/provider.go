//go:build wasip1 && provider

package main

import "unsafe"

//go:wasmimport wasmatrix:provider/v1 call
func providerCall(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

func init() { calls["provider/call"] = providerCall }
