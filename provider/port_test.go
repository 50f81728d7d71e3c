package provider_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/wasmatrix/wasmatrix/provider"
)

func TestPortCallsALocalProvider(t *testing.T) {
	n := newNode(t, nil)
	port := n.router.Port("i", 3, 5)
	for _, target := range []string{"", "kv"} {
		got, err := port.Call(t.Context(), "kv", "get", []byte(target+"|orders/1"))
		if want := "i/hello/3/hello/get/" + target + "|orders/1"; err != nil || string(got) != want {
			t.Errorf("target %q: %q, %v; want %q", target, got, err, want)
		}
	}
	if len(n.remote.calls) != 0 {
		t.Error("a local call went over the network")
	}
}

func TestPortCallsARemoteProvider(t *testing.T) {
	n := newNode(t, nil)
	n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "there", Permissions: set(t, "kv:read", "kv:write"), Bucket: "b"})
	port := n.router.Port("i", 3, 5)
	for _, operation := range []string{"get", "set"} {
		if got, err := port.Call(t.Context(), "kv", operation, []byte("there|x")); err != nil || string(got) != "remote" {
			t.Fatalf("%s: %q, %v", operation, got, err)
		}
	}
	want := []provider.RemoteCall{
		{Provider: "there", Capability: "kv", Operation: "get", Payload: []byte("there|x"), Node: "n2", Instance: "i", Generation: 3, NodeEpoch: 5, Repeatable: true},
		{Provider: "there", Capability: "kv", Operation: "set", Payload: []byte("there|x"), Node: "n2", Instance: "i", Generation: 3, NodeEpoch: 5},
	}
	for i, c := range n.remote.calls {
		if limit := c.NotAfter - n.router.Now(); limit <= 0 || limit > provider.DefaultCallTime {
			t.Errorf("%s may have its effect for another %s", c.Operation, limit)
		}
		n.remote.calls[i].NotAfter = 0
	}
	if !reflect.DeepEqual(n.remote.calls, want) || n.remote.address != "10.0.0.2:7400" {
		t.Errorf("remote calls to %s: %+v", n.remote.address, n.remote.calls)
	}
}

