package outbound

import (
	"context"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// The addresses of the outside: what is dialled there ends at a server of the test.
const (
	publicV4 = "93.184.216.34"
	publicV6 = "2606:2800:220:1:248:1893:25c8:1946"
)

// world is a fake DNS, a fake outside, and everything else a trap. Nothing in it
// connects to anything but loopback.
type world struct {
	testing.TB
	public *httptest.Server // what publicV4 and publicV6 stand for, on every port
	trap   *trap

	mu      sync.Mutex
	names   map[string][]string // by name the answers in turn; the last one stays
	asked   []string            // of the DNS
	dialled []string
}

func newKind(t testing.TB, o Options) *Kind {
	t.Helper()
	k, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// trap listens on loopback and counts who comes.
type trap struct {
	port    string
	entered atomic.Int64
	server  *http.Server
}

func newTrap(t testing.TB) *trap {
	t.Helper()
	tr := &trap{}
	tr.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("trap")) })} //nolint:gosec // a test's
	tr.server.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			tr.entered.Add(1)
		}
	}
	port := "0"
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		l, err := net.Listen("tcp", net.JoinHostPort(host, port))
		if err != nil && host == "::1" {
			t.Logf("no IPv6 loopback here: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if port == "0" {
			_, port, _ = net.SplitHostPort(l.Addr().String())
		}
		go func() { _ = tr.server.Serve(l) }()
	}
	tr.port = port
	t.Cleanup(func() { _ = tr.server.Close() })
	return tr
}

func newWorld(t testing.TB, handler http.Handler) *world {
	t.Helper()
	w := &world{TB: t, trap: newTrap(t), names: map[string][]string{}}
	if handler != nil {
		w.public = httptest.NewServer(handler)
		t.Cleanup(w.public.Close)
	}
	return w
}

// name makes the DNS answer with one list of addresses after the other.
func (w *world) name(name string, answers ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.names[question(name)] = answers
}

func (w *world) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, host)
	answers, ok := w.names[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	if len(answers) > 1 {
		w.names[host] = answers[1:]
	}
	var out []netip.Addr
	for a := range strings.FieldsSeq(answers[0]) {
		out = append(out, netip.MustParseAddr(a))
	}
	return out, nil
}

// dial leads every address that is not of the outside into the trap.
func (w *world) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return nil, errors.New("dialled by name: " + address)
	}
	w.mu.Lock()
	w.dialled = append(w.dialled, address)
	w.mu.Unlock()
	to := net.JoinHostPort("127.0.0.1", w.trap.port)
	switch {
	case host == publicV4 || host == publicV6:
		to = w.public.Listener.Addr().String()
	case addr.IsLoopback() && port == w.trap.port:
		to = address
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

// open opens a provider in this world.
func (w *world) open(settings map[string]string) *service {
	w.Helper()
	return openWith(w, Options{Resolver: w, Dial: w.dial}, settings)
}

func openWith(t testing.TB, o Options, settings map[string]string) *service {
	t.Helper()
	p, err := newKind(t, o).Open(context.Background(), provider.Config{ID: "web", Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	s, ok := p.(*service)
	if !ok {
		t.Fatalf("Open made a %T", p)
	}
	return s
}

func permissions(t testing.TB, texts ...string) permission.Set {
	t.Helper()
	s, err := permission.ParseSet(texts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func encode(t testing.TB, r *pb.HttpRequest) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// do makes one request as an instance that has the given permissions.
func do(ctx context.Context, t testing.TB, p provider.Provider, set permission.Set, r *pb.HttpRequest) (*pb.HttpResponse, error) {
	t.Helper()
	if r.Method == "" {
		r.Method = "GET"
	}
	b, err := p.Invoke(ctx, provider.Call{
		Instance: "hello-1", Name: "hello", Generation: 1, Operation: opRequest, Payload: encode(t, r), Permissions: set,
	})
	if err != nil {
		return nil, err
	}
	var resp pb.HttpResponse
	if err := proto.Unmarshal(b, &resp); err != nil {
		t.Fatal(err)
	}
	return &resp, nil
}

// local is a provider that may reach loopback, and the permissions for it.
func local(t testing.TB, settings map[string]string) (*service, permission.Set) {
	t.Helper()
	return openWith(t, Options{}, settings), permissions(t, "http:request", "http:domain:127.0.0.0/8")
}

// caFile writes the certificate of a TLS server of the test where ca_file can name it.
func caFile(t testing.TB, s *httptest.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(path, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantRefusal checks sentinel, text, next step and details of an error.
func wantRefusal(t testing.TB, err, sentinel error, mentions, next string) {
	t.Helper()
	e, own := errors.AsType[*provider.Error](err)
	switch {
	case !errors.Is(err, sentinel):
		t.Errorf("got %v, want %v", err, sentinel)
	case !own:
		t.Errorf("%v is no *provider.Error", err)
	case !strings.Contains(e.Error(), mentions):
		t.Errorf("%q does not mention %q", e.Error(), mentions)
	case !strings.Contains(e.Next, next):
		t.Errorf("next step %q does not contain %q", e.Next, next)
	}
}

// outcomeUnknown reports whether an error says that its call may have been carried out.
func outcomeUnknown(err error) bool {
	e, own := errors.AsType[*provider.Error](err)
	return own && e.Details[provider.DetailOutcome] == provider.OutcomeUnknown
}

func portOf(t testing.TB, s *httptest.Server) string {
	t.Helper()
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func header(r *pb.HttpResponse, name string) string {
	for _, h := range r.GetHeaders() {
		if h.GetName() == name {
			return h.GetValue()
		}
	}
	return ""
}

func itoa(n int) string { return strconv.Itoa(n) }
