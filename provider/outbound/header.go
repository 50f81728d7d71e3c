package outbound

import (
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/http/httpguts"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// userAgent is sent when the guest sets none.
const userAgent = "wasmatrix"

// reserved are the header fields that belong to the connection, or say where the
// request goes and where it ends; these are not for the guest to say.
var reserved = []string{
	"alt-used", "connection", "content-length", "expect", "host", "http2-settings", "keep-alive",
	"te", "trailer", "transfer-encoding", "upgrade",
}

// portable are the header fields that follow a redirect to another origin. Any
// other may be a credential, whatever its name.
var portable = []string{
	"Accept", "Accept-Charset", "Accept-Encoding", "Accept-Language", "Cache-Control", "Content-Encoding",
	"Content-Language", "Content-Type", "If-Match", "If-Modified-Since", "If-None-Match", "If-Unmodified-Since",
	"Pragma", "Range", "User-Agent",
}

// hops are the header fields of an answer that are about the connection.
var hops = []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

func checkFields(fields []field) error {
	if len(fields) > MaxHeaders {
		return provider.Errorf(provider.ErrInvalid, "the request has %d header fields, the most is %d", len(fields), MaxHeaders)
	}
	total := 0
	for _, f := range fields {
		total += len(f.name) + len(f.value)
		if reason := checkField(f); reason != "" {
			return provider.Errorf(provider.ErrInvalid, "header %q %s", clip(f.name), reason).With("header", clip(f.name))
		}
	}
	if total > MaxHeaderBytes {
		return provider.Errorf(provider.ErrInvalid, "the header fields have %d bytes together, the most is %d", total, MaxHeaderBytes)
	}
	return nil
}

func checkField(f field) string {
	if !httpguts.ValidHeaderFieldName(f.name) {
		return "has a name that is not valid"
	}
	if !httpguts.ValidHeaderFieldValue(f.value) {
		return "has a value with a control character"
	}
	// Servers that hand header fields on as variables take _ for -.
	name := strings.ReplaceAll(strings.ToLower(f.name), "_", "-")
	if slices.Contains(reserved, name) || strings.HasPrefix(name, "proxy-") {
		return "is not the guest's to set"
	}
	return ""
}

// headerOf returns checked fields as net/http takes them.
func headerOf(fields []field) http.Header {
	h := make(http.Header, len(fields)+1)
	for _, f := range fields {
		h.Add(f.name, f.value)
	}
	if _, set := h["User-Agent"]; !set {
		h.Set("User-Agent", userAgent)
	}
	return h
}

// toOtherOrigin drops every field that may be a credential.
func toOtherOrigin(h http.Header) {
	for name := range h {
		if !slices.Contains(portable, name) {
			delete(h, name)
		}
	}
}

// withoutBody drops the fields that describe a body.
func withoutBody(h http.Header) {
	for name := range h {
		if strings.HasPrefix(name, "Content-") {
			delete(h, name)
		}
	}
}

// answerFields returns the header of an answer, sorted by name.
func answerFields(h http.Header) []*pb.HttpHeader {
	names := make([]string, 0, len(h))
	for name := range h {
		if !slices.Contains(hops, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	out := make([]*pb.HttpHeader, 0, len(names))
	for _, name := range names {
		for _, value := range h[name] {
			out = append(out, &pb.HttpHeader{Name: name, Value: text(value)})
		}
	}
	return out
}

// text returns a header value as UTF-8. One that is not UTF-8 is Latin-1, as HTTP
// has it of old.
func text(value string) string {
	if utf8.ValidString(value) {
		return value
	}
	runes := make([]rune, len(value))
	for i := range len(value) {
		runes[i] = rune(value[i])
	}
	return string(runes)
}
