package provider_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/wasmatrix/wasmatrix/provider"
)

// What is refused for want of a grant is told once, by the side that decided; what
// is refused for other reasons is not.
func TestDenialsAreTold(t *testing.T) {
	var told []string
	registry := prometheus.NewPedanticRegistry()
	n := newNode(t, func(c *provider.RouterConfig) {
		c.SettleWithin, c.Registerer = -1, registry
		c.Denied = func(_ context.Context, d provider.Denial) {
			told = append(told, fmt.Sprintf("%s %s %q %s", d.Instance, d.Name, d.Provider, d.Need))
		}
	})
	n.dir.PutInstance(provider.InstanceRecord{ID: "bare", Name: "bare", Node: "n1", Generation: 1})
	port := n.router.Port("i", 3, 5)
	for _, c := range []struct {
		name string
		call func() error
		want string // what is told; "" for nothing
	}{
		{"not covered", func() error { _, err := port.Call(t.Context(), "kv", "get", []byte("|x")); return err }, `i hello "kv" kv:read:x`},
		{"not assigned", func() error { _, err := port.Call(t.Context(), "kv", "set", []byte("there|x")); return err }, `i hello "there" kv:write:x`},
		{"granted none", func() error {
			_, err := n.router.Port("bare", 1, 0).Call(t.Context(), "kv", "get", []byte("|x"))
			return err
		}, `bare bare "" kv:read:x`},
		{"by the provider's node", func() error {
			_, err := n.router.Serve(t.Context(), provider.Caller{Instance: "far", Generation: 7, Node: "n2"}, provider.Request{
				Provider: "web", Capability: "http", Operation: "get", Payload: []byte("|x"),
			})
			return err
		}, `far far "web" http:domain:x`},
		{"an older generation", func() error {
			_, err := n.router.Port("i", 2, 5).Call(t.Context(), "kv", "get", []byte("|orders/1"))
			return err
		}, ""},
		{"from another node", func() error {
			_, err := n.router.Serve(t.Context(), provider.Caller{Instance: "far", Generation: 7, Node: "n9"}, kvRequest("get", "|x"))
			return err
		}, ""},
		{"malformed", func() error { _, err := port.Call(t.Context(), "kv", "drop", []byte("|x")); return err }, ""},
	} {
		told = nil
		if err := c.call(); err == nil {
			t.Errorf("%s: it was allowed", c.name)
		}
		if want := []string{c.want}; c.want == "" && len(told) > 0 || c.want != "" && !slices.Equal(told, want) {
			t.Errorf("%s: told %q, want %q", c.name, told, c.want)
		}
	}
	if n, err := testutil.GatherAndCount(registry, "wasmatrix_capability_denials_total"); err != nil || n != 3 {
		t.Errorf("%d series of denials: %v", n, err)
	}
}