func TestPortRefusals(t *testing.T) {
	allow := func(p string, permissions ...string) func(*testing.T, *node) {
		return func(t *testing.T, n *node) {
			n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: p, Permissions: set(t, permissions...), Bucket: "b"})
		}
	}
	there := func(change func(*provider.ProviderRecord)) func(*testing.T, *node) {
		return func(t *testing.T, n *node) {
			allow("there", "kv:read")(t, n)
			rec, _ := n.dir.Provider("there")
			change(&rec)
			n.dir.PutProvider(rec)
		}
	}
	tests := []struct {
		name                           string
		change                         func(*testing.T, *node)
		capability, operation, payload string
		want                           error
		mentions, next                 string
	}{
		{
			name: "unknown capability", capability: "teapot", operation: "get", payload: "|x",
			want: provider.ErrInvalid, mentions: "expected http, kv",
		},
		{name: "malformed payload", payload: "x", want: provider.ErrInvalid, mentions: "malformed"},
		{name: "unknown operation", operation: "drop", payload: "|x", want: provider.ErrInvalid, mentions: "drop"},
		{
			name: "no provider of the type was granted", capability: "http", payload: "|x",
			want: provider.ErrDenied, mentions: "hello was not granted any http provider", next: "wasmatrix grant hello",
		},
		{
			name: "several were granted and none named", change: allow("there", "kv:read"),
			want: provider.ErrInvalid, mentions: "several kv providers; the call must name one of kv, there", next: "kv, there",
		},
		{
			name: "the only one granted is gone", change: func(_ *testing.T, n *node) { n.dir.RemoveProvider("kv") },
			want: provider.ErrNotFound, mentions: "provider kv", next: "wasmatrix provider list",
		},
		{name: "unknown provider", payload: "nope|x", want: provider.ErrNotFound, mentions: "nope"},
		{
			name: "provider of another type", change: allow("web", "kv:read"), payload: "web|x",
			want: provider.ErrInvalid, mentions: "is of type http and does not serve kv",
		},
		{
			name: "provider that was not granted", payload: "there|x",
			want: provider.ErrDenied, mentions: "not granted provider there", next: "wasmatrix grant hello kv:read:x --provider there",
		},
		{
			name: "key that is not covered", payload: "|secret",
			want: provider.ErrDenied, mentions: "kv:read:secret: not covered by kv:read:orders/", next: "--allow kv:read:secret",
		},
		{name: "operation that is not covered", operation: "set", payload: "|orders/1", want: provider.ErrDenied, mentions: "kv:write:orders/1"},
		{
			name: "local provider that does not run", change: func(t *testing.T, n *node) {
				if err := n.host.Stop(t.Context(), "kv"); err != nil {
					t.Fatal(err)
				}
			},
			want: provider.ErrUnavailable, mentions: "kv", next: "wasmatrix provider get kv",
		},
		{
			name: "remote provider that does not run", payload: "there|x",
			change: there(func(r *provider.ProviderRecord) { r.Running, r.State = false, "stopped" }),
			want:   provider.ErrUnavailable, mentions: "it is stopped",
		},
		{
			name: "provider on no node", payload: "there|x",
			change: there(func(r *provider.ProviderRecord) { r.Node = "" }),
			want:   provider.ErrUnavailable, mentions: "placed on no node",
		},
		{
			name: "provider on an unknown node", payload: "there|x",
			change: there(func(r *provider.ProviderRecord) { r.Node = "n7" }),
			want:   provider.ErrUnavailable, mentions: "address of node n7",
		},
		{
			name: "instance that is gone", change: func(_ *testing.T, n *node) { n.dir.RemoveInstance("i") },
			want: provider.ErrInstanceNotFound,
		},
		{
			name: "instance with a newer generation elsewhere", change: func(_ *testing.T, n *node) {
				n.dir.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: "n2", Generation: 4})
			},
			want: provider.ErrDenied, mentions: "superseded by generation 4",
		},
		{
			name: "instance that is gone and names no granted provider", capability: "http", payload: "|x",
			change: func(_ *testing.T, n *node) { n.dir.RemoveInstance("i") },
			want:   provider.ErrInstanceNotFound,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, nil)
			if tt.change != nil {
				tt.change(t, n)
			}
			capability, operation, payload := tt.capability, tt.operation, tt.payload
			if capability == "" {
				capability = "kv"
			}
			if operation == "" {
				operation = "get"
			}
			if payload == "" {
				payload = "|orders/1"
			}
			answer, err := n.router.Port("i", 3, 5).Call(t.Context(), capability, operation, []byte(payload))
			wantError(t, err, tt.want, tt.mentions, tt.next)
			if answer != nil || len(n.remote.calls) != 0 {
				t.Errorf("a refused call was made: %q, %v", answer, n.remote.calls)
			}
		})
	}
}

func TestRevocationTakesEffectOnTheNextCall(t *testing.T) {
	n := newNode(t, nil)
	port := n.router.Port("i", 3, 5)
	call := func() error {
		_, err := port.Call(t.Context(), "kv", "get", []byte("|orders/1"))
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "kv", Permissions: set(t, "kv:write"), Bucket: "hello"})
	if err := call(); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("after the permission was revoked: %v", err)
	}
	n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "kv", Permissions: set(t, "kv:read"), Bucket: "hello"})
	if err := call(); err != nil {
		t.Errorf("after it was granted again: %v", err)
	}
	n.dir.RemoveAssignment("i", "kv")
	if err := call(); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("after the assignment was revoked: %v", err)
	}
}

