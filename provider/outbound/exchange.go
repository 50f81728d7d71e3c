package outbound

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// drainAtMost is how much of a redirect's body is read to keep its connection.
const drainAtMost = 2 << 10

// exchange is one call: a request, those that redirects make of it, and the answer.
type exchange struct {
	s      *service
	call   *provider.Call
	who    *caller
	method string
	header http.Header // shared with what is being written: replaced, never changed
	body   []byte
	to     *target
	limit  int64
	effect bool // a request with an effect may have been carried out
}

func newExchange(s *service, call *provider.Call, who *caller, r *request, to *target) *exchange {
	x := &exchange{
		s: s, call: call, who: who, method: r.method, header: headerOf(r.fields), to: to, limit: s.settings.maxResponse,
		body: slices.Clone(r.body), // it may still be written when the call has ended
	}
	if r.maxResponse > 0 {
		x.limit = min(x.limit, int64(min(r.maxResponse, MaxResponse))) //nolint:gosec // bounded
	}
	return x
}

// run carries the request out and follows redirects.
func (x *exchange) run(ctx context.Context, follow bool) (*pb.HttpResponse, error) {
	for hop := 0; ; hop++ {
		resp, c, err := x.send(ctx)
		if err != nil {
			return nil, err
		}
		location := ""
		if follow {
			location = redirectOf(resp)
		}
		if location == "" {
			return x.read(ctx, resp, c)
		}
		x.s.drain(resp, c)
		if hop == MaxRedirects {
			return nil, provider.Errorf(provider.ErrExhausted, "the request was redirected more than %d times", MaxRedirects).
				With("host", x.to.authority()).With("redirects", strconv.Itoa(hop))
		}
		if err := x.redirect(resp.StatusCode, location); err != nil {
			return nil, err
		}
	}
}

// redirectOf returns where an answer sends the request, or "".
func redirectOf(resp *http.Response) string {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return resp.Header.Get("Location")
	default:
		return ""
	}
}

// redirect makes the next request of a redirect, and decides on it like on a first one.
func (x *exchange) redirect(status int, location string) error {
	to, err := x.resolveLocation(location)
	if err != nil {
		return provider.Errorf(provider.ErrDenied, "%s redirects to where no request may go: %s", x.to.authority(), err).
			With("host", x.to.authority()).With("status", strconv.Itoa(status)).NextStep("set no_redirects to get the redirect itself")
	}
	if err := x.who.mayRequest(to); err != nil {
		if e, own := errors.AsType[*provider.Error](err); own {
			e.Message = x.to.authority() + " redirects to another host: " + e.Message
		}
		return err
	}
	header := x.header.Clone()
	keeps := status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
	if !keeps && x.method != http.MethodGet && x.method != http.MethodHead {
		x.method = http.MethodGet
	}
	if !keeps {
		x.body = nil
		withoutBody(header)
	}
	if !to.sameOrigin(x.to) {
		toOtherOrigin(header)
	}
	x.header, x.to = header, to
	return nil
}

func (x *exchange) resolveLocation(location string) (*target, error) {
	// Before it is made absolute: what is odd here must not become plain there.
	if reason := checkBytes(location); reason != "" {
		return nil, invalidURL(reason)
	}
	u, err := x.to.url.Parse(location)
	if err != nil {
		return nil, invalidURL("its Location is not valid")
	}
	return parseTarget(u.String())
}

// send writes the request and returns the answer with its body unread. A second
// attempt is made when a kept connection turns out to be dead and nothing can have
// happened twice.
func (x *exchange) send(ctx context.Context) (*http.Response, *conn, error) {
	for attempt := 0; ; attempt++ {
		c, reused, err := x.connection(ctx, attempt > 0)
		if err != nil {
			return nil, nil, err
		}
		if err := x.s.admit(x.call); err != nil {
			c.cc.Release()
			x.s.pool.put(c, true)
			return nil, nil, err
		}
		before := c.raw.written.Load()
		resp, err := c.cc.RoundTrip(x.request(ctx))
		if err == nil {
			x.effect = x.effect || !safe(x.method)
			return resp, c, nil
		}
		untouched := !c.shared && c.raw.written.Load() == before
		x.s.pool.put(c, false)
		again := reused && ctx.Err() == nil
		if again && (untouched || safe(x.method)) {
			continue
		}
		x.effect = x.effect || !safe(x.method) && !untouched
		return nil, nil, x.failed(ctx, err)
	}
}

