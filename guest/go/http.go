package wasmatrix

import (
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// HTTP is an HTTP provider as this instance may use it. The zero value is the
// only HTTP provider that the instance was granted. To use an *http.Client of
// the standard library instead, see package nethttp.
type HTTP struct {
	// Provider is the provider's id; empty means the only one granted.
	Provider string
}

// HTTPRequest is a request of the outside.
type HTTPRequest struct {
	// Method is GET, POST, PUT, DELETE, PATCH, HEAD or OPTIONS; empty means GET.
	Method string
	// URL is absolute, http or https.
	URL string
	// Headers are at most 128 header fields.
	Headers []Header
	// Body has at most 4 MiB.
	Body []byte
	// Timeout bounds the whole exchange, redirects included, in whole
	// milliseconds; 0 means the provider's default of 30 s.
	Timeout time.Duration
	// MaxResponseBytes is the most that the answer's body may have, after
	// decompression; 0 means the provider's limit. A larger body is an error.
	MaxResponseBytes uint64
	// NoRedirects gives a redirect as the answer instead of following it.
	NoRedirects bool
}

// HTTPResponse is the answer of the outside, whatever its status.
type HTTPResponse struct {
	// Status is 100 to 599.
	Status int
	// Headers are the header fields.
	Headers []Header
	// Body is the whole body.
	Body []byte
	// URL is the one that answered, after redirects.
	URL string
}

// Header returns the first value of the header field name, in any case, or "".
func (r HTTPResponse) Header(name string) string { return HeaderValue(r.Headers, name) }

// Get requests url with GET. It needs http:request, and a matching http:domain
// if the instance was granted any. An answer with any status is no error.
func (h HTTP) Get(url string) (HTTPResponse, error) { return h.Do(HTTPRequest{URL: url}) }

// Post requests url with POST and a body of the given media type. See Get.
func (h HTTP) Post(url, contentType string, body []byte) (HTTPResponse, error) {
	return h.Do(HTTPRequest{Method: "POST", URL: url, Headers: []Header{{Name: "Content-Type", Value: contentType}}, Body: body})
}

// Do makes a request. See Get.
func (h HTTP) Do(req HTTPRequest) (HTTPResponse, error) {
	if req.Method == "" {
		req.Method = "GET"
	}
	b := wire.AppendString(nil, 1, h.Provider)
	b = wire.AppendString(b, 2, req.Method)
	b = wire.AppendString(b, 3, req.URL)
	b = appendHeaders(b, 4, req.Headers)
	b = wire.AppendBytes(b, 5, req.Body)
	b = wire.AppendUint(b, 6, timeout(req.Timeout))
	b = wire.AppendUint(b, 7, req.MaxResponseBytes)
	b = wire.AppendBool(b, 8, req.NoRedirects)
	out, err := call(httpRequest, b)
	if err != nil {
		return HTTPResponse{}, err
	}
	var resp HTTPResponse
	var bad error
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			resp.Status = int(v.Number)
		case 2:
			resp.Headers = appendHeader(resp.Headers, v.Bytes, &bad)
		case 3:
			resp.Body = v.Bytes
		case 4:
			resp.URL = string(v.Bytes)
		}
	})
	if bad != nil {
		err = bad
	}
	return resp, err
}

// timeout is d in the 32 bits of milliseconds that a request has for it.
func timeout(d time.Duration) uint64 { return min(wire.Milliseconds(d), math.MaxUint32) }
