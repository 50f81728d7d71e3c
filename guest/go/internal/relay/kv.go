//go:build wasip1 && kv

package main

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

func init() {
	calls["kv/get"], calls["kv/set"], calls["kv/delete"] = kvGet, kvSet, kvDelete
	calls["kv/list"], calls["kv/cas"] = kvList, kvCas
}
