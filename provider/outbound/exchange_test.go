package outbound

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// echo answers with what it was sent.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("X-Method", r.Method)
	w.Header().Set("X-Proto", r.Proto)
	w.Header().Set("X-Host", r.Host)
	w.Header().Set("X-Agent", r.UserAgent())
	w.Header().Set("X-Custom", strings.Join(r.Header.Values("X-Custom"), "|"))
	w.Header().Set("X-Latin", "caf\xe9")
	w.WriteHeader(http.StatusTeapot)
	_, _ = w.Write(body)
}

// serve starts a server over HTTP/1.1, or HTTP/2 with TLS.
func serve(t testing.TB, h2 bool, handler http.HandlerFunc) (*httptest.Server, map[string]string) {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = nil
	if !h2 {
		s.Start()
		t.Cleanup(s.Close)
		return s, nil
	}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, map[string]string{"ca_file": caFile(t, s)}
}

// overBoth runs a test over HTTP/1.1 and over HTTP/2 with TLS.
func overBoth(t *testing.T, handler http.HandlerFunc, test func(t *testing.T, url string, p *service, set permission.Set)) {
	t.Helper()
	for name, h2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s, settings := serve(t, h2, handler)
			p, set := local(t, settings)
			test(t, s.URL, p, set)
		})
	}
}

func TestEveryMethod(t *testing.T) {
	overBoth(t, echo, func(t *testing.T, url string, p *service, set permission.Set) {
		for _, method := range methods {
			body := bytes.Repeat([]byte{0, 1, 0xff}, 50_000)
			resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{
				Method: method, Url: url + "/a?b=c", Body: body,
				Headers: []*pb.HttpHeader{{Name: "x-custom", Value: "1"}, {Name: "X-Custom", Value: "2"}},
			})
			if err != nil {
				t.Errorf("%s: %v", method, err)
				continue
			}
			if method == "HEAD" {
				body = nil
			}
			proto := map[bool]string{true: "HTTP/2.0", false: "HTTP/1.1"}[strings.HasPrefix(url, "https")]
			for name, want := range map[string]string{
				"X-Method": method, "X-Proto": proto, "X-Custom": "1|2", "X-Agent": "wasmatrix", "X-Latin": "café",
				"X-Host": strings.TrimPrefix(strings.TrimPrefix(url, "https://"), "http://"), "Connection": "",
			} {
				if got := header(resp, name); got != want {
					t.Errorf("%s: %s is %q, want %q", method, name, got, want)
				}
			}
			if resp.GetStatus() != 418 || !bytes.Equal(resp.GetBody(), body) || resp.GetUrl() != url+"/a?b=c" {
				t.Errorf("%s: %d, %d bytes, %s", method, resp.GetStatus(), len(resp.GetBody()), resp.GetUrl())
			}
		}
		resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url, Headers: []*pb.HttpHeader{{Name: "user-agent", Value: "mine"}}})
		if err != nil || header(resp, "X-Agent") != "mine" {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

func TestAnswersWithoutBody(t *testing.T) {
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			w.Header().Set("Content-Length", "99999999")
			return
		}
		w.WriteHeader(map[string]int{"/204": 204, "/304": 304, "/404": 404, "/503": 503}[r.URL.Path])
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		for _, status := range []uint32{204, 304, 404, 503} {
			resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: fmt.Sprintf("%s/%d", url, status)})
			if err != nil || resp.GetStatus() != status || len(resp.GetBody()) != 0 {
				t.Errorf("%d: %v, %v", status, resp, err)
			}
		}
		resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: "HEAD", Url: url})
		if err != nil || resp.GetStatus() != 200 || header(resp, "Content-Length") != "99999999" {
			t.Errorf("HEAD: %v, %v", resp, err)
		}
	})
}

// bomb is 256 MiB of zeros in 256 KiB.
func bomb() []byte { return bytes.Repeat(gzipped(make([]byte, 1<<20)), 256) }

func flush(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() }

func gzipped(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, _ = w.Write(b)
	_ = w.Close()
	return buf.Bytes()
}

