// Package invoke handles calls: those of `wasmatrix invoke` and of the API's
// Invoke. Importing it makes a module a reactor with the handler
// wasmatrix_on_invoke.
package invoke

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Request is one call.
type Request struct {
	// Target is what the caller called: an instance's id or a workload's name.
	Target string
	// Payload is valid until the handler returns.
	Payload []byte
	// ContentType is the payload's media type; may be empty.
	ContentType string
}

// Response is the handler's answer.
type Response struct {
	// Payload is the output; at most 4 MiB.
	Payload []byte
	// ContentType is the payload's media type; may be empty.
	ContentType string
}

// Handler answers one call. A returned *wasmatrix.Error reaches the caller with
// its code and the text of the whole error; any other error reaches it
// as INTERNAL_ERROR.
type Handler func(Request) (Response, error)

var handler Handler

// Handle registers the handler. Call it from an init function.
func Handle(h Handler) { handler = h }

// The fields of wasmatrix.v1.InvokeRequest and InvokeResponse.
const (
	fieldTarget       = 1
	fieldInput        = 2
	fieldInputType    = 3
	fieldOutput       = 1
	fieldOutputType   = 2
	fieldOutputRefuse = 5
)

func serve(in []byte) []byte {
	if handler == nil {
		return refuse(wasmatrix.Errorf(wasmatrix.InvalidRequest, "this guest registered no handler for calls"))
	}
	var req Request
	err := wire.Fields(in, func(n protowire.Number, v wire.Value) {
		switch n {
		case fieldTarget:
			req.Target = string(v.Bytes)
		case fieldInput:
			req.Payload = v.Bytes
		case fieldInputType:
			req.ContentType = string(v.Bytes)
		}
	})
	var resp Response
	if err == nil {
		resp, err = handler(req)
	}
	if err != nil {
		return refuse(err)
	}
	return wire.AppendString(wire.AppendBytes(nil, fieldOutput, resp.Payload), fieldOutputType, resp.ContentType)
}

func refuse(err error) []byte {
	own := &wasmatrix.Error{Code: wasmatrix.Internal}
	errors.As(err, &own)
	return wire.AppendError(nil, fieldOutputRefuse, uint32(own.Code), err.Error(), own.Details)
}
