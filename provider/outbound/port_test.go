package outbound

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// node is one node with a running http provider "web" and an instance on it.
type node struct {
	dir    *provider.Directory
	host   *provider.Host
	router *provider.Router
}

func newNode(t testing.TB, o Options, allow ...string) *node {
	t.Helper()
	kind := newKind(t, o)
	n := &node{dir: provider.NewDirectory("n1"), host: provider.NewHost(slog.New(slog.DiscardHandler), kind)}
	var err error
	n.router, err = provider.NewRouter(provider.RouterConfig{
		Directory: n.dir, Host: n.host, Kinds: []provider.Kind{kind}, SettleWithin: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.host.Start(t.Context(), "http", provider.Config{ID: "web"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.host.Close(context.Background()); err != nil {
			t.Errorf("close the host: %v", err)
		}
	})
	n.dir.Replace(provider.Records{
		Instances:   []provider.InstanceRecord{{ID: "hello-1", Name: "hello", Node: "n1", Generation: 1, Created: 7}},
		Providers:   []provider.ProviderRecord{{ID: "web", Type: "http", Node: "n1", Running: true}},
		Assignments: []provider.Assignment{{Instance: "hello-1", Provider: "web", Permissions: permissions(t, allow...)}},
	})
	return n
}

func (n *node) get(t testing.TB, url string) (*pb.HttpResponse, error) {
	t.Helper()
	b, err := n.router.Port("hello-1", 1, 0).Call(t.Context(), "http", "request", encode(t, &pb.HttpRequest{Method: "GET", Url: url}))
	if err != nil {
		return nil, err
	}
	var resp pb.HttpResponse
	return &resp, proto.Unmarshal(b, &resp)
}

// TestAGuestsRequest goes the whole way of a guest's call, with the rules of its
// assignment on both sides.
func TestAGuestsRequest(t *testing.T) {
	s, _ := serve(t, false, echo)
	n := newNode(t, Options{}, "http:request", "http:domain:127.0.0.0/8:"+portOf(t, s))
	if resp, err := n.get(t, s.URL); err != nil || resp.GetStatus() != 418 {
		t.Errorf("%v, %v", resp, err)
	}
	_, err := n.get(t, "http://127.0.0.1:1/")
	wantRefusal(t, err, provider.ErrDenied, "127.0.0.1:1", "wasmatrix grant hello")
	n.dir.PutAssignment(provider.Assignment{Instance: "hello-1", Provider: "web", Permissions: permissions(t, "http:request")})
	_, err = n.get(t, s.URL)
	wantRefusal(t, err, provider.ErrDenied, "loopback (127.0.0.0/8)", "wasmatrix grant hello http:domain:127.0.0.1:"+portOf(t, s)+" --provider web; then only")
	n.dir.PutAssignment(provider.Assignment{Instance: "hello-1", Provider: "web"})
	_, err = n.get(t, s.URL)
	wantRefusal(t, err, provider.ErrDenied, "no permission for http", "http:request")
}

// TestNothingIsSentAfterTheCallersTime lets the caller be superseded while its
// connection is being made: the request must not be written.
func TestNothingIsSentAfterTheCallersTime(t *testing.T) {
	var served atomic.Int64
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) { served.Add(1) })
	var n *node
	n = newNode(t, Options{Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, address)
		n.dir.PutInstance(provider.InstanceRecord{ID: "hello-1", Name: "hello", Node: "n2", Generation: 2, Created: 7})
		return c, err
	}}, "http:request", "http:domain:127.0.0.1")
	_, err := n.get(t, s.URL)
	wantRefusal(t, err, provider.ErrDenied, "superseded", "")
	if outcomeUnknown(err) || served.Load() != 0 {
		t.Errorf("%d requests were served: %v", served.Load(), err)
	}
}

// TestTheProviderFencesItself lets a newer generation in first.
func TestTheProviderFencesItself(t *testing.T) {
	var served atomic.Int64
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) { served.Add(1) })
	p, set := local(t, nil)
	as := func(generation uint64) error {
		_, err := p.Invoke(t.Context(), provider.Call{
			Instance: "hello-1", Name: "hello", Generation: generation, Operation: opRequest, Permissions: set,
			Payload: encode(t, &pb.HttpRequest{Method: "POST", Url: s.URL}),
		})
		return err
	}
	if err := errors.Join(as(1), as(3), as(3)); err != nil {
		t.Error(err)
	}
	wantRefusal(t, as(2), provider.ErrDenied, "superseded", "")
	if served.Load() != 3 {
		t.Errorf("%d requests were served, want 3", served.Load())
	}
}

func percentile(all []time.Duration, p float64) float64 {
	return float64(all[int(float64(len(all)-1)*p)].Nanoseconds()) / 1e3
}

// BenchmarkGet is a GET of 1 KiB through a guest's port beside net/http alone, to
// the same server in the same run.
func BenchmarkGet(b *testing.B) {
	kib := make([]byte, 1024)
	s, _ := serve(b, false, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(kib) })
	n := newNode(b, Options{}, "http:request", "http:domain:127.0.0.1")
	payload := encode(b, &pb.HttpRequest{Method: "GET", Url: s.URL + "/kib"})
	port := n.router.Port("hello-1", 1, 0)
	ways := []struct {
		name string
		get  func() error
	}{
		{"bare", func() error {
			req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, s.URL+"/kib", http.NoBody)
			if err != nil {
				return err
			}
			resp, err := s.Client().Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, err = io.ReadAll(resp.Body)
			return err
		}},
		{"port", func() error {
			_, err := port.Call(b.Context(), "http", "request", payload)
			return err
		}},
	}
	for _, way := range ways {
		b.Run(way.name, func(b *testing.B) {
			all := make([]time.Duration, 0, b.N)
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				if err := way.get(); err != nil {
					b.Fatal(err)
				}
				all = append(all, time.Since(start))
			}
			slices.Sort(all)
			b.ReportMetric(percentile(all, 0.5), "p50-µs")
			b.ReportMetric(percentile(all, 0.99), "p99-µs")
		})
	}
}
