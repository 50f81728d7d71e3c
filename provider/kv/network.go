package kv

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
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

// duration takes a setting such as 500ms.
func (s *settings) duration(key string, otherwise time.Duration) time.Duration {
	v, ok := s.take(key)
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < minTimeout || d > maxTimeout {
		s.wrong(key, v, "a time from 10ms to 1m such as 500ms")
		return otherwise
	}
	return d
}

// number takes a setting that is a whole number.
func (s *settings) number(key string, otherwise, least, most int) int {
	v, ok := s.take(key)
	if !ok {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		s.wrong(key, v, "a number from "+strconv.Itoa(least)+" to "+strconv.Itoa(most))
		return otherwise
	}
	return n
}

// namespace takes what everything that the driver keeps on the server begins with.
func (s *settings) namespace() string {
	const most = 32
	v, ok := s.take("namespace")
	if !ok {
		return "wasmatrix"
	}
	valid := v != "" && len(v) <= most
	for _, c := range []byte(v) {
		valid = valid && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}
	if !valid {
		s.wrong("namespace", v, "1 to 32 letters, digits, hyphens and underscores")
		return "wasmatrix"
	}
	return v
}

// server is how a driver reaches its server.
type server struct {
	secure    bool
	addresses []string // host:port
	path      string   // of the URL, without its slash
	username  string
	password  func() (string, error) // read anew for each connection
	hasSecret bool
	tls       *tls.Config // nil for a connection without TLS
}

// schemes are the two URL schemes of a driver, and its port.
type schemes struct{ plain, secure, port string }

// server takes the settings that say where the server is and how to get in. The
// configuration of a provider is kept in the registry and shown to whoever may
// look, so secrets are in files of the node.
func (s *settings) server(o schemes) server {
	var srv server
	raw, given := s.take("url")
	srv.username, _ = s.take("username")
	file, withPassword := s.take("password_file")
	ca, _ := s.take("tls_ca_file")
	cert, _ := s.take("tls_cert_file")
	key, _ := s.take("tls_key_file")
	name, _ := s.take("tls_server_name")
	if !given {
		s.fail("url", "kv driver %s needs the setting url, for example %s://127.0.0.1:%s", s.driver, o.plain, o.port)
		return srv
	}
	s.location(raw, o, &srv)
	if withPassword {
		srv.hasSecret = true
		srv.password = func() (string, error) { return readSecret(file) }
		if _, err := srv.password(); err != nil {
			s.fail("password_file", "setting password_file of kv driver %s: %s", s.driver, err)
		}
	}
	if !srv.secure && (ca != "" || cert != "" || key != "" || name != "") {
		s.fail("url", "kv driver %s has TLS settings and a url without TLS; write %s:// instead of %s://", s.driver, o.secure, o.plain)
	}
	if srv.secure {
		srv.tls = s.tls(ca, cert, key, name)
	}
	return srv
}

// fail is for what is wrong with more than one value. What it says must not hold a secret.
func (s *settings) fail(key, format string, args ...any) {
	if s.err == nil {
		s.err = provider.Errorf(provider.ErrInvalid, format, args...).With("setting", key)
	}
}

// location reads a URL that may name several hosts. It never repeats it in an
// error, for it may hold a password by mistake.
func (s *settings) location(raw string, o schemes, srv *server) {
	scheme, rest, found := strings.Cut(raw, "://")
	if !found || scheme != o.plain && scheme != o.secure {
		s.fail("url", "setting url of kv driver %s must begin with %s:// or %s://", s.driver, o.plain, o.secure)
		return
	}
	srv.secure = scheme == o.secure
	if strings.Contains(rest, "@") {
		if s.err == nil {
			s.err = provider.Errorf(provider.ErrInvalid,
				"setting url of kv driver %s holds a user name or a password; everybody who may see the provider sees it", s.driver).
				With("setting", "url").
				NextStep("write them as username and password_file, a file on the provider's node; and change that password")
		}
		return
	}
	if strings.ContainsAny(rest, "?#") {
		s.fail("url", "setting url of kv driver %s takes no options; they are settings of their own", s.driver)
		return
	}
	rest, srv.path, _ = strings.Cut(rest, "/")
	for address := range strings.SplitSeq(rest, ",") {
		u, err := url.Parse("x://" + address)
		if err != nil || u.Hostname() == "" {
			s.fail("url", "setting url of kv driver %s names the host %q; expected host or host:port", s.driver, address)
			return
		}
		if u.Port() == "" {
			address = strings.TrimSuffix(address, ":") + ":" + o.port
		}
		srv.addresses = append(srv.addresses, address)
	}
}

// readSecret reads a file that holds one secret, and maybe a line break after it.
func readSecret(file string) (string, error) {
	b, err := os.ReadFile(file) //nolint:gosec // named by who configures the provider
	if err != nil {
		return "", err
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" {
		return "", errors.New("file " + file + " is empty")
	}
	return secret, nil
}

func (s *settings) tls(ca, cert, key, name string) *tls.Config {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: name}
	if ca != "" {
		pem, err := os.ReadFile(ca) //nolint:gosec // named by who configures the provider
		if err != nil {
			s.fail("tls_ca_file", "setting tls_ca_file of kv driver %s: %s", s.driver, err)
			return nil
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			s.fail("tls_ca_file", "setting tls_ca_file of kv driver %s: %s holds no certificate", s.driver, ca)
		}
	}
	if (cert == "") != (key == "") {
		s.fail("tls_cert_file", "kv driver %s needs both of tls_cert_file and tls_key_file, or neither", s.driver)
		return nil
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			s.fail("tls_cert_file", "settings tls_cert_file and tls_key_file of kv driver %s: %s", s.driver, err)
			return nil
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg
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
