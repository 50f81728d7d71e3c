package dispatch

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The values of the label state of wasmatrix_nodes.
const (
	stateReady    = "ready"
	stateDraining = "draining"
	stateLost     = "lost"
)

type metrics struct {
	sessions    prometheus.Gauge
	nodes       *prometheus.GaugeVec
	renewals    prometheus.Counter
	expirations prometheus.Counter
	reports     prometheus.Counter
	messages    prometheus.Counter
	changes     prometheus.Counter
	wakes       prometheus.Counter
}

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wasmatrix_node_sessions",
			Help: "Session streams of agents that are open at this peer.",
		}),
		nodes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "wasmatrix_nodes",
			Help: "Worker nodes by state, as the leader sees them; absent on a follower.",
		}, []string{"state"}),
		renewals:    counter("wasmatrix_node_lease_renewals_total", "Leases that this peer renewed."),
		expirations: counter("wasmatrix_node_lease_expirations_total", "Leases whose end this peer committed."),
		reports:     counter("wasmatrix_node_status_reports_total", "Observations of instances and providers that this peer committed."),
		messages:    counter("wasmatrix_node_assignment_messages_total", "Messages sent on session streams."),
		changes:     counter("wasmatrix_node_assignment_changes_total", "Changes sent on session streams."),
		wakes:       counter("wasmatrix_node_session_wakes_total", "Times a session stream woke because something it depends on changed."),
	}
	if registerer == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.sessions, m.nodes, m.renewals, m.expirations, m.reports, m.messages, m.changes, m.wakes}
	for _, c := range all {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of the dispatcher: %w", err)
		}
	}
	return m, nil
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

// countNodes sets the number of nodes in each state; a node that drains counts
// as draining only.
func (m *metrics) countNodes(nodes []*pb.Node) {
	counts := map[string]int{stateReady: 0, stateDraining: 0, stateLost: 0}
	for _, node := range nodes {
		switch {
		case !fsm.Ready(node):
			counts[stateLost]++
		case node.GetDraining():
			counts[stateDraining]++
		default:
			counts[stateReady]++
		}
	}
	for state, n := range counts {
		m.nodes.WithLabelValues(state).Set(float64(n))
	}
}

// reset takes back what only a leader knows.
func (m *metrics) reset() { m.nodes.Reset() }
