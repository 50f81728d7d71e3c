package outbound

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// dials counts connections of a provider.
func dials(n *atomic.Int64) Options {
	return Options{Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		n.Add(1)
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
}

func TestConnectionsAreKept(t *testing.T) {
	for name, h2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s, settings := serve(t, h2, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/there" {
					http.Redirect(w, r, "/here", http.StatusFound)
				}
			})
			var n atomic.Int64
			p := openWith(t, dials(&n), settings)
			set := permissions(t, "http:request", "http:domain:127.0.0.1")
			for range 5 {
				for _, method := range []string{"GET", "HEAD", "POST"} {
					if _, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: method, Url: s.URL + "/there"}); err != nil {
						t.Fatal(err)
					}
				}
			}
			if n.Load() != 1 {
				t.Errorf("%d connections, want 1", n.Load())
			}
			p.pool.reap(time.Now().Add(idleFor + time.Second))
			if len(p.pool.conns) != 0 || p.pool.idle != 0 {
				t.Errorf("%d connections are kept for ever", len(p.pool.conns))
			}
		})
	}
}

// TestAKeptConnectionIsCheckedAgain takes a permission back while a connection that
// it allowed is kept.
func TestAKeptConnectionIsCheckedAgain(t *testing.T) {
	var served atomic.Int64
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) { served.Add(1) })
	w := newWorld(t, nil)
	w.name("home.example", "127.0.0.1")
	var n atomic.Int64
	o := dials(&n)
	o.Resolver = w
	p := openWith(t, o, nil)
	url := "http://home.example:" + portOf(t, s) + "/"
	before := permissions(t, "http:request", "http:domain:home.example", "http:domain:127.0.0.1")
	after := permissions(t, "http:request", "http:domain:home.example")
	if _, err := do(t.Context(), t, p, before, &pb.HttpRequest{Url: url}); err != nil {
		t.Fatal(err)
	}
	_, err := do(t.Context(), t, p, after, &pb.HttpRequest{Url: url})
	wantRefusal(t, err, provider.ErrDenied, "127.0.0.1", "http:domain:127.0.0.1:"+portOf(t, s))
	_, err = p.Invoke(t.Context(), provider.Call{Name: "root", Operation: opRequest, Payload: encode(t, &pb.HttpRequest{Method: "GET", Url: url})})
	wantRefusal(t, err, provider.ErrDenied, "127.0.0.1", "an instance")
	if served.Load() != 1 || n.Load() != 1 {
		t.Errorf("%d requests over %d connections, want 1 over 1", served.Load(), n.Load())
	}
	// Another instance with the same rules gets a connection of its own.
	_, err = p.Invoke(t.Context(), provider.Call{
		Instance: "other-1", Name: "other", Generation: 1, Operation: opRequest, Permissions: before,
		Payload: encode(t, &pb.HttpRequest{Method: "GET", Url: url}),
	})
	if err != nil || n.Load() != 2 {
		t.Errorf("%d connections, %v", n.Load(), err)
	}
}

// dying is a server that answers the first request of each connection and closes it
// when it has read the second one.
func dying(t *testing.T) (address string, requests func(method string) int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[string]int{}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				in := bufio.NewReader(c)
				for i := range 2 {
					r, err := http.ReadRequest(in)
					if err != nil {
						return
					}
					mu.Lock()
					seen[r.Method]++
					mu.Unlock()
					if i == 0 {
						_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
	})
	return "http://" + l.Addr().String(), func(method string) int {
		mu.Lock()
		defer mu.Unlock()
		return seen[method]
	}
}

// TestOnlySafeRequestsAreRepeated lets a kept connection die under each method.
func TestOnlySafeRequestsAreRepeated(t *testing.T) {
	for _, method := range methods {
		url, requests := dying(t)
		p, set := local(t, nil)
		if _, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url}); err != nil {
			t.Fatal(err)
		}
		first := requests(method)
		_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: method, Url: url})
		sent := requests(method) - first
		if safe(method) && (err != nil || sent != 2) {
			t.Errorf("%s was sent %d times and got %v; want twice and an answer", method, sent, err)
		}
		if !safe(method) && (!errors.Is(err, provider.ErrCommunication) || !outcomeUnknown(err) || sent != 1) {
			t.Errorf("%s was sent %d times and got %v; want once, and an outcome that is unknown", method, sent, err)
		}
	}
}

