package microvm

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// How a machine started, as label.
const (
	startBoot  = "boot"
	startClone = "clone"
	startFork  = "fork"
	startSpare = "spare"
)

type metrics struct {
	starts *prometheus.HistogramVec
	takes  *prometheus.CounterVec
	exits  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, f *fleet, t *templates) (*metrics, error) {
	m := &metrics{
		starts: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "wasmatrix_microvm_start_duration_seconds",
			Help:    "Time until a virtual machine took orders, by how it started: boot, clone, fork (a clone that becomes a template) or spare (a clone that was ready).",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"how"}),
		takes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_microvm_pool_takes_total",
			Help: "Clones that were taken for an instance, by whether one was ready: hit or miss.",
		}, []string{"result"}),
		exits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wasmatrix_microvm_exits_total",
			Help: "Instances in virtual machines that ended, by reason.",
		}, []string{"reason"}),
	}
	for _, result := range []string{"hit", "miss"} {
		m.takes.WithLabelValues(result)
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.starts, m.takes, m.exits, newCensus(f, t)} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}

// pool counts a clone that was taken.
func (m *metrics) pool(hit bool) {
	if hit {
		m.takes.WithLabelValues("hit").Inc()
	} else {
		m.takes.WithLabelValues("miss").Inc()
	}
}

// use is what a machine is for at present.
type use string

const (
	// starting: it boots, loads a template's state, or becomes a template.
	starting use = "starting"
	// spare: it is paused and waits for an instance.
	spare use = "spare"
	// taken: it has an instance.
	taken use = "taken"
)

// fleet knows all machines that live.
type fleet struct {
	mu       sync.Mutex
	machines map[*link]use
}

func newFleet() *fleet { return &fleet{machines: map[*link]use{}} }

// set notes what a machine is for.
func (f *fleet) set(l *link, u use) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[l] = u
}

// change is set for a machine that may have ended.
func (f *fleet) change(l *link, u use) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, lives := f.machines[l]; lives {
		f.machines[l] = u
	}
}

// remove forgets a machine that has ended.
func (f *fleet) remove(l *link) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.machines, l)
}

// processes returns the processes of all machines by what they are for.
func (f *fleet) processes() map[use][]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[use][]int{starting: nil, spare: nil, taken: nil}
	for l, u := range f.machines {
		all[u] = append(all[u], l.machine.Process())
	}
	return all
}

// census counts machines and templates when it is asked.
type census struct {
	fleet     *fleet
	templates *templates

	machines, memory, templateCount, templateBytes *prometheus.Desc
}

func newCensus(f *fleet, t *templates) *census {
	return &census{
		fleet: f, templates: t,
		machines: prometheus.NewDesc("wasmatrix_microvm_machines",
			"Virtual machines by what they are for: starting, spare (paused, waiting for an instance) or taken (with an instance).", []string{"use"}, nil),
		memory: prometheus.NewDesc("wasmatrix_microvm_memory_bytes",
			"Memory that the virtual machines do not share with each other, by what they are for; their templates come on top.", []string{"use"}, nil),
		templateCount: prometheus.NewDesc("wasmatrix_microvm_templates",
			"Templates that virtual machines are cloned from.", nil, nil),
		templateBytes: prometheus.NewDesc("wasmatrix_microvm_template_bytes",
			"Memory of the templates.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *census) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.machines, c.memory, c.templateCount, c.templateBytes} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *census) Collect(out chan<- prometheus.Metric) {
	for u, processes := range c.fleet.processes() {
		var memory uint64
		for _, pid := range processes {
			memory += privateBytes(pid)
		}
		out <- prometheus.MustNewConstMetric(c.machines, prometheus.GaugeValue, float64(len(processes)), string(u))
		out <- prometheus.MustNewConstMetric(c.memory, prometheus.GaugeValue, float64(memory), string(u))
	}
	count, bytes := c.templates.size()
	out <- prometheus.MustNewConstMetric(c.templateCount, prometheus.GaugeValue, float64(count))
	out <- prometheus.MustNewConstMetric(c.templateBytes, prometheus.GaugeValue, float64(bytes))
}

// privateBytes returns the memory that a process shares with no file and no other
// process; 0 where the system does not tell.
func privateBytes(pid int) uint64 {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if fields := bytes.Fields(lines.Bytes()); len(fields) > 1 && string(fields[0]) == "Anonymous:" {
			kilobytes, _ := strconv.ParseUint(string(fields[1]), 10, 64) // the kernel wrote it
			return kilobytes << 10
		}
	}
	return 0
}
