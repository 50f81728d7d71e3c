package schedule

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	placed   *prometheus.CounterVec
	refused  *prometheus.CounterVec
	unplaced prometheus.Gauge
}

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		placed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_scheduler_placements_total",
			Help: "Decisions of this peer that gave an instance or a provider a node.",
		}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_scheduler_refusals_total",
			Help: "Decisions of this peer that recorded why no node can take an instance or a provider.",
		}, []string{"kind"}),
		unplaced: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wasmatrix_scheduler_unplaced",
			Help: "Instances and providers that no node can take at the moment; 0 on a follower.",
		}),
	}
	if registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.placed, m.refused, m.unplaced} {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of the scheduler: %w", err)
		}
	}
	return m, nil
}