func (x *exchange) request(ctx context.Context) *http.Request {
	r := &http.Request{
		Method: x.method, URL: x.to.url, Host: x.to.url.Host, Header: x.header, Body: http.NoBody,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if len(x.body) > 0 {
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(x.body)), int64(len(x.body))
	}
	return r.WithContext(ctx)
}

// connection returns a connection that the caller may use now, and whether it was
// used before.
func (x *exchange) connection(ctx context.Context, onlyNew bool) (c *conn, reused bool, err error) {
	key := connKey{x.who.key(), x.to.scheme, x.to.authority()}
	if !onlyNew {
		idle := idleFor
		if !safe(x.method) {
			idle = freshFor
		}
		if c := x.s.pool.take(key, idle, func(a netip.Addr) bool { return x.who.mayConnect(x.to, a) == nil }); c != nil {
			return c, true, nil
		}
	}
	if c, err = x.s.connect(ctx, x.who, x.to); err != nil {
		return nil, false, err
	}
	x.s.pool.add(key, c)
	return c, false, nil
}

// read returns the answer, whose body must be within the limit.
func (x *exchange) read(ctx context.Context, resp *http.Response, c *conn) (*pb.HttpResponse, error) {
	body, err := x.readBody(ctx, resp)
	_ = resp.Body.Close() // what it could say, reading said
	x.s.pool.put(c, err == nil)
	if err != nil {
		return nil, err
	}
	return &pb.HttpResponse{
		Status: uint32(resp.StatusCode), //nolint:gosec // three digits
		Url:    x.to.url.String(), Headers: answerFields(resp.Header), Body: body,
	}, nil
}

func (x *exchange) readBody(ctx context.Context, resp *http.Response) ([]byte, error) {
	if resp.StatusCode < 200 {
		return nil, x.failed(ctx, errors.New("the server changed to another protocol"))
	}
	if x.method != http.MethodHead && resp.ContentLength > x.limit {
		return nil, x.tooLarge(resp)
	}
	var buf bytes.Buffer
	if resp.ContentLength > 0 && x.method != http.MethodHead {
		buf.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	n, err := io.Copy(&buf, io.LimitReader(resp.Body, x.limit+1))
	switch {
	case err != nil:
		e := x.failed(ctx, err)
		e.Message = "the answer ended early: " + e.Message
		return nil, e.With("status", strconv.Itoa(resp.StatusCode))
	case n > x.limit:
		return nil, x.tooLarge(resp)
	default:
		return buf.Bytes(), nil
	}
}

func (x *exchange) tooLarge(resp *http.Response) error {
	return provider.Errorf(provider.ErrExhausted, "the answer's body has more than %d bytes, which is the limit", x.limit).
		With("host", x.to.authority()).With("status", strconv.Itoa(resp.StatusCode)).With("limit", strconv.FormatInt(x.limit, 10)).
		NextStep("ask for less, or raise max_response_bytes of the request and of provider %s up to 8MiB", x.s.id)
}

// drain gives an answer's connection back if little is left to read.
func (s *service) drain(resp *http.Response, c *conn) {
	n, err := io.Copy(io.Discard, io.LimitReader(resp.Body, drainAtMost+1))
	_ = resp.Body.Close() // the answer is not wanted
	s.pool.put(c, err == nil && n <= drainAtMost && resp.StatusCode >= 200)
}

// failed is the error of a request that got no full answer.
func (x *exchange) failed(ctx context.Context, err error) *provider.Error {
	if ctx.Err() != nil {
		return ended(ctx, x.to)
	}
	return provider.Errorf(provider.ErrCommunication, "%s of %s got no answer: %s", x.method, x.to.authority(), reasonOf(err)).
		With("host", x.to.authority()).Because(err)
}

// complete adds whether the request may have been carried out.
func (x *exchange) complete(err error) error {
	if e, own := errors.AsType[*provider.Error](err); own && x.effect {
		return e.With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
	return err
}

// ended is the error of an exchange whose context has ended.
func ended(ctx context.Context, t *target) *provider.Error {
	kind, what := provider.ErrCommunication, "the call was cancelled by its caller"
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kind, what = provider.ErrTimeout, "it took longer than the call may take"
	}
	return provider.Errorf(kind, "the request to %s was given up: %s", t.authority(), what).
		With("host", t.authority()).Because(ctx.Err())
}
