package wasmatrix

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Request is one call of the invoke handler.
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

// InvokeHandler answers one call. A returned *Error reaches the caller with its
// code and message; any other error reaches it as INTERNAL_ERROR.
type InvokeHandler func(Request) (Response, error)

var (
	invokeHandler InvokeHandler
	drainHandler  func()
)

// HandleInvoke registers the handler of `wasmatrix invoke` and of the API's
// Invoke. Call it from an init function.
func HandleInvoke(h InvokeHandler) { invokeHandler = h }

// HandleDrain registers a function that is called once before a graceful stop.
// Call it from an init function.
func HandleDrain(h func()) { drainHandler = h }

func serveInvoke(in []byte) []byte {
	if invokeHandler == nil {
		return appendBytes(nil, 5, encodeError(Errorf(InvalidRequest, "this guest has no invoke handler")))
	}
	var req Request
	err := fields(in, func(n protowire.Number, v value) {
		switch n {
		case 1:
			req.Target = string(v.bytes)
		case 2:
			req.Payload = v.bytes
		case 3:
			req.ContentType = string(v.bytes)
		}
	})
	var resp Response
	if err == nil {
		resp, err = invokeHandler(req)
	}
	if err != nil {
		return appendBytes(nil, 5, encodeError(err))
	}
	return appendString(appendBytes(nil, 1, resp.Payload), 2, resp.ContentType)
}

// Context says who this guest is and what it works on.
type Context struct {
	// InstanceID is the instance's id.
	InstanceID string
	// InstanceName is the workload's name.
	InstanceName string
	// Generation counts the placements of the instance.
	Generation uint64
	// CorrelationID is that of the present call, or of the start outside one.
	CorrelationID string
	// Left is the time left for the present call; 0 when there is no limit.
	Left time.Duration
}

// CurrentContext asks the host who this guest is.
func CurrentContext() (Context, error) {
	out, err := call(contextGet, nil)
	if err != nil {
		return Context{}, err
	}
	var c Context
	return c, fields(out, func(n protowire.Number, v value) {
		switch n {
		case 1:
			c.InstanceID = string(v.bytes)
		case 2:
			c.InstanceName = string(v.bytes)
		case 3:
			c.Generation = v.number
		case 4:
			c.CorrelationID = string(v.bytes)
		case 5:
			c.Left = time.Duration(v.number) * time.Millisecond
		}
	})
}
