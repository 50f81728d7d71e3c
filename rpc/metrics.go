package rpc

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_api_requests_total",
			Help: "Finished gRPC calls by method and result code, OK or the error code.",
		}, []string{"method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "wasmatrix_api_request_duration_seconds",
			Help:    "Duration of unary gRPC calls by method. Streams are left out: they last as long as their client likes.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"method"}),
	}
	m.requests = register(r, m.requests)
	m.duration = register(r, m.duration)
	return m
}

// register returns the collector to use: c, or the equal one that another
// server of the same process registered before.
func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	if exists, ok := errors.AsType[prometheus.AlreadyRegisteredError](r.Register(c)); ok {
		if before, ok := exists.ExistingCollector.(C); ok {
			return before
		}
	}
	return c
}
