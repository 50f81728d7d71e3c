package outbound

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
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
	// Registerer takes the metrics; nil for none.
	Registerer prometheus.Registerer
}

// Kind is the capability of outbound HTTP. It implements provider.Kind.
type Kind struct {
	resolver Resolver
	dial     DialFunc
	metrics  *metrics
}

// New returns the capability of outbound HTTP. It fails when the metrics cannot be
// registered.
func New(o Options) (*Kind, error) {
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	k := &Kind{resolver: o.Resolver, dial: o.Dial, metrics: m}
	if k.resolver == nil {
		k.resolver = &net.Resolver{PreferGo: true}
	}
	if k.dial == nil {
		k.dial = (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext
	}
	return k, nil
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
	r := setting.New(permission.HTTP, "direct", given)
	s := settings{
		maxResponse: r.Size(setMaxResponse, 4<<20, 1<<10, MaxResponse),
		maxInFlight: r.Count(setMaxInFlight, 256, 1, 10000),
		maxEach:     r.Count(setMaxEach, 64, 1, 10000),
	}
	if r.Text(setCA) != "" {
		var err error
		if s.roots, err = x509.SystemCertPool(); err != nil {
			s.roots = x509.NewCertPool()
		}
		r.AddCertificates(setCA, s.roots)
	}
	return s, r.Done()
}