// TestLimitsHoldAfterDecompression asks for bodies around the limit, plain, chunked
// and compressed, and for a bomb.
func TestLimitsHoldAfterDecompression(t *testing.T) {
	zeros := make([]byte, 4<<20+1)
	answers := map[string][]byte{
		"/at": zeros[:4<<20], "/over": zeros, "/small": zeros[:100],
	}
	compressed := map[string][]byte{"bomb": bomb()}
	for path, body := range answers {
		compressed[path[1:]] = gzipped(body)
	}
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		path, how, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		body := answers["/"+path]
		switch how {
		case "gzip":
			w.Header().Set("Content-Encoding", "gzip")
			body = compressed[path]
		case "chunked":
			flush(w)
		case "broken":
			w.Header().Set("Content-Encoding", "gzip")
		}
		_, _ = w.Write(body)
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		for _, how := range []string{"plain", "chunked", "gzip"} {
			resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/at/" + how})
			if err != nil || len(resp.GetBody()) != 4<<20 || header(resp, "Content-Encoding") != "" {
				t.Errorf("%s at the limit: %d bytes, %v", how, len(resp.GetBody()), err)
			}
			_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/over/" + how})
			wantRefusal(t, err, provider.ErrExhausted, "4194304", "max_response_bytes")
			_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/small/" + how, MaxResponseBytes: 99})
			wantRefusal(t, err, provider.ErrExhausted, "99", "max_response_bytes")
			if resp, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/small/" + how, MaxResponseBytes: 1 << 40}); err != nil {
				t.Errorf("%s: %v, %v", how, resp, err)
			}
		}
		_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/bomb/gzip"})
		wantRefusal(t, err, provider.ErrExhausted, "4194304", "")
		_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/small/broken"})
		wantRefusal(t, err, provider.ErrCommunication, "ended early", "")
		resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{
			Url: url + "/at/gzip", Headers: []*pb.HttpHeader{{Name: "Accept-Encoding", Value: "gzip"}},
		})
		if err != nil || header(resp, "Content-Encoding") != "gzip" || len(resp.GetBody()) > 100_000 {
			t.Errorf("a guest that decompresses itself: %d bytes, %v", len(resp.GetBody()), err)
		}
	})
}

func TestALargeHeaderIsRefused(t *testing.T) {
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		for i := range 40 {
			w.Header().Set("X-"+itoa(i), strings.Repeat("x", 4<<10))
		}
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		if _, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url}); !errors.Is(err, provider.ErrCommunication) {
			t.Errorf("%v", err)
		}
	})
}

// TestRedirectsMeanWhatTheyMeanToNetHTTP compares method and body at the end of a
// redirect with those of http.Client.
func TestRedirectsMeanWhatTheyMeanToNetHTTP(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		if status, ok := map[string]int{"/301": 301, "/302": 302, "/303": 303, "/307": 307, "/308": 308, "/300": 300, "/304": 304}[r.URL.Path]; ok {
			w.Header().Set("Location", "../end?x=1#fragment")
			w.WriteHeader(status)
			return
		}
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Seen", fmt.Sprintf("%s %s %s type=%s auth=%s", r.Method, r.URL, body, r.Header.Get("Content-Type"), r.Header.Get("Authorization")))
	}
	overBoth(t, handler, func(t *testing.T, url string, p *service, set permission.Set) {
		s := httptest.NewServer(http.HandlerFunc(handler))
		defer s.Close()
		for _, status := range []string{"300", "301", "302", "303", "304", "307", "308"} {
			for _, method := range methods {
				req, err := http.NewRequestWithContext(t.Context(), method, s.URL+"/"+status, strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Content-Type", "text/x")
				req.Header.Set("Authorization", "secret")
				want, err := s.Client().Do(req)
				if err != nil {
					t.Fatal(err)
				}
				_ = want.Body.Close()
				got, err := do(t.Context(), t, p, set, &pb.HttpRequest{
					Method: method, Url: url + "/" + status, Body: []byte("body"),
					Headers: []*pb.HttpHeader{{Name: "Content-Type", Value: "text/x"}, {Name: "Authorization", Value: "secret"}},
				})
				if err != nil || int(got.GetStatus()) != want.StatusCode || header(got, "X-Seen") != want.Header.Get("X-Seen") {
					t.Errorf("%s %s: %d %q, %v; net/http has %d %q", method, status, got.GetStatus(), header(got, "X-Seen"), err,
						want.StatusCode, want.Header.Get("X-Seen"))
				}
				if err == nil && got.GetStatus() == 200 && got.GetUrl() != url+"/end?x=1" {
					t.Errorf("%s %s: the URL is %s", method, status, got.GetUrl())
				}
			}
		}
		got, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: url + "/302", NoRedirects: true})
		if err != nil || got.GetStatus() != 302 || header(got, "Location") == "" {
			t.Errorf("no_redirects: %v, %v", got, err)
		}
	})
}

