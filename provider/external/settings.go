package external

import (
	"crypto/tls"
	"crypto/x509"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	defaultTimeout = 30 * time.Second
	maxTimeout     = 10 * time.Minute
)

// known are the driver's settings.
var known = []string{"address", "timeout", "ca_file", "cert_file", "key_file", "server_name", "insecure"}

// settings say where a server is and how to talk to it.
type settings struct {
	address     string
	timeout     time.Duration
	credentials credentials.TransportCredentials
}

// parse reads a provider's settings. Its errors name the setting and what is expected.
func parse(cfg provider.Config) (settings, error) {
	if cfg.Driver != "" && cfg.Driver != "grpc" {
		return settings{}, provider.Errorf(provider.ErrInvalid, "external has no driver %q; expected grpc", cfg.Driver).With("driver", cfg.Driver)
	}
	for _, key := range slices.Sorted(maps.Keys(cfg.Settings)) {
		if !slices.Contains(known, key) {
			return settings{}, provider.Errorf(provider.ErrInvalid, "external driver grpc has no setting %s; expected %s", key, strings.Join(known, ", ")).
				With("setting", key)
		}
	}
	s := settings{address: cfg.Settings["address"], timeout: defaultTimeout}
	near, err := checkAddress(s.address)
	if err != nil {
		return settings{}, err
	}
	if text, ok := cfg.Settings["timeout"]; ok {
		if s.timeout, err = time.ParseDuration(text); err != nil || s.timeout < time.Millisecond || s.timeout > maxTimeout {
			return settings{}, wrong("timeout", text, "a duration from 1ms to 10m, such as 30s")
		}
	}
	s.credentials, err = transport(cfg.Settings, near)
	return s, err
}

func wrong(key, value, expected string) error {
	return provider.Errorf(provider.ErrInvalid, "setting %s of external driver grpc is %q; expected %s", key, value, expected).With("setting", key)
}

// checkAddress reports whether an address is on this machine.
func checkAddress(address string) (near bool, err error) {
	const expected = "host:port, or unix:/path/of/a/socket"
	if path, unix := strings.CutPrefix(address, "unix:"); unix {
		if strings.Trim(path, "/") == "" {
			return false, wrong("address", address, expected)
		}
		return true, nil
	}
	host, port, err := net.SplitHostPort(address)
	if number, bad := strconv.ParseUint(port, 10, 16); err != nil || host == "" || strings.ContainsAny(host, "/ ") || bad != nil || number == 0 {
		return false, wrong("address", address, expected)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.IsLoopback(), nil
	}
	return host == "localhost", nil
}

// transport chooses how the connection is protected: by TLS, except on this
// machine where no setting asks for it, or where that is said to be insecure.
func transport(given map[string]string, near bool) (credentials.TransportCredentials, error) {
	text, said := given["insecure"]
	plain, err := strconv.ParseBool(text)
	if said && err != nil {
		return nil, wrong("insecure", text, "true or false")
	}
	asked := given["ca_file"]+given["cert_file"]+given["key_file"]+given["server_name"] != ""
	switch {
	case plain && asked:
		return nil, wrong("insecure", text, "false, since settings of TLS are given")
	case plain || near && !asked:
		return insecure.NewCredentials(), nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: given["server_name"]}
	if file := given["ca_file"]; file != "" {
		pem, err := os.ReadFile(file) //nolint:gosec // the operator names it
		if err != nil {
			return nil, wrong("ca_file", file, "a file that can be read: "+err.Error())
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, wrong("ca_file", file, "a file with certificates in PEM")
		}
	}
	if (given["cert_file"] == "") != (given["key_file"] == "") {
		return nil, wrong("key_file", given["key_file"], "cert_file and key_file, or neither")
	}
	if file := given["cert_file"]; file != "" {
		pair, err := tls.LoadX509KeyPair(file, given["key_file"])
		if err != nil {
			return nil, wrong("cert_file", file, "a certificate and its key in PEM: "+err.Error())
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(cfg), nil
}
