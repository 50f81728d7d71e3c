package cli

import (
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestProviders(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}
	if got := b.want("provider", "list"); !strings.Contains(got, "kv  kv    -       RUNNING  n2    1m30s") {
		t.Errorf("list:\n%s", got)
	}
	if got := b.want("provider", "get", "kv"); !strings.Contains(got, "  a=1\n") {
		t.Errorf("get:\n%s", got)
	}
	if code, stdout, stderr := b.run("provider", "stop", "kv"); code != 0 || stdout != "" || !strings.Contains(stderr, "✓ no new calls  ✓ stopped") {
		t.Errorf("stop: exit %d, %q\n%s", code, stdout, stderr)
	}
	b.want("provider", "start", "kv")
	b.want("provider", "update", "kv", "--driver", "memory", "--config", "b=2")
	if spec := request[*pb.UpdateProviderRequest](b.fake).GetSpec(); spec.GetDriver() != "memory" || spec.GetConfig()["a"] != "1" || spec.GetConfig()["b"] != "2" {
		t.Errorf("update: %v", spec)
	}
	b.want("provider", "register", "-f", b.file("p.yaml", "id: cache\ntype: kv\n"), "--driver", "memory")
	if spec := request[*pb.RegisterProviderRequest](b.fake).GetSpec(); spec.GetId() != "cache" || spec.GetDriver() != "memory" {
		t.Errorf("register: %v", spec)
	}
	if got := b.want("provider", "deregister", "cache"); got != "cache removed\n" {
		t.Errorf("deregister: %q", got)
	}
	b.fake.opens = pb.ProviderState_PROVIDER_STATE_FAILED
	for _, args := range [][]string{{"register", "bad", "--type", "kv"}, {"update", "kv", "--driver", "bbolt"}, {"start", "bad"}} {
		if code, _, stderr := b.run(append([]string{"provider"}, args...)...); code != 8 || !strings.Contains(stderr, "failed") {
			t.Errorf("%v of one that fails: exit %d\n%s", args, code, stderr)
		}
	}
	b.fake.opens = pb.ProviderState_PROVIDER_STATE_RUNNING
	b.want("provider", "update", "kv", "--driver", "memory")
	b.fake.grants = []*pb.CapabilityAssignment{{InstanceId: "hello-aaaaa", ProviderId: "kv"}}
	code, _, stderr := b.run("provider", "stop", "kv")
	if code != 2 || !strings.Contains(stderr, "kv (kv, n2) is used by hello-aaaaa. Drain and stop?\ntry:  say so with --yes") {
		t.Errorf("in use: exit %d\n%s", code, stderr)
	}
	b.want("provider", "stop", "kv", "--yes")
}

func TestStopTellsOfTheCallsInFlight(t *testing.T) {
	b := newBench(t)
	replica := newProvider("web", "http", pb.ProviderState_PROVIDER_STATE_RUNNING)
	replica.Replica, replica.Placement = 1, &pb.Placement{NodeId: "n3"}
	b.fake.providers = []*pb.Provider{newProvider("web", "http", pb.ProviderState_PROVIDER_STATE_RUNNING), replica}
	b.fake.grants = []*pb.CapabilityAssignment{{InstanceId: "hello-aaaaa", ProviderId: "web"}}
	b.fake.byHand = true
	if code, _, stderr := b.run("provider", "stop", "web"); code != 2 || !strings.Contains(stderr, "web (http, n2, n3) is used by hello-aaaaa. Drain and stop?") {
		t.Errorf("asked on no terminal: exit %d\n%s", code, stderr)
	}
	looks := 0
	b.fake.seen = func(method string) {
		if method != "GetProvider" {
			return
		}
		looks++
		state := map[int]pb.ProviderState{2: pb.ProviderState_PROVIDER_STATE_DRAINING, 3: pb.ProviderState_PROVIDER_STATE_STOPPED}[looks]
		if state == 0 {
			return
		}
		b.fake.change(pb.EventKind_EVENT_KIND_PROVIDER_STOPPED, "", func() {
			for n, p := range b.fake.providers {
				p.Status.State, p.Status.CallsInFlight = state, uint32(n+1)
			}
		})
	}
	code, _, stderr := b.run("provider", "drain", "web", "--yes", "--grace", "20s")
	if code != 0 || !strings.Contains(stderr, " ✓ no new calls  ✓ 3 calls in flight finished (0.0s)  ✓ stopped\n") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	if got := request[*pb.StopProviderRequest](b.fake).GetGrace().AsDuration(); got != 20*time.Second {
		t.Errorf("the grace is %s", got)
	}
	b.fake.providers[1].Status.Message = "2 calls did not finish within 20s and were cut off"
	if code, _, stderr := b.run("provider", "stop", "web", "--yes"); code != 0 || !strings.Contains(stderr, "✓ 2 calls did not finish within 20s and were cut off  ✓ stopped") {
		t.Errorf("cut off: exit %d\n%s", code, stderr)
	}
}