func TestCredentialsStayWithTheirOrigin(t *testing.T) {
	var seen http.Header
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen = r.Header.Clone() }))
	defer other.Close()
	first := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	}))
	defer first.Close()
	p, set := local(t, nil)
	secrets := []string{"Authorization", "Cookie", "X-Api-Key", "X-Vault-Token", "Private-Token", "X-Custom"}
	r := &pb.HttpRequest{
		Method: "POST", Url: first.URL, Body: []byte("body"),
		Headers: []*pb.HttpHeader{{Name: "accept", Value: "text/x"}, {Name: "Content-Type", Value: "text/y"}},
	}
	for _, name := range secrets {
		r.Headers = append(r.Headers, &pb.HttpHeader{Name: name, Value: "secret"})
	}
	if _, err := do(t.Context(), t, p, set, r); err != nil {
		t.Fatal(err)
	}
	for _, name := range secrets {
		if seen.Get(name) != "" {
			t.Errorf("%s went to another origin", name)
		}
	}
	if seen.Get("Accept") != "text/x" || seen.Get("Content-Type") != "text/y" || seen.Get("User-Agent") != "wasmatrix" || seen.Get("Referer") != "" {
		t.Errorf("the other origin saw %v", seen)
	}
}

func TestRedirectsEnd(t *testing.T) {
	hops := 0
	s, _ := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		hops++
		if r.URL.Path == "/5" {
			return
		}
		n := 0
		_, _ = fmt.Sscanf(r.URL.Path, "/%d", &n)
		http.Redirect(w, r, fmt.Sprintf("/%d", n+1), http.StatusFound)
	})
	p, set := local(t, nil)
	if resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL + "/0"}); err != nil || resp.GetUrl() != s.URL+"/5" {
		t.Errorf("five redirects: %v, %v", resp, err)
	}
	hops = 0
	_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL + "/6"})
	wantRefusal(t, err, provider.ErrExhausted, "more than 5", "")
	if hops != 6 {
		t.Errorf("%d requests, want 6", hops)
	}
}

// TestARedirectIsDecidedOnLikeAFirstRequest shows the refusal and its next step.
func TestARedirectIsDecidedOnLikeAFirstRequest(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		http.Redirect(rw, r, "http://elsewhere.example/", http.StatusSeeOther)
	}))
	w.name("allowed.example", publicV4)
	w.name("elsewhere.example", publicV4)
	p := w.open(nil)
	set := permissions(t, "http:request", "http:domain:allowed.example")
	_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: "POST", Url: "http://allowed.example/"})
	wantRefusal(t, err, provider.ErrDenied, "allowed.example:80 redirects to another host",
		"wasmatrix grant hello http:domain:elsewhere.example:80 --provider web")
	if !outcomeUnknown(err) {
		t.Error("the POST was carried out and the error does not say that it may have been")
	}
}

// TestSlowServersEndByTheDeadline has servers that answer never, byte by byte, or
// stop in the middle.
func TestSlowServersEndByTheDeadline(t *testing.T) {
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			_, _ = w.Write([]byte("some"))
			flush(w)
		}
		<-r.Context().Done()
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		for _, path := range []string{"/header", "/body"} {
			for _, method := range []string{"GET", "POST"} {
				_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: method, Url: url + path, TimeoutMs: 80})
				if !errors.Is(err, provider.ErrTimeout) || outcomeUnknown(err) != (method == "POST") {
					t.Errorf("%s %s: %v", method, path, err)
				}
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 80*time.Millisecond)
		defer cancel()
		if _, err := do(ctx, t, p, set, &pb.HttpRequest{Url: url + "/header"}); !errors.Is(err, provider.ErrTimeout) {
			t.Errorf("the caller's deadline: %v", err)
		}
	})
}

func TestDrippingHeadersEndByTheDeadline(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for tick := time.NewTicker(5 * time.Millisecond); ; <-tick.C {
			if _, err := c.Write([]byte("H")); err != nil {
				return
			}
		}
	})
	p, set := local(t, nil)
	_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: "http://" + l.Addr().String(), TimeoutMs: 100})
	if !errors.Is(err, provider.ErrTimeout) && !errors.Is(err, provider.ErrCommunication) {
		t.Errorf("%v", err)
	}
	_ = l.Close()
	wg.Wait()
}

