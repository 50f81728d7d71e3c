package agent

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// metrics are the agent's own figures. Guests choose none of the label values.
type metrics struct {
	crashes        *prometheus.CounterVec
	restarts       prometheus.Counter
	invocations    *prometheus.CounterVec
	invokeDuration *prometheus.HistogramVec
	reports        *prometheus.CounterVec
	sessionsLost   prometheus.Counter
	gaps           prometheus.Counter
	fetches        *prometheus.CounterVec
	journalWrites  *prometheus.CounterVec
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "wasmatrix_" + name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "wasmatrix_" + name, Help: help}, labels)
	}
	return &metrics{
		crashes:     counters("instance_crashes_total", "Crashes of instances of this node, by exit reason.", "reason"),
		restarts:    counter("instance_restarts_total", "Starts of instances by their restart policy."),
		invocations: counters("invocations_total", "Finished calls of guest handlers, by handler and outcome.", "handler", "code"),
		invokeDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wasmatrix_invocation_duration_seconds", Help: "Time from a call's arrival to its answer, waiting included.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}, []string{"handler"}),
		reports:       counters("agent_reports_total", "Batches of observations sent to the control plane, by outcome.", "result"),
		sessionsLost:  counter("agent_sessions_lost_total", "Sessions with the control plane that broke."),
		gaps:          counter("agent_assignment_gaps_total", "Assignment streams opened anew because a difference was missing."),
		fetches:       counters("agent_module_fetches_total", "Modules fetched from peers, by outcome.", "result"),
		journalWrites: counters("agent_journal_writes_total", "Writes of the assignment journal, by outcome.", "result"),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.crashes, m.restarts, m.invocations, m.invokeDuration, m.reports,
		m.sessionsLost, m.gaps, m.fetches, m.journalWrites,
	}
}

// invoked counts a finished call.
func (m *metrics) invoked(handler runtime.Handler, err error, took time.Duration) {
	code := "OK"
	if err != nil {
		code = strings.TrimPrefix(apierror.CodeOf(err).String(), "ERROR_CODE_")
	}
	name := strings.TrimPrefix(string(handler), "wasmatrix_on_")
	m.invocations.WithLabelValues(name, code).Inc()
	m.invokeDuration.WithLabelValues(name).Observe(took.Seconds())
}

func outcome(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

// stateLabel is an instance state as metrics, logs and messages spell it: "running".
func stateLabel(s pb.InstanceState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "INSTANCE_STATE_"))
}

func providerStateLabel(s pb.ProviderState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "PROVIDER_STATE_"))
}

// collector reads the present state of an agent when it is scraped.
type collector struct {
	agent     *Agent
	instances *prometheus.Desc
	providers *prometheus.Desc
	session   *prometheus.Desc
	lease     *prometheus.Desc
}

func newCollector(a *Agent) *collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("wasmatrix_"+name, help, labels, nil)
	}
	return &collector{
		agent:     a,
		instances: desc("instances", "Instances of this node, by state.", "state"),
		providers: desc("hosted_providers", "Providers hosted by this node, by state.", "state"),
		session:   desc("agent_session_up", "Whether the agent has a session with the leader."),
		lease:     desc("agent_lease_remaining_seconds", "How long the node's lease still lives by the node's own clock."),
	}
}

// Describe sends the descriptions of the gauges.
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	to <- c.instances
	to <- c.providers
	to <- c.session
	to <- c.lease
}

// Collect sends the gauges. Every instance state is sent, so that a state that
// empties reads as 0.
func (c *collector) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	instances := c.agent.worker.states()
	for number := range pb.InstanceState_name {
		if s := pb.InstanceState(number); s >= pb.InstanceState_INSTANCE_STATE_ASSIGNED {
			gauge(c.instances, float64(instances[s]), stateLabel(s))
		}
	}
	providers := c.agent.hosting.states()
	for number := range pb.ProviderState_name {
		if s := pb.ProviderState(number); s >= pb.ProviderState_PROVIDER_STATE_ASSIGNED {
			gauge(c.providers, float64(providers[s]), providerStateLabel(s))
		}
	}
	if c.agent.session == nil {
		return
	}
	up := 0.0
	if c.agent.session.current().leader != "" {
		up = 1
	}
	gauge(c.session, up)
	left, _ := c.agent.lease.remaining()
	gauge(c.lease, left.Seconds())
}
