package node

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestOneAddressShowsBothProcesses has the same series in the peer and in the
// agent: neither hides the other.
func TestOneAddressShowsBothProcesses(t *testing.T) {
	agentRegistry, agentMetrics := newRegistry("agent")
	peerRegistry, peerMetrics := newRegistry("peer")
	for i, to := range []prometheus.Registerer{agentMetrics, peerMetrics} {
		requests := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "wasmatrix_api_requests_total", Help: "Calls."}, []string{"code"})
		to.MustRegister(requests)
		requests.WithLabelValues("OK").Add(float64(i + 1))
	}
	agent := httptest.NewServer(newHTTPHandler(agentRegistry, nil))
	defer agent.Close()
	both := prometheus.Gatherers{peerRegistry, agentGatherer{client: agent.Client(), url: agent.URL + "/metrics"}}
	if _, err := both.Gather(); err != nil {
		t.Errorf("gather both: %v", err)
	}
	w := httptest.NewRecorder()
	newHTTPHandler(both, nil).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{
		`wasmatrix_api_requests_total{code="OK",process="agent"} 1`,
		`wasmatrix_api_requests_total{code="OK",process="peer"} 2`,
		`wasmatrix_agent_up{process="peer"} 1`,
		`go_goroutines{process="agent"}`,
		`go_goroutines{process="peer"}`,
	} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
}

func TestAPeerIsReadyOnlyWithItsAgent(t *testing.T) {
	var parts map[string]check
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		newHTTPHandler(prometheus.NewRegistry(), parts).ServeHTTP(w, r)
	}))
	ready := agentReady(agent.Client(), agent.URL+"/readyz")
	if err := ready(); err != nil {
		t.Errorf("the agent is ready: %v", err)
	}
	parts = map[string]check{"lease": func() error { return http.ErrServerClosed }}
	if err := ready(); err == nil || !strings.Contains(err.Error(), "not ready") {
		t.Errorf("the agent is not ready: %v", err)
	}
	agent.Close()
	if err := ready(); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("the agent is gone: %v", err)
	}
	for role, want := range map[string][]string{RoleServer: {"raft"}, RoleBoth: {"agent", "raft"}} {
		p := &peerProcess{cfg: Config{Node: Self{Role: role}}}
		var got []string
		for name := range p.checks() {
			got = append(got, name)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("role %s has the parts %v, want %v", role, got, want)
		}
	}
}
