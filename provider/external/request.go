package external

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/provider"
)

// opCall is the one operation that guests import.
const opCall = "call"

const (
	// MaxPayload is the most bytes of an operation's input or output.
	MaxPayload = 4 << 20
	// MaxOperation is the longest name of an operation in bytes.
	MaxOperation = 63
)

// request is a ProviderCallRequest. Its payload points into what it was read from.
type request struct {
	provider  string
	operation string
	payload   []byte
}

// decode reads a request without copying its payload: it is read three times on
// its way, and may have megabytes.
func decode(operation string, message []byte) (request, error) {
	var r request
	if operation != opCall {
		return r, provider.Errorf(provider.ErrInvalid, "operation %q of provider is unknown; expected %s", operation, opCall).
			With("operation", operation)
	}
	for len(message) > 0 {
		number, typ, n := protowire.ConsumeTag(message)
		if n < 0 || number > protowire.MaxValidNumber {
			return r, malformed()
		}
		message = message[n:]
		var value []byte
		if number <= 3 && typ == protowire.BytesType {
			value, n = protowire.ConsumeBytes(message)
		} else {
			number, n = 0, protowire.ConsumeFieldValue(number, typ, message)
		}
		if n < 0 {
			return r, malformed()
		}
		switch int(number) {
		case 1:
			r.provider = string(value)
		case 2:
			r.operation = string(value)
		case 3:
			r.payload = value
		}
		message = message[n:]
	}
	return r, nil
}

func malformed() error {
	return provider.Errorf(provider.ErrInvalid, "the request is no ProviderCallRequest")
}

// check refuses a request that no provider could carry out.
func (r *request) check() error {
	switch {
	case !validOperation(r.operation):
		return provider.Errorf(provider.ErrInvalid, "operation %q: expected 1 to %d letters, digits and any of _ . / -", abridged(r.operation), MaxOperation)
	case len(r.payload) > MaxPayload:
		return provider.Errorf(provider.ErrInvalid, "the payload has %d bytes; at most %d are allowed", len(r.payload), MaxPayload)
	default:
		return nil
	}
}

func validOperation(name string) bool {
	if name == "" || len(name) > MaxOperation {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && strings.IndexByte("_./-", c) < 0 {
			return false
		}
	}
	return true
}

func abridged(s string) string {
	if len(s) > MaxOperation {
		return s[:MaxOperation] + "…"
	}
	return s
}
