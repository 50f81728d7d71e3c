package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// How long one address gets to answer when there are others to try, the most addresses
// of a name that are tried, and when the next one is tried as well.
const (
	connectAtMost  = 10 * time.Second
	connectAtLeast = 2 * time.Second
	maxAddresses   = 8
	headStart      = 300 * time.Millisecond
)

// maxAnswerHeader bounds the header of an answer in bytes.
const maxAnswerHeader = 64 << 10

// counted is a connection that counts what was written to it.
type counted struct {
	net.Conn
	written atomic.Int64
}

// Write counts before it writes: what is counted may have been sent, what is not
// was not.
func (c *counted) Write(b []byte) (int, error) {
	c.written.Add(int64(len(b)))
	return c.Conn.Write(b)
}

// route is the address that was checked, on its way to the dialer, and the
// connection that was made to it.
type route struct {
	to   netip.AddrPort
	conn *counted
}

type routeKey struct{}

// newTransport returns what makes connections. It dials nothing but the address
// that stands in the context, whatever the host is called.
func newTransport(dial DialFunc, s settings) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			r, ok := ctx.Value(routeKey{}).(*route)
			if !ok {
				return nil, errors.New("no address was checked for this connection")
			}
			c, err := dial(ctx, network, r.to.String())
			if err != nil {
				return nil, err
			}
			r.conn = &counted{Conn: c}
			return r.conn, nil
		},
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: s.roots},
		TLSHandshakeTimeout:    connectAtMost,
		MaxResponseHeaderBytes: maxAnswerHeader,
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
	}
}

// connect makes a new connection for a request. It resolves the host, checks every
// address and tries those that the caller may reach.
func (s *service) connect(ctx context.Context, who *caller, t *target) (*conn, error) {
	addresses, err := s.resolve(ctx, t)
	if err != nil {
		return nil, err
	}
	var refused error
	allowed := addresses[:0]
	for _, addr := range addresses {
		if err := who.mayConnect(t, addr); err == nil {
			allowed = append(allowed, addr.Unmap())
		} else if refused == nil {
			refused = err
		}
	}
	if len(allowed) == 0 {
		return nil, refused
	}
	c, err := s.dialAny(ctx, t, allowed[:min(len(allowed), maxAddresses)])
	if err != nil && ctx.Err() != nil {
		return nil, ended(ctx, t)
	}
	return c, err
}

// dialAny connects to one of several addresses. Each has a head start over the next
// one, so that a broken network of one family does not hold up the other
// (https://www.rfc-editor.org/rfc/rfc8305). It returns when every attempt has ended.
func (s *service) dialAny(ctx context.Context, t *target, addresses []netip.Addr) (*conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn *conn
		err  error
	}
	results := make(chan result)
	started, over := 0, 0
	next := time.NewTimer(headStart)
	defer next.Stop()
	start := func() {
		if started == len(addresses) || ctx.Err() != nil {
			return
		}
		addr, left := addresses[started], len(addresses)-started
		started++
		go func() {
			c, err := s.dial(ctx, t, addr, left)
			results <- result{c, err}
		}()
		next.Reset(headStart)
	}
	var won *conn
	var failed error
	for start(); over < started; {
		select {
		case <-next.C:
			start()
		case r := <-results:
			over++
			switch {
			case r.err == nil && won == nil:
				won = r.conn
				cancel()
			case r.err == nil:
				r.conn.shut()
			case failed == nil:
				failed = r.err
			}
			start()
		}
	}
	if won == nil {
		return nil, failed
	}
	return won, nil
}

func (s *service) resolve(ctx context.Context, t *target) ([]netip.Addr, error) {
	if t.addr.IsValid() {
		return []netip.Addr{t.addr}, nil
	}
	addresses, err := s.kind.resolver.LookupNetIP(ctx, "ip", question(t.host))
	switch {
	case ctx.Err() != nil:
		return nil, ended(ctx, t)
	case err == nil && len(addresses) > 0:
		return append([]netip.Addr(nil), addresses...), nil
	}
	reason := "it has no address"
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		reason = dns.Err
		if dns.IsNotFound {
			reason = "it does not exist"
		}
	} else if err != nil {
		reason = err.Error()
	}
	return nil, provider.Errorf(provider.ErrCommunication, "the host %s cannot be resolved: %s", t.host, reason).
		With("host", t.authority()).Because(err)
}

// question is what the resolver is asked for a host. The final dot keeps search
// lists out: the name that was allowed, no other. A name of one label is the node's
// to complete, and in its hosts file it stands without a dot.
func question(host string) string {
	if strings.Contains(host, ".") {
		return host + "."
	}
	return host
}

// dial connects to one address. It leaves time for the others that are left.
func (s *service) dial(ctx context.Context, t *target, addr netip.Addr, left int) (*conn, error) {
	limit := connectAtMost
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, max(connectAtLeast, time.Until(deadline)/time.Duration(left)))
	}
	r := &route{to: netip.AddrPortFrom(addr, t.port)}
	attempt, cancel := context.WithTimeout(context.WithValue(ctx, routeKey{}, r), limit)
	defer cancel()
	cc, err := s.transport.NewClientConn(attempt, t.scheme, t.authority())
	if err == nil {
		err = cc.Reserve()
		if err == nil {
			return &conn{cc: cc, raw: r.conn, addr: addr, shared: cc.Available() > 0, users: 1}, nil
		}
		_ = cc.Close() // it is broken already
	}
	e := provider.Errorf(provider.ErrCommunication, "no connection to %s at %s: %s", t.authority(), addr, reasonOf(err)).
		With("host", t.authority()).With("address", addr.String()).Because(err)
	if _, untrusted := errors.AsType[*tls.CertificateVerificationError](err); untrusted {
		e = e.NextStep("give provider %s the certificate of a private authority in its setting %s", s.id, setCA)
	}
	return nil, e
}

// reasonOf is what went wrong, without what the message around it says already.
func reasonOf(err error) string {
	if certificate, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "the certificate is not trusted: " + certificate.Err.Error()
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		err = op.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "it did not answer in time"
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "the connection was closed"
	}
	return err.Error()
}
