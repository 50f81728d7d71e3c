package wasm

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	compile  prometheus.Histogram
	failures *prometheus.CounterVec
	lookups  lookups
	corrupt  prometheus.Counter
	loaded   prometheus.Gauge
	memory   prometheus.Gauge
	spare    prometheus.Gauge
	exits    *prometheus.CounterVec
}

// lookups counts the lookups of modules by where they were found.
type lookups struct{ inMemory, onDisk, nowhere prometheus.Counter }

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		compile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "wasmatrix_module_compile_duration_seconds",
			Help:    "Time to compile a module that was in no cache.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 13),
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_module_refusals_total",
			Help: "Modules that were refused, by reason: invalid, expensive (to compile) or internal.",
		}, []string{"reason"}),
		corrupt: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "wasmatrix_module_cache_corruptions_total",
			Help: "Damaged entries of the cache on disk that were found and compiled again.",
		}),
		loaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wasmatrix_modules_loaded",
			Help: "Compiled modules in memory.",
		}),
		memory: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wasmatrix_guest_memory_bytes",
			Help: "Size of all linear memories of guests.",
		}),
		spare: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wasmatrix_guest_spare_memory_bytes",
			Help: "Size of the linear memories that are kept ready for the next start of their module.",
		}),
		exits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_guest_exits_total",
			Help: "Instances that ended, by reason.",
		}, []string{"reason"}),
	}
	found := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "wasmatrix_module_cache_lookups_total",
		Help: "Lookups of compiled modules by where they were found: memory, disk or miss.",
	}, []string{"found"})
	m.lookups = lookups{
		inMemory: found.WithLabelValues("memory"), onDisk: found.WithLabelValues("disk"), nowhere: found.WithLabelValues("miss"),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.compile, m.failures, found, m.corrupt, m.loaded, m.memory, m.spare, m.exits} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}
