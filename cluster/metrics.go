package cluster

import (
	"strings"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a peer counts, and what it reads off when it is scraped.
type metrics struct {
	peer          *Peer
	apply         prometheus.Histogram
	leaderChanges prometheus.Counter

	state, term, commit, applied, last *prometheus.Desc
	leaderless, voters, alive          *prometheus.Desc
}

func newMetrics(p *Peer, registerer prometheus.Registerer) (*metrics, error) {
	gauge := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("wasmatrix_"+name, help, labels, nil)
	}
	m := &metrics{
		peer: p,
		apply: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "wasmatrix_raft_apply_duration_seconds", Help: "Time from proposing a command to its result, on the leader.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 2, 16),
		}),
		leaderChanges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "wasmatrix_raft_leader_changes_total", Help: "Number of times this peer learned of another leader.",
		}),
		state:      gauge("raft_state", "1 for the state this peer is in.", "state"),
		term:       gauge("raft_term", "The Raft term."),
		commit:     gauge("raft_commit_index", "The last committed index this peer knows of."),
		applied:    gauge("raft_applied_index", "The last index applied on this peer."),
		last:       gauge("raft_last_log_index", "The last index in this peer's log."),
		leaderless: gauge("raft_has_leader", "1 while this peer knows of a leader."),
		voters:     gauge("peers_voters", "Number of voting peers in the Raft configuration."),
		alive:      gauge("peers_voters_alive", "Number of voting peers that gossip sees alive."),
	}
	if registerer == nil {
		return m, nil
	}
	return m, registerer.Register(m)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, out) }

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	m.apply.Collect(out)
	m.leaderChanges.Collect(out)
	gauge := func(d *prometheus.Desc, value uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
	}
	now, term, commit, applied, last := raft.Shutdown, uint64(0), uint64(0), uint64(0), uint64(0)
	if r := m.peer.raft.Load(); r != nil {
		now, term, commit, applied, last = r.State(), r.CurrentTerm(), r.CommitIndex(), r.AppliedIndex(), r.LastIndex()
	}
	for _, s := range []raft.RaftState{raft.Follower, raft.Candidate, raft.Leader, raft.Shutdown} {
		gauge(m.state, one(s == now), strings.ToLower(s.String()))
	}
	gauge(m.term, term)
	gauge(m.commit, commit)
	gauge(m.applied, applied)
	gauge(m.last, last)
	leader, _ := m.peer.Leader()
	gauge(m.leaderless, one(leader != ""))
	voters, alive := m.peer.voters()
	gauge(m.voters, uint64(voters))
	gauge(m.alive, uint64(alive))
}

func one(yes bool) uint64 {
	if yes {
		return 1
	}
	return 0
}