// TestRequestsUnderWayAreBounded fills both limits.
func TestRequestsUnderWayAreBounded(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-release
	})
	p, set := local(t, map[string]string{"max_in_flight": "3", "max_in_flight_per_instance": "2"})
	call := func(instance string) error {
		_, err := p.Invoke(t.Context(), provider.Call{
			Instance: instance, Name: instance, Generation: 1, Operation: opRequest, Permissions: set,
			Payload: encode(t, &pb.HttpRequest{Method: "GET", Url: s.URL}),
		})
		return err
	}
	var wg sync.WaitGroup
	for _, instance := range []string{"a", "a", "b"} {
		wg.Go(func() {
			if err := call(instance); err != nil {
				t.Error(err)
			}
		})
		<-arrived
	}
	wantRefusal(t, call("a"), provider.ErrExhausted, "a has 2", "max_in_flight_per_instance")
	wantRefusal(t, call("b"), provider.ErrExhausted, "provider web has 3", "max_in_flight")
	close(release)
	wg.Wait()
	go func() { <-arrived }()
	if err := call("a"); err != nil {
		t.Errorf("when the others have ended: %v", err)
	}
}

// TestCloseWaits closes while a request is under way.
func TestCloseWaits(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) {
		close(arrived)
		<-release
	})
	p, set := local(t, nil)
	answered, closed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL})
		answered <- err
	}()
	<-arrived
	go func() { closed <- p.Close() }()
	for p.enter(&caller{name: "probe"}) == nil { // until it takes no calls
		p.leave(&caller{name: "probe"})
	}
	select {
	case err := <-closed:
		t.Fatalf("closed with a request under way: %v", err)
	default:
	}
	close(release)
	if err := errors.Join(<-answered, <-closed); err != nil {
		t.Error(err)
	}
}

func TestIdleConnectionsAreBounded(t *testing.T) {
	s, _ := serve(t, false, func(http.ResponseWriter, *http.Request) {})
	p, set := local(t, nil)
	for i := range maxIdle + 20 {
		_, err := p.Invoke(t.Context(), provider.Call{
			Instance: "i" + itoa(i), Name: "n", Generation: 1, Operation: opRequest, Permissions: set,
			Payload: encode(t, &pb.HttpRequest{Method: "GET", Url: s.URL}),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if n := len(p.pool.conns); n != maxIdle || p.pool.idle != maxIdle {
		t.Errorf("%d connections are kept, want %d", n, maxIdle)
	}
}

// TestABrokenAddressDoesNotHoldUpTheOthers has a first address that never answers and
// a second one that refuses.
func TestABrokenAddressDoesNotHoldUpTheOthers(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(echo))
	w.name("many.example", publicV6+" 93.184.216.35 "+publicV4)
	p := openWith(t, Options{Resolver: w, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		switch address {
		case net.JoinHostPort(publicV6, "80"):
			<-ctx.Done()
			return nil, ctx.Err()
		case "93.184.216.35:80":
			return nil, errors.New("refused")
		default:
			return w.dial(ctx, network, address)
		}
	}}, nil)
	resp, err := do(t.Context(), t, p, permissions(t, "http:request"), &pb.HttpRequest{TimeoutMs: 60_000, Url: "http://many.example/"})
	if err != nil || resp.GetStatus() != 418 {
		t.Errorf("%v, %v", resp.GetStatus(), err)
	}
	for _, c := range p.pool.conns[connKey{"hello-1", "http", "many.example:80"}] {
		if c.addr.String() != publicV4 {
			t.Errorf("connected to %s", c.addr)
		}
	}
}
