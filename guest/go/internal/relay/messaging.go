//go:build wasip1 && messaging

package main

import "unsafe"

//go:wasmimport wasmatrix:messaging/v1 publish
func msgPublish(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 request
func msgRequest(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 subscribe
func msgSubscribe(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

//go:wasmimport wasmatrix:messaging/v1 unsubscribe
func msgUnsubscribe(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64

func init() {
	calls["messaging/publish"], calls["messaging/request"] = msgPublish, msgRequest
	calls["messaging/subscribe"], calls["messaging/unsubscribe"] = msgSubscribe, msgUnsubscribe
}
