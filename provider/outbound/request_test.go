package outbound

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func TestKindNamesProviderAndPermission(t *testing.T) {
	kind := newKind(t, Options{})
	payload := encode(t, &pb.HttpRequest{Provider: "web", Method: "GET", Url: "https://Example.com/a"})
	demand, err := kind.Demand("request", payload)
	need := demand.Need
	if err != nil || demand.Provider != "web" || need != (permission.Need{Capability: "http", Action: "request", Resource: "example.com:443"}) {
		t.Errorf("demand %+v, %v", demand, err)
	}
	if action, ok := permission.ForImport("http", "request"); !ok || action.Action != need.Action || kind.Type() != need.Capability {
		t.Errorf("the import needs %+v, the call %+v", action, need)
	}
	if _, repeatable := any(kind).(provider.Repeatable); repeatable {
		t.Error("a POST must not be repeatable")
	}
	for operation, b := range map[string][]byte{"fetch": payload, "request": {0xff}} {
		if _, err := kind.Demand(operation, b); !errors.Is(err, provider.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", operation, err)
		}
	}
}

func TestRequestsOutOfBoundsAreRefused(t *testing.T) {
	many := make([]*pb.HttpHeader, 129)
	for i := range many {
		many[i] = &pb.HttpHeader{Name: "X-" + itoa(i), Value: "v"}
	}
	tests := map[string]struct {
		change func(*pb.HttpRequest)
		why    string
	}{
		"no method":          {func(r *pb.HttpRequest) { r.Method = "" }, "method"},
		"lower case":         {func(r *pb.HttpRequest) { r.Method = "get" }, "GET, POST"},
		"CONNECT":            {func(r *pb.HttpRequest) { r.Method = "CONNECT" }, "CONNECT"},
		"TRACE":              {func(r *pb.HttpRequest) { r.Method = "TRACE" }, "TRACE"},
		"space in method":    {func(r *pb.HttpRequest) { r.Method = "GET /" }, "method"},
		"large body":         {func(r *pb.HttpRequest) { r.Body = make([]byte, MaxBody+1) }, "4194304"},
		"long time":          {func(r *pb.HttpRequest) { r.TimeoutMs = 600_001 }, "600000"},
		"many headers":       {func(r *pb.HttpRequest) { r.Headers = many }, "128"},
		"large headers":      {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: "A", Value: strings.Repeat("x", 65536)}} }, "65536"},
		"no name":            {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Value: "x"}} }, "name"},
		"pseudo header":      {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: ":path", Value: "x"}} }, ":path"},
		"new line in name":   {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: "A\r\nHost", Value: "x"}} }, "name"},
		"new line in value":  {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: "A", Value: "x\r\nHost: y"}} }, "control"},
		"zero byte in value": {func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: "A", Value: "\x00"}} }, "control"},
	}
	for _, name := range []string{
		"Host", "host", "Connection", "Content-Length", "Transfer-Encoding", "transfer_encoding", "TE", "Trailer", "Upgrade",
		"Keep-Alive", "Expect", "HTTP2-Settings", "Proxy-Authorization", "Proxy-Connection", "proxy_anything", "Alt-Used",
	} {
		tests[name] = struct {
			change func(*pb.HttpRequest)
			why    string
		}{func(r *pb.HttpRequest) { r.Headers = []*pb.HttpHeader{{Name: name, Value: "x"}} }, name}
	}
	kind := newKind(t, Options{})
	for what, tt := range tests {
		r := &pb.HttpRequest{Method: "GET", Url: "http://example.com/"}
		tt.change(r)
		_, err := kind.Demand("request", encode(t, r))
		if !errors.Is(err, provider.ErrInvalid) || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("%s: %v; want ErrInvalid that mentions %q", what, err, tt.why)
		}
	}
	ok := &pb.HttpRequest{
		Method: "PATCH", Url: "http://example.com/", Body: make([]byte, MaxBody), Headers: many[:128], TimeoutMs: 600_000,
		MaxResponseBytes: 1 << 60,
	}
	if _, err := kind.Demand("request", encode(t, ok)); err != nil {
		t.Errorf("a request at every limit: %v", err)
	}
}

func TestSettingsAreChecked(t *testing.T) {
	for _, tt := range []struct {
		cfg provider.Config
		why string
	}{
		{provider.Config{Driver: "proxy"}, "direct"},
		{provider.Config{Settings: map[string]string{"max_response": "1MiB"}}, "max_response_bytes"},
		{provider.Config{Settings: map[string]string{"max_response_bytes": "9MiB"}}, "8MiB"},
		{provider.Config{Settings: map[string]string{"max_response_bytes": "-1"}}, "8MiB"},
		{provider.Config{Settings: map[string]string{"max_in_flight": "0"}}, "10000"},
		{provider.Config{Settings: map[string]string{"max_in_flight_per_instance": "many"}}, "10000"},
		{provider.Config{Settings: map[string]string{"ca_file": "/nowhere"}}, "/nowhere"},
		{provider.Config{Settings: map[string]string{"ca_file": "doc.go"}}, "PEM"},
	} {
		_, err := newKind(t, Options{}).Open(t.Context(), tt.cfg)
		wantRefusal(t, err, provider.ErrInvalid, tt.why, "")
	}
	p := openWith(t, Options{}, map[string]string{"max_response_bytes": "8MiB", "max_in_flight": "1", "max_in_flight_per_instance": "10000"})
	if p.settings.maxResponse != MaxResponse || p.settings.maxInFlight != 1 || p.settings.maxEach != 10000 {
		t.Errorf("%+v", p.settings)
	}
}

// FuzzDecode holds decode to what proto.Unmarshal reads.
func FuzzDecode(f *testing.F) {
	full := &pb.HttpRequest{
		Provider: "p", Method: "POST", Url: "http://a/", Headers: []*pb.HttpHeader{{Name: "A", Value: "b"}, {Name: "C"}},
		Body: []byte("body"), TimeoutMs: 7, MaxResponseBytes: 9, NoRedirects: true,
	}
	b, err := proto.Marshal(full)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(append(b, b...))
	f.Add([]byte{0x22, 0x02, 0x0a, 0x00, 0x20, 0x01, 0x30, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, payload []byte) {
		var want pb.HttpRequest
		bad := proto.Unmarshal(payload, &want)
		r, err := decode("request", payload)
		if (bad == nil) != (err == nil) {
			t.Fatalf("%x: proto says %v, decode %v", payload, bad, err)
		}
		if err != nil {
			return
		}
		got := &pb.HttpRequest{
			Provider: r.provider, Method: r.method, Url: r.url, Body: r.body, TimeoutMs: r.timeout,
			MaxResponseBytes: r.maxResponse, NoRedirects: r.noRedirects,
		}
		for _, x := range r.fields {
			got.Headers = append(got.Headers, &pb.HttpHeader{Name: x.name, Value: x.value})
		}
		want.ProtoReflect().SetUnknown(nil)
		for _, h := range want.GetHeaders() {
			h.ProtoReflect().SetUnknown(nil)
		}
		if !proto.Equal(got, &want) {
			t.Fatalf("%x: decode read %v, proto %v", payload, got, &want)
		}
	})
}
