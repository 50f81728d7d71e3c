package e2e

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// outside is a server of the world outside of the cluster, on loopback.
type outside struct {
	*httptest.Server
	reached atomic.Int64
	// hold, unless nil, keeps /slow from answering until it is closed; began tells
	// of each request that waits.
	hold, began chan struct{}
}

func startOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{hold: make(chan struct{}), began: make(chan struct{}, 16)}
	mux := http.NewServeMux()
	text := func(w http.ResponseWriter, s string) { _, _ = w.Write([]byte(s)) }
	mux.HandleFunc("/hi", func(w http.ResponseWriter, _ *http.Request) { text(w, "good morning\n") })
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/hi", http.StatusFound) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://[::1]:1/", http.StatusFound) })
	mux.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) { text(w, strings.Repeat("x", 1<<17)) })
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		o.began <- struct{}{}
		select {
		case <-o.hold:
			text(w, "at last")
		case <-r.Context().Done():
		}
	})
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.reached.Add(1)
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(o.Close)
	return o
}

// TestGreeter lets a guest fetch from a server on loopback, which only a rule that
// names the range allows, from the node of the HTTP provider and from another one.
func TestGreeter(t *testing.T) {
	world := startOutside(t)
	c := harness.Start(t, dev.Options{Nodes: 2})
	module := filepath.Join(c.Guests, "greeter.wasm")
	if out := c.CLI("run", module, "--name", "nothing"); out.Code != 5 || !strings.Contains(out.Stderr, "add --allow http:request") {
		t.Fatalf("run without a permission: %+v", out)
	}
	host := strings.TrimPrefix(world.URL, "http://")
	for _, node := range []string{"n1", "n2"} {
		name := "greeter-" + node
		run := c.CLI("run", module, "--name", name, "--node", node, "--allow", "http:request", "--env", "GREETING_URL="+world.URL+"/hi", "--wait-timeout", "3m")
		if run.Code != 0 {
			t.Fatalf("run on %s: %+v", node, run)
		}
		before := world.reached.Load()
		out := c.CLI("invoke", name)
		if out.Code != 5 || !strings.Contains(out.Stderr, "loopback") || world.reached.Load() != before {
			t.Fatalf("%s without a rule for loopback: %+v, %d requests arrived", node, out, world.reached.Load()-before)
		}
		if out := c.CLI("can", name, "http:domain:"+host); out.Code != 0 {
			t.Errorf("can: %+v: the name is allowed, what is refused is the address", out)
		}
		if out := c.CLI("grant", name, "http:domain:127.0.0.0/8"); out.Code != 0 {
			t.Fatalf("grant: %+v", out)
		}
		for _, tc := range []struct {
			path string
			code int
			says string
		}{
			{"", 0, host + " says: good morning\n"},
			{"/moved", 0, host + " says: good morning\n"},
			{"/none", 6, "error: fetch a greeting: " + world.URL + "/none answered with status 404\n"},
			{"/large", 7, "RESOURCE_EXHAUSTED"},
			{"/away", 5, "PERMISSION_DENIED"},
		} {
			args := []string{"invoke", name}
			if tc.path != "" {
				args = append(args, "-d", world.URL+tc.path)
			}
			if out := c.CLI(args...); out.Code != tc.code || !strings.Contains(out.Stdout+out.Stderr, tc.says) {
				t.Errorf("%s %q: want exit %d and %q: %+v", node, tc.path, tc.code, tc.says, out)
			}
		}
		if out := c.CLI("invoke", name, "-d", "gopher://"+host); out.Code != 2 {
			t.Errorf("%s, a scheme that is none: %+v", node, out)
		}
		if out := c.CLI("revoke", name, "--all", "--provider", "web"); out.Code != 0 {
			t.Fatalf("revoke: %+v", out)
		}
		if out := c.CLI("can", name, "http:domain:"+host); out.Code != 5 {
			t.Errorf("can after everything was revoked: %+v", out)
		}
	}
}
