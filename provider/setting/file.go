package setting

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"strings"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The configuration of a provider is kept in the registry and shown to whoever may
// look at it, so certificates, keys and secrets are in files of the provider's node.
// An empty name of a file counts as not given.

// File returns a setting that names a file which is there; "" when it is not given.
func (r *Reader) File(name string) string {
	file := r.Text(name)
	if file == "" {
		return ""
	}
	if _, err := os.Stat(file); err != nil {
		r.unusable(name, file, err)
		return ""
	}
	return file
}

// Secret takes a setting that names a file which holds one secret, and maybe a line
// break after it. It returns nil when the setting is not given; else a function that
// reads the secret anew, so that it can be changed while the provider runs. A file
// that cannot be read now, or is empty, is refused at once.
func (r *Reader) Secret(name string) func() (string, error) {
	file := r.Text(name)
	if file == "" {
		return nil
	}
	read := func() (string, error) { return readSecret(file) }
	if _, err := read(); err != nil {
		r.unusable(name, file, err)
	}
	return read
}

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

// AddCertificates adds the certificates of a setting that names a PEM file to pool.
// It does nothing when the setting is not given.
func (r *Reader) AddCertificates(name string, pool *x509.CertPool) {
	file := r.Text(name)
	if file == "" {
		return
	}
	pem, err := os.ReadFile(file) //nolint:gosec // named by who configures the provider
	switch {
	case err != nil:
		r.unusable(name, file, err)
	case !pool.AppendCertsFromPEM(pem):
		r.unusable(name, file, errors.New(file+" holds no certificate in PEM form"))
	}
}

func (r *Reader) unusable(name, file string, why error) {
	r.Refuse(name, provider.Errorf(provider.ErrInvalid, "setting %s of %s: %s", name, r, why).With("file", file).
		NextStep("check the file on the provider's node").Because(why))
}

// TLS are the settings of the client's side of a TLS connection, with a prefix before
// their names: ca_file, cert_file, key_file and server_name.
type TLS struct {
	reader                *Reader
	ca, cert, key, server string // the names
}

// TLS takes the settings of TLS. None of them is read before Config is called.
func (r *Reader) TLS(prefix string) TLS {
	t := TLS{reader: r, ca: prefix + "ca_file", cert: prefix + "cert_file", key: prefix + "key_file", server: prefix + "server_name"}
	for _, name := range []string{t.ca, t.cert, t.key, t.server} {
		r.Text(name)
	}
	return t
}

// Given reports whether any of the settings is given and not empty.
func (t TLS) Given() bool {
	r := t.reader
	return r.Text(t.ca)+r.Text(t.cert)+r.Text(t.key)+r.Text(t.server) != ""
}

// Config reads the files and returns the configuration of a connection over TLS 1.2
// or later. Without ca_file it trusts the system's authorities. What is wrong with
// the files is an error of the Reader.
func (t TLS) Config() *tls.Config {
	r := t.reader
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: r.Text(t.server)}
	if r.Text(t.ca) != "" {
		cfg.RootCAs = x509.NewCertPool()
		r.AddCertificates(t.ca, cfg.RootCAs)
	}
	r.Both(t.cert, t.key)
	if r.Text(t.cert) == "" || r.Text(t.key) == "" {
		return cfg
	}
	pair, err := tls.LoadX509KeyPair(r.Text(t.cert), r.Text(t.key))
	if err != nil {
		r.Refuse(t.cert, provider.Errorf(provider.ErrInvalid, "settings %s and %s of %s: %s", t.cert, t.key, r, err).
			NextStep("check the files on the provider's node").Because(err))
		return cfg
	}
	cfg.Certificates = []tls.Certificate{pair}
	return cfg
}
