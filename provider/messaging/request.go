package messaging

import (
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The operations, as guests import them.
const (
	opPublish     = "publish"
	opRequest     = "request"
	opSubscribe   = "subscribe"
	opUnsubscribe = "unsubscribe"
)

// The limits of a request.
const (
	// MaxPayload is the longest content in bytes.
	MaxPayload = 1 << 20
	// MaxHeaders is the most header fields of a message, MaxHeaderName and
	// MaxHeaderValue how long each may be in bytes.
	MaxHeaders     = 32
	MaxHeaderName  = 256
	MaxHeaderValue = 4096
	// DefaultRequestTimeout is how long a request waits that says nothing else.
	DefaultRequestTimeout = 5 * time.Second
)

// request is any of the four request messages. Its slices point into the payload.
type request struct {
	provider []byte
	subject  []byte
	payload  []byte
	headers  []header
	timeout  uint32 // milliseconds
}

type header struct{ name, value []byte }

// decode reads the request of an operation without copying. It accepts and means
// what proto.Unmarshal does; the request is read three times on its way, which
// makes that worth while. It checks no limits.
func decode(operation string, payload []byte) (request, error) {
	most := protowire.Number(2)
	switch operation {
	case opSubscribe, opUnsubscribe:
	case opPublish:
		most = 4
	case opRequest:
		most = 5
	default:
		return request{}, provider.Errorf(provider.ErrInvalid,
			"operation %q of messaging is unknown; expected publish, request, subscribe or unsubscribe", operation).
			With("operation", operation)
	}
	var r request
	if !r.scan(payload, most) {
		return request{}, provider.Errorf(provider.ErrInvalid, "the request of messaging %s is not a valid message", operation).
			With("operation", operation)
	}
	return r, nil
}

// scan reads the fields up to number most; others are unknown to the message.
func (r *request) scan(b []byte, most protowire.Number) bool {
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return false
		}
		b = b[n:]
		switch {
		case number > most || number < 5 && typ != protowire.BytesType || number == 5 && typ != protowire.VarintType:
			n = protowire.ConsumeFieldValue(number, typ, b)
		case number == 5:
			var v uint64
			v, n = protowire.ConsumeVarint(b)
			r.timeout = uint32(v) //nolint:gosec // proto truncates too
		default:
			var v []byte
			v, n = protowire.ConsumeBytes(b)
			if n >= 0 && !r.field(number, v) {
				return false
			}
		}
		if n < 0 {
			return false
		}
		b = b[n:]
	}
	return true
}

func (r *request) field(number protowire.Number, v []byte) bool {
	switch number {
	case 1:
		r.provider = v
		return utf8.Valid(v)
	case 2:
		r.subject = v
		return utf8.Valid(v)
	case 3:
		r.payload = v
		return true
	default:
		h, ok := scanHeader(v)
		r.headers = append(r.headers, h)
		return ok
	}
}

func scanHeader(b []byte) (h header, ok bool) {
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return h, false
		}
		b = b[n:]
		if number > 2 || typ != protowire.BytesType {
			n = protowire.ConsumeFieldValue(number, typ, b)
		} else {
			var v []byte
			v, n = protowire.ConsumeBytes(b)
			if n >= 0 && !utf8.Valid(v) {
				return h, false
			}
			if number == 1 {
				h.name = v
			} else {
				h.value = v
			}
		}
		if n < 0 {
			return h, false
		}
		b = b[n:]
	}
	return h, true
}

// check refuses what breaks a limit.
func (r *request) check(operation string) error {
	if err := checkSubject(r.subject, operation == opSubscribe || operation == opUnsubscribe); err != nil {
		return err
	}
	if len(r.payload) > MaxPayload {
		return provider.Errorf(provider.ErrInvalid, "the message has %d bytes, the most is %d", len(r.payload), MaxPayload)
	}
	if len(r.headers) > MaxHeaders {
		return provider.Errorf(provider.ErrInvalid, "the message has %d header fields, the most is %d", len(r.headers), MaxHeaders)
	}
	for i := range r.headers {
		if problem := r.headers[i].problem(); problem != "" {
			name := r.headers[i].name
			return provider.Errorf(provider.ErrInvalid, "header %.40q %s", name, problem)
		}
	}
	return nil
}

func (h *header) problem() string {
	switch {
	case len(h.name) == 0:
		return "has no name"
	case len(h.name) > MaxHeaderName:
		return "has a name longer than 256 bytes"
	case len(h.value) > MaxHeaderValue:
		return "has a value longer than 4096 bytes"
	case ownHeader(string(h.name)):
		return "is reserved: names that begin with Nats- or Wasmatrix-, Status and Description belong to the provider"
	}
	for _, c := range h.name {
		if c <= ' ' || c >= 0x7f || c == ':' {
			return "has a name with other characters than visible ASCII without a colon"
		}
	}
	for _, c := range h.value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return "has a value with control characters"
		}
	}
	if v := string(h.value); v != strings.TrimSpace(v) {
		return "has a value that begins or ends with a space"
	}
	return ""
}

// ownHeader reports whether a header field belongs to NATS or to this package. A
// client takes a message of no content with a Status for an answer of the server.
func ownHeader(name string) bool {
	return hasFoldPrefix(name, "Nats-") || hasFoldPrefix(name, "Wasmatrix-") ||
		strings.EqualFold(name, "Status") || strings.EqualFold(name, "Description")
}

func hasFoldPrefix(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// wait is how long a request waits at most.
func (r *request) wait() time.Duration {
	if r.timeout == 0 {
		return DefaultRequestTimeout
	}
	return time.Duration(r.timeout) * time.Millisecond
}
