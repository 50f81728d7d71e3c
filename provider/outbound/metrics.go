package outbound

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/provider"
)

// metrics are those of all providers of one Kind.
type metrics struct {
	requests *prometheus.CounterVec
	inFlight *prometheus.GaugeVec
}

func newMetrics(to prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_outbound_requests_total",
			Help: "Requests to the outside, by outcome: the class of the status (2xx), refused by a permission or the address policy, or failed.",
		}, []string{"provider", "outcome"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "wasmatrix_outbound_in_flight", Help: "Requests to the outside under way.",
		}, []string{"provider"}),
	}
	if to == nil {
		return m, nil
	}
	if err := errors.Join(to.Register(m.requests), to.Register(m.inFlight)); err != nil {
		return nil, fmt.Errorf("registering the metrics of outbound HTTP: %w", err)
	}
	return m, nil
}

// outcome names how a request ended.
func outcome(status uint32, err error) string {
	switch {
	case errors.Is(err, provider.ErrDenied):
		return "refused"
	case err != nil || status < 100 || status > 599:
		return "failed"
	default:
		return [...]string{"1xx", "2xx", "3xx", "4xx", "5xx"}[status/100-1]
	}
}
