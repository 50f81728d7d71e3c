package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sort"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// processLabel is on every series: which process of the node it is of.
const processLabel = "process"

// agentReadyWithin bounds how long the agent may take to say that it is ready.
const agentReadyWithin = time.Second

// check is one component of /readyz: nil means ready.
type check func() error

// newHTTPHandler serves health and metrics. It says nothing secret: it is plain
// HTTP and on loopback unless told otherwise.
func newHTTPHandler(gatherer prometheus.Gatherer, checks map[string]check) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		serveReady(w, r.URL.Query().Has("verbose"), checks)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	return mux
}

func serveReady(w http.ResponseWriter, verbose bool, checks map[string]check) {
	names := make([]string, 0, len(checks))
	for name := range checks {
		names = append(names, name)
	}
	sort.Strings(names)
	type component struct {
		Name   string `json:"name"`
		Ready  bool   `json:"ready"`
		Reason string `json:"reason,omitempty"`
	}
	ready := true
	list := make([]component, 0, len(names))
	for _, name := range names {
		c := component{Name: name, Ready: true}
		if err := checks[name](); err != nil {
			c.Ready, c.Reason, ready = false, err.Error(), false
		}
		list = append(list, c)
	}
	code := http.StatusOK
	if !ready {
		code = http.StatusServiceUnavailable
	}
	if !verbose {
		w.WriteHeader(code)
		fmt.Fprintln(w, map[bool]string{true: "ready", false: "not ready"}[ready])
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(map[string]any{"ready": ready, "components": list})
}

// serveHTTP serves h on the listener until ctx ends, then finishes what is under way.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		stopped <- s.Shutdown(grace)
	})
	err := s.Serve(l)
	if stop() || !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve http on %s: %w", l.Addr(), err)
	}
	if err := <-stopped; err != nil {
		return s.Close()
	}
	return nil
}

// agentReady asks the agent process beside a peer whether it is ready.
func agentReady(client *http.Client, url string) check {
	return func() error {
		resp, err := client.Get(url)
		if err != nil {
			return fmt.Errorf("the agent does not answer: %w", err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("the agent is not ready: %s?verbose says why", url)
		}
		return nil
	}
}

// agentGatherer reads the metrics of the agent process beside a peer, so that
// one address tells everything of the node.
type agentGatherer struct {
	client *http.Client
	url    string
}

// Gather returns the agent's metrics, and nothing while the agent is away: its
// absence shows in wasmatrix_agent_up.
func (g agentGatherer) Gather() ([]*dto.MetricFamily, error) {
	resp, err := g.client.Get(g.url)
	if err != nil {
		return []*dto.MetricFamily{agentUp(0)}, nil
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return []*dto.MetricFamily{agentUp(0)}, fmt.Errorf("read the agent's metrics: %w", err)
	}
	out := []*dto.MetricFamily{agentUp(1)}
	for _, f := range families {
		out = append(out, f)
	}
	return out, nil
}

func agentUp(v float64) *dto.MetricFamily {
	name, help, kind := "wasmatrix_agent_up", "Whether the agent process beside this peer answers.", dto.MetricType_GAUGE
	label, teller := processLabel, "peer"
	return &dto.MetricFamily{Name: &name, Help: &help, Type: &kind, Metric: []*dto.Metric{{
		Label: []*dto.LabelPair{{Name: &label, Value: &teller}}, Gauge: &dto.Gauge{Value: &v},
	}}}
}
