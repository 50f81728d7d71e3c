// Package nethttp lets a guest use an *http.Client of the standard library:
//
//	client := &http.Client{Transport: nethttp.Transport{}}
//
// It adds several megabytes to a guest; HTTP of package wasmatrix does not.
package nethttp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
)

// Transport makes the requests of an *http.Client through an HTTP provider. It
// is an http.RoundTripper; the client follows redirects itself, and each step is
// checked as a request of its own.
type Transport struct {
	// HTTP is the provider; the zero value is the only one granted.
	HTTP wasmatrix.HTTP

	do func(wasmatrix.HTTPRequest) (wasmatrix.HTTPResponse, error) // nil but in tests
}

// RoundTrip makes one request. The deadline of its context becomes the request's
// time-out; a context that is cancelled during the request does not end it.
func (t Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	out, err := prepare(req)
	if err != nil {
		return nil, err
	}
	do := t.do
	if do == nil {
		do = t.HTTP.Do
	}
	in, err := do(out)
	if err != nil {
		if wasmatrix.CodeOf(err) == wasmatrix.Timeout {
			err = timedOut{err}
		}
		return nil, err
	}
	resp := &http.Response{
		Status: fmt.Sprintf("%d %s", in.Status, http.StatusText(in.Status)), StatusCode: in.Status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{},
		Body: io.NopCloser(bytes.NewReader(in.Body)), ContentLength: int64(len(in.Body)), Request: req,
	}
	for _, h := range in.Headers {
		resp.Header.Add(h.Name, h.Value)
	}
	return resp, nil
}

// timedOut says what net/http and its users ask of a failure.
type timedOut struct{ error }

func (timedOut) Timeout() bool   { return true }
func (e timedOut) Unwrap() error { return e.error }

// prepare makes what the provider takes of a request, and closes its body.
func prepare(req *http.Request) (wasmatrix.HTTPRequest, error) {
	out := wasmatrix.HTTPRequest{Method: req.Method, URL: req.URL.String(), NoRedirects: true}
	if req.Body != nil {
		body, err := io.ReadAll(req.Body)
		if err = errors.Join(err, req.Body.Close()); err != nil {
			return out, fmt.Errorf("read the request's body: %w", err)
		}
		out.Body = body
	}
	if err := req.Context().Err(); err != nil {
		return out, err
	}
	if deadline, ok := req.Context().Deadline(); ok {
		out.Timeout = max(time.Millisecond, time.Until(deadline))
	}
	for name, values := range req.Header {
		for _, value := range values {
			out.Headers = append(out.Headers, wasmatrix.Header{Name: name, Value: value})
		}
	}
	return out, nil
}
