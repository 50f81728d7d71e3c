package provider

import (
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// codes are the names of the API's error codes for the sentinels. They are
// label values only; provider/remote maps errors.
var codes = []struct {
	sentinel error
	name     string
}{
	{ErrDenied, "PERMISSION_DENIED"},
	{ErrInvalid, "INVALID_REQUEST"},
	{ErrUnavailable, "PROVIDER_UNAVAILABLE"},
	{ErrTimeout, "TIMEOUT"},
	{ErrCommunication, "COMMUNICATION_FAILURE"},
	{ErrNotFound, "PROVIDER_NOT_FOUND"},
	{ErrInstanceNotFound, "INSTANCE_NOT_FOUND"},
	{ErrExhausted, "RESOURCE_EXHAUSTED"},
	{ErrConflict, "CONFLICT"},
}

func codeName(err error) string {
	if err == nil {
		return "OK"
	}
	for _, c := range codes {
		if errors.Is(err, c.sentinel) {
			return c.name
		}
	}
	return "INTERNAL_ERROR"
}

// unknown is the label value for what a guest made up.
const unknown = "unknown"

// metrics are the counters of one Router.
type metrics struct {
	duration *prometheus.HistogramVec
	calls    *prometheus.CounterVec
	served   *prometheus.CounterVec
	denials  *prometheus.CounterVec

	// children holds a *callMetrics for each capability and operation that was
	// ever well-formed, so that no other label value can come from a guest. It
	// is replaced as a whole: looking up costs two map reads and no lock.
	mu       sync.Mutex
	children atomic.Pointer[map[string]map[string]*callMetrics]
}

// callMetrics are the resolved children of one operation.
type callMetrics struct {
	capability, operation string
	duration              prometheus.Observer
	ok                    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "wasmatrix_capability_call_duration_seconds",
			Help:    "Time from a guest's capability call to its answer.",
			Buckets: []float64{2e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"capability", "operation"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_capability_calls_total",
			Help: "Capability calls of guests on this node, by the code of their answer.",
		}, []string{"capability", "operation", "code"}),
		served: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_capability_calls_served_total",
			Help: "Capability calls that came from other nodes or users, by the code of their answer.",
		}, []string{"capability", "operation", "code"}),
		denials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_capability_denials_total",
			Help: "Capability calls of guests that no grant covers, by the side that refused them.",
		}, []string{"capability", "operation", "side"}),
	}
	m.children.Store(&map[string]map[string]*callMetrics{})
	if reg == nil {
		return m, nil
	}
	return m, errors.Join(reg.Register(m.duration), reg.Register(m.calls), reg.Register(m.served), reg.Register(m.denials))
}

// of returns the children of an operation; nil when it was never well-formed.
func (m *metrics) of(capability, operation string) *callMetrics {
	return (*m.children.Load())[capability][operation]
}

// learn makes the children of an operation that a Kind has accepted.
func (m *metrics) learn(capability, operation string) *callMetrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.of(capability, operation); c != nil {
		return c
	}
	next := map[string]map[string]*callMetrics{}
	for name, operations := range *m.children.Load() {
		next[name] = map[string]*callMetrics{}
		maps.Copy(next[name], operations)
	}
	if next[capability] == nil {
		next[capability] = map[string]*callMetrics{}
	}
	c := &callMetrics{
		capability: capability,
		operation:  operation,
		duration:   m.duration.WithLabelValues(capability, operation),
		ok:         m.calls.WithLabelValues(capability, operation, "OK"),
	}
	next[capability][operation] = c
	m.children.Store(&next)
	return c
}

// observe counts one call of a guest.
func (m *metrics) observe(c *callMetrics, took time.Duration, err error) {
	if c == nil {
		m.calls.WithLabelValues(unknown, unknown, codeName(err)).Inc()
		return
	}
	c.duration.Observe(took.Seconds())
	if err == nil {
		c.ok.Inc()
		return
	}
	m.calls.WithLabelValues(c.capability, c.operation, codeName(err)).Inc()
}
