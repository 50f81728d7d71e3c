package outbound

import (
	"context"
	"crypto/x509"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// Resolver finds the addresses of a name. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP returns the addresses of a host. One of several labels ends in a
	// dot, so that no search list applies. The network is always "ip".
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// DialFunc connects to an address, which is always an IP address and a port.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// Options are what a Kind needs of its surroundings.
type Options struct {
	// Resolver finds addresses; nil means the system's DNS and hosts file.
	Resolver Resolver
	// Dial connects; nil means TCP.
	Dial DialFunc
}

// Kind is the capability of outbound HTTP. It implements provider.Kind.
type Kind struct {
	resolver Resolver
	dial     DialFunc
}

// New returns the capability of outbound HTTP.
func New(o Options) *Kind {
	k := &Kind{resolver: o.Resolver, dial: o.Dial}
	if k.resolver == nil {
		k.resolver = &net.Resolver{PreferGo: true}
	}
	if k.dial == nil {
		k.dial = (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext
	}
	return k
}

// Type returns "http".
func (k *Kind) Type() string { return permission.HTTP }

// Demand returns the need of http:request of the URL's host and port, in their one
// spelling.
func (k *Kind) Demand(operation string, payload []byte) (provider.Demand, error) {
	r, err := decode(operation, payload)
	if err != nil {
		return provider.Demand{}, err
	}
	t, err := r.check()
	if err != nil {
		return provider.Demand{}, err
	}
	return provider.Demand{Provider: r.provider, Need: t.need}, nil
}

// Overlapping reports true: nothing is kept on the node.
func (k *Kind) Overlapping(_, _ provider.Config) bool { return true }

// Open opens a provider. It fails with ErrInvalid for a wrong driver or setting.
// It connects to nothing.
func (k *Kind) Open(_ context.Context, cfg provider.Config) (provider.Provider, error) {
	if cfg.Driver != "" && cfg.Driver != "direct" {
		return nil, provider.Errorf(provider.ErrInvalid, "http has no driver %q; expected direct", cfg.Driver).With("driver", cfg.Driver)
	}
	s, err := readSettings(cfg.Settings)
	if err != nil {
		return nil, err
	}
	return newService(cfg.ID, k, s), nil
}

// settings are those of the driver.
type settings struct {
	maxResponse int64
	maxInFlight int
	maxEach     int
	roots       *x509.CertPool // nil means the system's
}

// The names of the settings.
const (
	setMaxResponse = "max_response_bytes"
	setMaxInFlight = "max_in_flight"
	setMaxEach     = "max_in_flight_per_instance"
	setCA          = "ca_file"
)

func readSettings(given map[string]string) (settings, error) {
	s := settings{maxResponse: 4 << 20, maxInFlight: 256, maxEach: 64}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		value := given[name]
		var ok bool
		expected := ""
		switch name {
		case setMaxResponse:
			s.maxResponse, ok = size(value)
			ok, expected = ok && s.maxResponse <= MaxResponse, "a size from 1KiB to 8MiB"
		case setMaxInFlight:
			s.maxInFlight, ok = count(value)
			expected = "a number from 1 to 10000"
		case setMaxEach:
			s.maxEach, ok = count(value)
			expected = "a number from 1 to 10000"
		case setCA:
			roots, err := readRoots(value)
			if err != nil {
				return settings{}, err
			}
			s.roots, ok = roots, true
		default:
			return settings{}, provider.Errorf(provider.ErrInvalid, "http driver direct has no setting %s; expected %s",
				name, strings.Join([]string{setCA, setMaxInFlight, setMaxEach, setMaxResponse}, ", ")).With("setting", name)
		}
		if !ok {
			return settings{}, provider.Errorf(provider.ErrInvalid, "setting %s of http driver direct is %q; expected %s", name, value, expected).
				With("setting", name)
		}
	}
	return s, nil
}

func size(text string) (int64, bool) {
	unit := int64(1)
	for suffix, u := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20} {
		if rest, found := strings.CutSuffix(text, suffix); found {
			text, unit = rest, u
		}
	}
	n, err := strconv.ParseInt(text, 10, 32)
	return n * unit, err == nil && n > 0 && n*unit >= 1<<10
}

func count(text string) (int, bool) {
	n, err := strconv.Atoi(text)
	return n, err == nil && n >= 1 && n <= 10000
}

// readRoots returns the system's certificate authorities and those of a file.
func readRoots(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, provider.Errorf(provider.ErrInvalid, "setting %s cannot be read: %s", setCA, err).
			With("setting", setCA).With("file", path).Because(err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, provider.Errorf(provider.ErrInvalid, "setting %s: %s holds no certificate in PEM form", setCA, path).
			With("setting", setCA).With("file", path)
	}
	return roots, nil
}