// An error of a provider always reaches the guest as one of the sentinels.
func TestPortCompletesErrors(t *testing.T) {
	n := newNode(t, nil)
	var fail error
	n.kind.open = func(provider.Config) (provider.Provider, error) { return &fakeProvider{err: fail}, nil }
	port := n.router.Port("i", 3, 5)
	odd := errors.New("odd")
	tests := []struct{ from, want error }{
		{odd, provider.ErrInternal},
		{odd, odd},
		{fmt.Errorf("disk: %w", provider.ErrExhausted), provider.ErrExhausted},
		{provider.Errorf(provider.ErrConflict, "x"), provider.ErrConflict},
	}
	for _, tt := range tests {
		fail = tt.from
		if err := n.host.Start(t.Context(), "kv", provider.Config{ID: "kv"}); err != nil {
			t.Fatal(err)
		}
		if _, err := port.Call(t.Context(), "kv", "get", []byte("|orders/1")); !errors.Is(err, tt.want) {
			t.Errorf("%v became %v, want %v", tt.from, err, tt.want)
		}
	}
}

func TestPortKeepsTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, nil)
		n.kind.open = func(provider.Config) (provider.Provider, error) {
			return &fakeProvider{gate: make(chan struct{})}, nil
		}
		if err := n.host.Start(t.Context(), "kv", provider.Config{ID: "kv"}); err != nil {
			t.Fatal(err)
		}
		port := n.router.Port("i", 3, 5)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := port.Call(ctx, "kv", "get", []byte("|orders/1"))
		wantError(t, err, provider.ErrTimeout, "deadline", "")
		_, err = port.Call(ctx, "kv", "get", []byte("|orders/1"))
		wantError(t, err, provider.ErrTimeout, "deadline", "")
		gone, leave := context.WithCancel(t.Context())
		leave()
		_, err = port.Call(gone, "kv", "get", []byte("|orders/1"))
		wantError(t, err, provider.ErrCommunication, "cancelled", "")
	})
}

func TestMetricsCountByCodeAndTakeNoNamesFromGuests(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	n := newNode(t, func(c *provider.RouterConfig) { c.Registerer = reg })
	port := n.router.Port("i", 3, 5)
	for _, c := range [][3]string{
		{"kv", "get", "|orders/1"},
		{"kv", "get", "|orders/2"},
		{"kv", "get", "|secret"},
		{"kv", "made up by a guest", "|x"},
		{"made up", "get", "|x"},
	} {
		_, _ = port.Call(t.Context(), c[0], c[1], []byte(c[2]))
	}
	_, _ = n.router.Serve(t.Context(), provider.Caller{User: "u"}, provider.Request{Provider: "kv", Capability: "kv", Operation: "get", Payload: []byte("|x")})
	want := `
# HELP wasmatrix_capability_calls_served_total Capability calls that came from other nodes or users, by the code of their answer.
# TYPE wasmatrix_capability_calls_served_total counter
wasmatrix_capability_calls_served_total{capability="kv",code="OK",operation="get"} 1
# HELP wasmatrix_capability_calls_total Capability calls of guests on this node, by the code of their answer.
# TYPE wasmatrix_capability_calls_total counter
wasmatrix_capability_calls_total{capability="kv",code="OK",operation="get"} 2
wasmatrix_capability_calls_total{capability="kv",code="PERMISSION_DENIED",operation="get"} 1
wasmatrix_capability_calls_total{capability="unknown",code="INVALID_REQUEST",operation="unknown"} 2
`
	names := []string{"wasmatrix_capability_calls_total", "wasmatrix_capability_calls_served_total"}
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	if got := testutil.CollectAndCount(reg, "wasmatrix_capability_call_duration_seconds"); got != 1 {
		t.Errorf("%d duration series, want 1", got)
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) != 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	if _, err := provider.NewRouter(provider.RouterConfig{Directory: n.dir, Host: n.host, Registerer: reg}); err == nil {
		t.Error("a second router on one registry was accepted")
	}
}
