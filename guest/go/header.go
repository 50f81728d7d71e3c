package wasmatrix

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Header is one header field of an HTTP request or answer, or of a message; a
// name may come more than once.
type Header struct {
	// Name is compared in any case.
	Name string
	// Value is the text as it is.
	Value string
}

// HeaderValue returns the first value of the header field name, in any case, or "".
func HeaderValue(headers []Header, name string) string {
	for _, h := range headers {
		if strings.EqualFold(h.Name, name) {
			return h.Value
		}
	}
	return ""
}

func appendHeaders(b []byte, n protowire.Number, headers []Header) []byte {
	for _, h := range headers {
		b = wire.AppendPair(b, n, h.Name, h.Value)
	}
	return b
}

// appendHeader reads one header field; a failure goes to bad unless one is there.
func appendHeader(to []Header, b []byte, bad *error) []Header {
	name, text, err := wire.Pair(b)
	if err != nil && *bad == nil {
		*bad = err
	}
	return append(to, Header{Name: name, Value: text})
}