func TestUpdateWaitsForTheNewSpecificationOnEveryReplica(t *testing.T) {
	b := newBench(t)
	b.want("provider", "register", "web", "--type", "http", "--replicas", "2", "--set", "a=2")
	if spec := request[*pb.RegisterProviderRequest](b.fake).GetSpec(); spec.GetReplicas() != 2 || spec.GetConfig()["a"] != "2" {
		t.Errorf("register: %v", spec)
	}
	got := b.want("provider", "list")
	if !strings.Contains(got, "\nweb    http") || !strings.Contains(got, "\nweb/1  http") {
		t.Errorf("list:\n%s", got)
	}
	if got := b.want("provider", "list", "-o", "name"); got != "web\n" {
		t.Errorf("name: %q", got)
	}
	if got := b.want("provider", "get", "web"); !strings.Contains(got, "web/1") || !strings.Contains(got, "  replicas  2\n") {
		t.Errorf("get:\n%s", got)
	}
	b.fake.byHand = true
	var looks, ready int
	b.fake.seen = func(method string) {
		if method != "GetProvider" {
			return
		}
		// One replica after the other opens the driver by the new specification.
		if looks++; looks < 2 || ready == len(b.fake.providers) {
			return
		}
		b.fake.change(pb.EventKind_EVENT_KIND_PROVIDER_STARTED, "", func() {
			p := b.fake.providers[ready]
			p.SpecVersion, p.Status.SpecVersion = 2, 2
			ready++
		})
	}
	b.want("provider", "update", "web", "--unset", "a")
	if ready != 2 {
		t.Errorf("it ended with %d of 2 replicas at the new specification", ready)
	}
	if spec := request[*pb.UpdateProviderRequest](b.fake).GetSpec(); len(spec.GetConfig()) != 0 {
		t.Errorf("update: %v", spec)
	}
	looks, ready = 0, 2
	b.fake.seen = func(method string) {
		if looks++; method != "GetProvider" || looks < 3 {
			return
		}
		b.fake.change(pb.EventKind_EVENT_KIND_PROVIDER_FAILED, "", func() {
			p := b.fake.providers[1]
			p.SpecVersion, p.Status.Message = 3, "still with the configuration before: no setting b"
		})
	}
	code, _, stderr := b.run("provider", "update", "web", "--set", "b=1")
	if code != 8 || !strings.Contains(stderr, "error: provider web/1 could not be updated: still with the configuration before: no setting b\n") {
		t.Errorf("an update that a replica cannot take up: exit %d\n%s", code, stderr)
	}
	b.fake.seen = nil
	if code, _, stderr := b.run("provider", "update", "web", "--unset", "zzz"); code != 2 || !strings.Contains(stderr, "no such setting") {
		t.Errorf("unset of nothing: exit %d\n%s", code, stderr)
	}
}

func TestProviderTestMakesARoundTrip(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{
		newProvider("kv", "kv", 0), newProvider("bus", "messaging", 0), newProvider("web", "http", 0), newProvider("ext", "external", 0),
	}
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{[]string{"kv"}, []string{"set     0.0 ms  36 B\n", "get     0.0 ms  the same value\n", "delete  0.0 ms  removed\n", "get     0.0 ms  gone\n"}},
		{[]string{"bus"}, []string{"subscribe  0.0 ms  wasmatrix.provider.test.", "publish    0.0 ms  36 B\n", "receive    0.0 ms  the same message\n"}},
		{[]string{"web", "--url", "http://h/"}, []string{"GET   0.0 ms  status 418, 3 B, http://h/\n"}},
		{[]string{"ext", "--operation", "charge", "-d", "1"}, []string{"charge  0.0 ms  8 B: charge 1\n"}},
		{[]string{"ext"}, []string{"operations  0.0 ms  charge, refund\n"}},
		{[]string{"kv", "-o", "json"}, []string{`"type": "kv"`, `"microseconds": 0`}},
	} {
		got := b.want(append([]string{"provider", "test"}, tt.args...)...)
		for _, want := range tt.want {
			if !strings.Contains(got, want) {
				t.Errorf("%v: no %q in\n%s", tt.args, want, got)
			}
		}
	}
	if len(b.fake.kv) != 0 {
		t.Errorf("the test left %v behind", b.fake.kv)
	}
	if code, _, stderr := b.run("provider", "test", "web"); code != 2 || !strings.Contains(stderr, "try:  wasmatrix provider test web --url URL") {
		t.Errorf("http without a URL: exit %d\n%s", code, stderr)
	}
	b.fake.fail["CallProvider"] = apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "kv is stopped")
	for _, id := range []string{"kv", "bus"} {
		if code, _, stderr := b.run("provider", "test", id); code != 7 || !strings.Contains(stderr, "PROVIDER_UNAVAILABLE") {
			t.Errorf("%s that is stopped: exit %d\n%s", id, code, stderr)
		}
	}
}
