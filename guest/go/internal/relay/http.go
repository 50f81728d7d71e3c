//go:build wasip1 && http

package main

import "unsafe"

//go:wasmimport wasmatrix:http/v1 request
func httpRequest(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

func init() { calls["http/request"] = httpRequest }
