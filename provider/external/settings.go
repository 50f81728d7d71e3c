package external

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

const (
	defaultTimeout = 30 * time.Second
	maxTimeout     = 10 * time.Minute
)

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
	r := setting.New("external", "grpc", cfg.Settings)
	s := settings{address: r.Text("address"), timeout: r.Duration("timeout", defaultTimeout, time.Millisecond, maxTimeout)}
	secure, plain := r.TLS(""), r.Bool("insecure", false)
	if err := r.Done(); err != nil {
		return settings{}, err
	}
	near, ok := checkAddress(s.address)
	// The connection is protected by TLS, except on this machine where no setting
	// asks for it, or where that is said to be insecure.
	switch {
	case !ok:
		r.Wrong("address", s.address, "host:port, or unix:/path/of/a/socket")
	case plain && secure.Given():
		r.Wrong("insecure", r.Text("insecure"), "false, since settings of TLS are given")
	case plain || near && !secure.Given():
		s.credentials = insecure.NewCredentials()
	default:
		s.credentials = credentials.NewTLS(secure.Config())
	}
	return s, r.Done()
}

// checkAddress reports whether an address is one, and is on this machine.
func checkAddress(address string) (near, ok bool) {
	if path, unix := strings.CutPrefix(address, "unix:"); unix {
		return true, strings.Trim(path, "/") != ""
	}
	host, port, err := net.SplitHostPort(address)
	if number, bad := strconv.ParseUint(port, 10, 16); err != nil || host == "" || strings.ContainsAny(host, "/ ") || bad != nil || number == 0 {
		return false, false
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.IsLoopback(), true
	}
	return host == "localhost", true
}