func TestACancelledCallEnds(t *testing.T) {
	arrived := make(chan struct{}, 8)
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			_, err := do(ctx, t, p, set, &pb.HttpRequest{Method: "PUT", Url: url})
			done <- err
		}()
		<-arrived
		cancel()
		if err := <-done; !errors.Is(err, provider.ErrCommunication) || !errors.Is(err, context.Canceled) || !outcomeUnknown(err) {
			t.Errorf("%v", err)
		}
	})
}

func TestAServerThatDiesInTheMiddle(t *testing.T) {
	overBoth(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write([]byte("some"))
			flush(w)
		}
		panic(http.ErrAbortHandler)
	}, func(t *testing.T, url string, p *service, set permission.Set) {
		for _, path := range []string{"/header", "/body"} {
			for _, method := range methods {
				if method == "HEAD" {
					continue
				}
				_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: method, Url: url + path, Body: []byte("x")})
				if !errors.Is(err, provider.ErrCommunication) || outcomeUnknown(err) == safe(method) {
					t.Errorf("%s %s: %v", method, path, err)
				}
			}
		}
	})
}

func TestNobodyThere(t *testing.T) {
	w := newWorld(t, http.NotFoundHandler())
	gone := httptest.NewServer(http.NotFoundHandler())
	url := gone.URL
	gone.Close()
	p, set := local(t, nil)
	_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: "POST", Url: url})
	wantRefusal(t, err, provider.ErrCommunication, "connection refused", "")
	if outcomeUnknown(err) {
		t.Error("nothing was sent, and the outcome is said to be unknown")
	}
	_, err = do(t.Context(), t, w.open(nil), permissions(t, "http:request"), &pb.HttpRequest{Method: "POST", Url: "http://gone.example"})
	wantRefusal(t, err, provider.ErrCommunication, "gone.example cannot be resolved: it does not exist", "")
	if outcomeUnknown(err) {
		t.Error("nothing was sent, and the outcome is said to be unknown")
	}
}

func TestCertificatesAreVerified(t *testing.T) {
	s, _ := serve(t, true, echo)
	p, set := local(t, nil)
	_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL})
	wantRefusal(t, err, provider.ErrCommunication, "certificate is not trusted", "ca_file")
	p, _ = local(t, map[string]string{"ca_file": caFile(t, s)})
	set = permissions(t, "http:request", "http:domain:127.0.0.1", "http:domain:localhost")
	_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: "https://localhost:" + portOf(t, s)})
	wantRefusal(t, err, provider.ErrCommunication, "certificate is not trusted", "ca_file") // it is for example.com
	if p.transport.TLSClientConfig.MinVersion != 0x0303 || p.transport.Proxy != nil {
		t.Error("TLS before 1.2 or a proxy is allowed")
	}
}

func TestTwoHundredAtOnce(t *testing.T) {
	overBoth(t, echo, func(t *testing.T, url string, _ *service, set permission.Set) {
		settings := map[string]string{"max_in_flight_per_instance": "200"}
		if strings.HasPrefix(url, "https") {
			s, own := serve(t, true, echo)
			url, settings["ca_file"] = s.URL, own["ca_file"]
		}
		p, _ := local(t, settings)
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				body := bytes.Repeat([]byte{byte(i)}, i*10)
				for range 3 {
					resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: "POST", Url: url, Body: body})
					if err != nil || !bytes.Equal(resp.GetBody(), body) {
						t.Errorf("call %d: %d bytes, %v", i, len(resp.GetBody()), err)
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestNothingIsLeftBehind(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, h2 := range []bool{false, true} {
		s := httptest.NewUnstartedServer(http.HandlerFunc(echo))
		settings := map[string]string{}
		if s.EnableHTTP2 = h2; h2 {
			s.StartTLS()
			settings["ca_file"] = caFile(t, s)
		} else {
			s.Start()
		}
		p, err := newKind(t, Options{}).Open(t.Context(), provider.Config{ID: "web", Settings: settings})
		if err != nil {
			t.Fatal(err)
		}
		set := permissions(t, "http:request", "http:domain:127.0.0.1")
		for range 3 {
			if _, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL}); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(p.Close(), p.Close()); err != nil {
			t.Error(err)
		}
		_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: s.URL})
		wantRefusal(t, err, provider.ErrUnavailable, "web", "")
		s.Close()
	}
}
