package outbound

import (
	"errors"
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func TestRequestsAreCountedByOutcome(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	s, _ := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/waits":
			close(entered)
			<-release
		case "/absent":
			w.WriteHeader(http.StatusNotFound)
		case "/breaks":
			panic(http.ErrAbortHandler)
		}
	})
	registry := prometheus.NewPedanticRegistry()
	p := openWith(t, Options{Registerer: registry}, nil)
	_, set := local(t, nil)
	get := func(url string) error {
		_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Method: "GET", Url: url})
		return err
	}
	for path, fails := range map[string]bool{"/": false, "/absent": false, "/breaks": true} {
		if err := get(s.URL + path); (err != nil) != fails {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := get("http://169.254.169.254/latest"); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("the metadata service: %v", err)
	}
	for outcome, want := range map[string]float64{"2xx": 1, "4xx": 1, "failed": 1, "refused": 1, "5xx": 0} {
		if got := testutil.ToFloat64(p.kind.metrics.requests.WithLabelValues("web", outcome)); got != want {
			t.Errorf("%s: %v, want %v", outcome, got, want)
		}
	}
	done := make(chan error, 1)
	go func() { done <- get(s.URL + "/waits") }()
	<-entered
	inFlight := p.kind.metrics.inFlight.WithLabelValues("web")
	if n := testutil.ToFloat64(inFlight); n != 1 {
		t.Errorf("%v requests are under way, want 1", n)
	}
	close(release)
	if err := <-done; err != nil || testutil.ToFloat64(inFlight) != 0 {
		t.Errorf("%v; %v requests are under way afterwards", err, testutil.ToFloat64(inFlight))
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}
