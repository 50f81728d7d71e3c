//go:build wasip1 && kv && messaging

package main

import (
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// Fields of wasmatrix.v1.Message, KvSetRequest, MessageResult.
const (
	messagePayload = 2
	setKey         = 2
	setValue       = 3
	resultVerdict  = 1
	resultReply    = 2

	verdictRetry = 2
)

// onMessage writes the key "seen/<payload>", whose version then counts how often
// the message was handled, and replies with the payload. When the provider is not
// there it asks for the message to be delivered again.
//
//go:wasmexport wasmatrix_on_message
func onMessage(_ unsafe.Pointer, size uint32) uint64 {
	payload := field(input[:size], messagePayload)
	request := protowire.AppendBytes(protowire.AppendTag(nil, setKey, protowire.BytesType), append([]byte("seen/"), payload...))
	request = protowire.AppendBytes(protowire.AppendTag(request, setValue, protowire.BytesType), []byte{1})
	if status, _ := call(kvSet, request); status != 0 {
		return give(protowire.AppendVarint(protowire.AppendTag(nil, resultVerdict, protowire.VarintType), verdictRetry))
	}
	return give(protowire.AppendBytes(protowire.AppendTag(nil, resultReply, protowire.BytesType), payload))
}
