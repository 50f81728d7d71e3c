package modules

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	pushes, pulls *prometheus.CounterVec
	damaged       prometheus.Counter
}

// newMetrics makes the counters and registers them when to is not nil.
func newMetrics(to prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_module_pushes_total",
			Help: "Transfers of a module from this peer to another.",
		}, []string{"result"}),
		pulls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_module_pulls_total",
			Help: "Transfers of a module that this peer lacked, from another.",
		}, []string{"result"}),
		damaged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "wasmatrix_modules_damaged_total",
			Help: "Module files on this peer's disk that had other bytes than their digest says.",
		}),
	}
	if to == nil {
		return m, nil
	}
	return m, errors.Join(to.Register(m.pushes), to.Register(m.pulls), to.Register(m.damaged))
}

func (m *metrics) pushed(err error) { m.pushes.WithLabelValues(result(err)).Inc() }
func (m *metrics) pulled(err error) { m.pulls.WithLabelValues(result(err)).Inc() }

func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}
