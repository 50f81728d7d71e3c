//go:build wasip1

package wasmatrix

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

//go:wasmimport wasmatrix:http/v1 request
func httpRequest(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 publish
func msgPublish(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 request
func msgRequest(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 subscribe
func msgSubscribe(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 unsubscribe
func msgUnsubscribe(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:provider/v1 call
func providerCall(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:log/v1 write
func logWrite(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:context/v1 get
func contextGet(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:result/v1 read
func resultRead(out unsafe.Pointer, outCap uint32) uint32
