package outbound

import (
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/provider"
)

// opRequest is the only operation, as guests import it.
const opRequest = "request"

// The limits of a request.
const (
	// MaxBody is the largest body of a request in bytes.
	MaxBody = 4 << 20
	// MaxHeaders is the most header fields of a request.
	MaxHeaders = 128
	// MaxHeaderBytes is the most bytes of all names and values together.
	MaxHeaderBytes = 64 << 10
	// MaxResponse is the largest body of an answer that a provider can be set to
	// let through, in bytes.
	MaxResponse = 8 << 20
	// DefaultTimeout is how long an exchange takes at most when the request does
	// not say, MaxTimeout what it may say.
	DefaultTimeout = 30 * time.Second
	MaxTimeout     = 10 * time.Minute
	// MaxRedirects is how many redirects are followed.
	MaxRedirects = 5
)

// methods are those that may be requested.
var methods = []string{"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"}

// safe reports whether a method has no effect, so that it can be sent twice.
func safe(method string) bool { return method == "GET" || method == "HEAD" || method == "OPTIONS" }

// field is one header field as the guest wrote it.
type field struct{ name, value string }

// request is an HttpRequest. Its body points into the payload.
type request struct {
	provider    string
	method      string
	url         string
	fields      []field
	body        []byte
	timeout     uint32 // milliseconds
	maxResponse uint64
	noRedirects bool
}

// decode reads a request without copying its body: the payload is read three times
// on its way. It means what proto.Unmarshal does and checks no limits.
func decode(operation string, payload []byte) (*request, error) {
	if operation != opRequest {
		return nil, provider.Errorf(provider.ErrInvalid, "operation %q of http is unknown; expected request", operation).
			With("operation", operation)
	}
	var r request
	if !r.scan(payload) {
		return nil, provider.Errorf(provider.ErrInvalid, "the request is not a valid HttpRequest message").
			With("operation", operation)
	}
	return &r, nil
}

func (r *request) scan(b []byte) bool {
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return false
		}
		b = b[n:]
		n = protowire.ConsumeFieldValue(number, typ, b)
		if n < 0 {
			return false
		}
		ok := true
		switch typ { //nolint:exhaustive // a field of another type counts as unknown
		case protowire.BytesType:
			v, _ := protowire.ConsumeBytes(b)
			ok = r.bytes(number, v)
		case protowire.VarintType:
			v, _ := protowire.ConsumeVarint(b)
			r.varint(number, v)
		}
		if !ok {
			return false
		}
		b = b[n:]
	}
	return true
}

func (r *request) bytes(number protowire.Number, v []byte) bool {
	switch number {
	case 1:
		r.provider = string(v)
	case 2:
		r.method = string(v)
	case 3:
		r.url = string(v)
	case 4:
		f, ok := scanField(v)
		r.fields = append(r.fields, f)
		return ok
	case 5:
		r.body = v
		return true
	default:
		return true
	}
	return utf8.Valid(v)
}

func (r *request) varint(number protowire.Number, v uint64) {
	switch number {
	case 6:
		r.timeout = uint32(v) //nolint:gosec // proto truncates too
	case 7:
		r.maxResponse = v
	case 8:
		r.noRedirects = v != 0
	default:
	}
}

func scanField(b []byte) (f field, ok bool) {
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return f, false
		}
		b = b[n:]
		n = protowire.ConsumeFieldValue(number, typ, b)
		if n < 0 {
			return f, false
		}
		if typ == protowire.BytesType && number <= 2 {
			v, _ := protowire.ConsumeBytes(b)
			if !utf8.Valid(v) {
				return f, false
			}
			if number == 1 {
				f.name = string(v)
			} else {
				f.value = string(v)
			}
		}
		b = b[n:]
	}
	return f, true
}

// check checks a decoded request and returns where it goes. It fails with ErrInvalid.
func (r *request) check() (*target, error) {
	if !slices.Contains(methods, r.method) {
		return nil, provider.Errorf(provider.ErrInvalid, "method %q is not one of %s", clip(r.method), strings.Join(methods, ", ")).
			With("method", clip(r.method))
	}
	if len(r.body) > MaxBody {
		return nil, provider.Errorf(provider.ErrInvalid, "the body has %d bytes, the most is %d", len(r.body), MaxBody)
	}
	if time.Duration(r.timeout)*time.Millisecond > MaxTimeout {
		return nil, provider.Errorf(provider.ErrInvalid, "timeout_ms is %d, the most is %d", r.timeout, MaxTimeout.Milliseconds())
	}
	if err := checkFields(r.fields); err != nil {
		return nil, err
	}
	return parseTarget(r.url)
}

// clip bounds what a guest wrote for a message.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
