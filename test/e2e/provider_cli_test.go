package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// says runs a command line that must end with code and say all of that.
func says(t *testing.T, c *harness.Cluster, code int, want []string, args ...string) harness.Output {
	t.Helper()
	out := c.CLI(args...)
	if out.Code != code {
		t.Errorf("%v: exit code %d, want %d", args, out.Code, code)
	}
	for _, w := range want {
		if !strings.Contains(out.Stdout+out.Stderr, w) {
			t.Errorf("%v: does not say %q", args, w)
		}
	}
	if t.Failed() {
		t.Fatalf("stdout:\n%s\nstderr:\n%s", out.Stdout, out.Stderr)
	}
	return out
}

// TestProvidersByCommandLine stops, starts, updates and tests providers while a
// guest uses them, and the guest is never restarted for it.
func TestProvidersByCommandLine(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 2})
	c.RunHello("hello", "n2")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 1\n")

	says(t, c, 0, []string{"set ", "the same value", "gone"}, "provider", "test", "kv")
	says(t, c, 0, []string{"subscribe", "publish", "the same message"}, "provider", "test", "bus")
	says(t, c, 2, []string{"--url"}, "provider", "test", "web")
	if out := c.CLI("kv", "list", "--bucket", "wasmatrix-provider-test"); out.Stdout != "no keys\n" {
		t.Errorf("the test left something behind: %+v", out)
	}

	says(t, c, 2, []string{"kv (kv, n1) is used by hello-", "Drain and stop?", "--yes"}, "provider", "stop", "kv")
	says(t, c, 0, []string{"✓ no new calls", "✓ stopped"}, "provider", "stop", "kv", "--yes")
	began := time.Now()
	says(t, c, 7, []string{"PROVIDER_UNAVAILABLE"}, "invoke", "hello", "-d", "Ada")
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the refusal took %s", d)
	}
	says(t, c, 7, []string{"PROVIDER_UNAVAILABLE", "wasmatrix provider start kv"}, "provider", "test", "kv")
	says(t, c, 0, []string{"✓ kv running on n1"}, "provider", "start", "kv")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 2\n")

	says(t, c, 0, []string{"✓ kv running on n1"}, "provider", "update", "kv", "--set", "max_bytes=1GiB")
	says(t, c, 0, []string{"max_bytes=1GiB", "hello-"}, "provider", "get", "kv")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 3\n")
	for range 2 {
		says(t, c, 8, []string{"provider kv could not be updated: ", "has no setting no_such_setting", "calls go on as before"}, "provider", "update", "kv", "--set", "no_such_setting=1")
	}
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 4\n")
	says(t, c, 0, []string{"✓ kv running on n1"}, "provider", "update", "kv", "--unset", "no_such_setting", "--unset", "max_bytes")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 5\n")
	if out := c.CLI("instance", "get", "hello"); !strings.Contains(out.Stdout, "RUNNING") || !strings.Contains(out.Stdout, "generation 1\n") {
		t.Errorf("the guest was restarted: %+v", out)
	}

	says(t, c, 2, []string{"INVALID_REQUEST"}, "provider", "register", "kv2", "--type", "kv", "--replicas", "2")
	says(t, c, 0, []string{"✓ web2 running on n1, n2"}, "provider", "register", "web2", "--type", "http", "--replicas", "2")
	says(t, c, 0, []string{"\nweb2/1  http"}, "provider", "list")
	says(t, c, 2, []string{"any of the providers web, web2: choose with --provider"}, "grant", "hello", "http:request")
	says(t, c, 0, []string{"web2"}, "grant", "hello", "http:request", "--provider", "web2")
	says(t, c, 0, []string{"on web2"}, "can", "hello", "http:domain:example.com:443")
	says(t, c, 4, []string{"CONFLICT"}, "provider", "deregister", "web2")
	says(t, c, 0, []string{"✓ stopped"}, "provider", "stop", "web2", "--yes")
	says(t, c, 4, []string{"CONFLICT", "revoke"}, "provider", "deregister", "web2")
	says(t, c, 0, nil, "revoke", "hello", "--all", "--provider", "web2")
	says(t, c, 0, []string{"web2 removed"}, "provider", "deregister", "web2")
}

// TestDrainWaitsForTheCallsInFlight drains a provider while a guest on another
// node is in the middle of a call, which is answered.
func TestDrainWaitsForTheCallsInFlight(t *testing.T) {
	world := startOutside(t)
	c := harness.Start(t, dev.Options{Nodes: 2})
	says(t, c, 0, nil, "run", filepath.Join(c.Guests, "greeter.wasm"), "--node", "n2", "--concurrency", "2",
		"--allow", "http:request", "--allow", "http:domain:127.0.0.0/8")
	slow := make(chan harness.Output, 1)
	go func() { slow <- c.CLI("invoke", "greeter", "-d", world.URL+"/slow") }()
	<-world.began
	drained := make(chan harness.Output, 1)
	go func() { drained <- c.CLI("provider", "drain", "web", "--yes") }()
	err := harness.Until(c.Context(10*time.Second), "new calls to be refused", func(context.Context) error {
		if out := c.CLI("invoke", "greeter", "-d", world.URL+"/hi"); out.Code != 7 {
			return fmt.Errorf("a new call gave %+v", out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case out := <-drained:
		t.Fatalf("the drain ended before the call in flight: %+v", out)
	default:
	}
	close(world.hold)
	if out := <-slow; out.Code != 0 || !strings.HasSuffix(out.Stdout, "says: at last\n") {
		t.Errorf("the call in flight: %+v", out)
	}
	if out := <-drained; out.Code != 0 || !strings.Contains(out.Stderr, "✓ no new calls  ✓ 1 call in flight finished (") || !strings.Contains(out.Stderr, "✓ stopped\n") {
		t.Errorf("drain: %+v", out)
	}
	says(t, c, 0, []string{"✓ web running on n1"}, "provider", "start", "web")
	says(t, c, 0, []string{"says: good morning"}, "invoke", "greeter", "-d", world.URL+"/hi")
}
