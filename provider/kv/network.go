package kv

import (
	"context"
	"crypto/tls"
	"errors"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// The bounds of the time settings of drivers that talk to a server.
const (
	minTimeout     = 10 * time.Millisecond
	maxTimeout     = time.Minute
	defaultTimeout = 2 * time.Second
	defaultDial    = time.Second
)

// detailOutcome and outcomeUnknown tell of a write that may have been carried out.
const (
	detailOutcome  = provider.DetailOutcome
	outcomeUnknown = provider.OutcomeUnknown
)

var namespacePattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)

// namespace takes what everything that the driver keeps on the server begins with.
func namespace(r *setting.Reader) string {
	return r.Match("namespace", "wasmatrix", namespacePattern, "1 to 32 letters, digits, hyphens and underscores")
}

// timeouts takes how long one request and one connection attempt may take.
func timeouts(r *setting.Reader) (request, dial time.Duration) {
	request = r.Duration("timeout", defaultTimeout, minTimeout, maxTimeout)
	return request, r.Duration("dial_timeout", defaultDial, minTimeout, maxTimeout)
}

// server is how a driver reaches its server.
type server struct {
	secure    bool
	addresses []string // host:port
	path      string   // of the URL, without its slash
	username  string
	password  func() (string, error) // read anew for each connection; nil for none
	tls       *tls.Config            // nil for a connection without TLS
}

// schemes are the two URL schemes of a driver, and its port.
type schemes struct{ plain, secure, port string }

// readServer takes the settings that say where the server is and how to get in.
func readServer(r *setting.Reader, o schemes) server {
	var srv server
	if raw := r.Text("url"); raw != "" {
		srv.location(r, raw, o)
	} else {
		r.Fail("url", "%s needs the setting url, for example %s://127.0.0.1:%s", r, o.plain, o.port)
	}
	srv.username, srv.password = r.Text("username"), r.Secret("password_file")
	secure := r.TLS("tls_")
	switch {
	case srv.secure:
		srv.tls = secure.Config()
	case secure.Given():
		r.Fail("url", "%s has TLS settings and a url without TLS; write %s:// instead of %s://", r, o.secure, o.plain)
	}
	return srv
}

// location reads a URL that may name several hosts. It never repeats it in an
// error, for it may hold a password by mistake.
func (s *server) location(r *setting.Reader, raw string, o schemes) {
	scheme, rest, found := strings.Cut(raw, "://")
	if !found || scheme != o.plain && scheme != o.secure {
		r.Fail("url", "setting url of %s must begin with %s:// or %s://", r, o.plain, o.secure)
		return
	}
	s.secure = scheme == o.secure
	if strings.Contains(rest, "@") {
		r.Refuse("url", provider.Errorf(provider.ErrInvalid,
			"setting url of %s holds a user name or a password; everybody who may see the provider sees it", r).
			NextStep("write them as username and password_file, a file on the provider's node; and change that password"))
		return
	}
	if strings.ContainsAny(rest, "?#") {
		r.Fail("url", "setting url of %s takes no options; they are settings of their own", r)
		return
	}
	rest, s.path, _ = strings.Cut(rest, "/")
	for address := range strings.SplitSeq(rest, ",") {
		u, err := url.Parse("x://" + address)
		if err != nil || u.Hostname() == "" {
			r.Fail("url", "setting url of %s names the host %q; expected host or host:port", r, address)
			return
		}
		if u.Port() == "" {
			address = strings.TrimSuffix(address, ":") + ":" + o.port
		}
		s.addresses = append(s.addresses, address)
	}
}

// ended returns the error of a request whose context has ended, or whose own time is up.
// sent tells whether the server may have got it.
func ended(ctx context.Context, address string, sent, writes bool) *provider.Error {
	var e *provider.Error
	if errors.Is(ctx.Err(), context.Canceled) {
		e = provider.Errorf(provider.ErrCommunication, "the call was cancelled by its caller")
	} else {
		e = provider.Errorf(provider.ErrTimeout, "%s did not answer in time", address)
	}
	return inDoubt(e.With("address", address), sent, writes)
}

// broken returns the error of a connection that broke, or could not be made.
func broken(address string, err error, sent, writes bool) *provider.Error {
	e := provider.Errorf(provider.ErrCommunication, "the connection to %s broke: %s", address, err)
	if !sent {
		e = provider.Errorf(provider.ErrCommunication, "%s cannot be reached: %s", address, err)
	}
	return inDoubt(e.With("address", address).Because(err), sent, writes)
}

// inDoubt marks the failure of a write that the server may have carried out.
func inDoubt(e *provider.Error, sent, writes bool) *provider.Error {
	if sent && writes {
		e.Message += "; the write may have been carried out"
		return e.With(detailOutcome, outcomeUnknown)
	}
	return e
}
