package messaging

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// The reasons why a message was dropped.
const (
	droppedFull        = "full"        // too many waited already
	droppedUndelivered = "undelivered" // the subscription ended or the provider closed meanwhile
	droppedInvalid     = "invalid"     // no guest could read it
	droppedExpired     = "expired"     // a request whose sender waits no longer
)

// metrics are those of all providers of one Kind.
type metrics struct {
	published     *prometheus.CounterVec
	deliveries    *prometheus.CounterVec
	dropped       *prometheus.CounterVec
	inFlight      *prometheus.GaugeVec
	subscriptions *prometheus.GaugeVec
}

func newMetrics(to prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, append([]string{"provider"}, labels...))
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, []string{"provider"})
	}
	m := &metrics{
		published: counter("wasmatrix_messaging_published_total", "Messages and requests published."),
		deliveries: counter("wasmatrix_messaging_deliveries_total",
			"Deliveries to message handlers, by what became of them: acknowledged, retried, rejected, given_up.", "outcome"),
		dropped: counter("wasmatrix_messaging_dropped_total",
			"Messages that no handler will get, by reason: full, undelivered, invalid, expired.", "reason"),
		inFlight:      gauge("wasmatrix_messaging_in_flight", "Messages in handlers, or waiting for a replica to take them."),
		subscriptions: gauge("wasmatrix_messaging_subscriptions", "Subscriptions that messages are delivered for, one for each workload and subject."),
	}
	if to == nil {
		return m, nil
	}
	var problems []error
	for _, c := range []prometheus.Collector{m.published, m.deliveries, m.dropped, m.inFlight, m.subscriptions} {
		problems = append(problems, to.Register(c))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("registering the metrics of messaging: %w", err)
	}
	return m, nil
}

// meter are the metrics of one provider.
type meter struct {
	published, acknowledged, retried, rejected, givenUp prometheus.Counter

	dropped       func(reason string) prometheus.Counter
	inFlight      prometheus.Gauge
	subscriptions prometheus.Gauge
}

func (m *metrics) of(id string) *meter {
	return &meter{
		published:    m.published.WithLabelValues(id),
		acknowledged: m.deliveries.WithLabelValues(id, "acknowledged"),
		retried:      m.deliveries.WithLabelValues(id, "retried"),
		rejected:     m.deliveries.WithLabelValues(id, "rejected"),
		givenUp:      m.deliveries.WithLabelValues(id, "given_up"),

		dropped:       func(reason string) prometheus.Counter { return m.dropped.WithLabelValues(id, reason) },
		inFlight:      m.inFlight.WithLabelValues(id),
		subscriptions: m.subscriptions.WithLabelValues(id),
	}
}
