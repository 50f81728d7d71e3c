package kv_test

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

func TestNatsConforms(t *testing.T) {
	s := natsServer(t)
	var n atomic.Int64
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{ID: "kv", Driver: "nats", Settings: map[string]string{
			"url": "nats://" + s.address, "namespace": fmt.Sprintf("test-%d", n.Add(1)),
		}})
	})
}

// Three servers keep each write on two of them at least; what is not the leader
// answers no read.
func TestNatsClusterConforms(t *testing.T) {
	t.Parallel()
	var routes, clients []string
	for range 3 {
		routes, clients = append(routes, freeAddress(t)), append(clients, "")
	}
	for i, route := range routes {
		s := natsServer(t, fmt.Sprintf("server_name: n%d", i),
			fmt.Sprintf(`cluster { name: c, listen: %q, routes: ["nats://%s"] }`, route, strings.Join(routes, `", "nats://`)))
		clients[i] = s.address
	}
	settings := map[string]string{"url": "nats://" + strings.Join(clients, ","), "replicas": "3"}
	var n atomic.Int64
	next := func(now func() time.Time) (provider.Provider, error) {
		settings["namespace"] = fmt.Sprintf("test-%d", n.Add(1))
		return kv.New(kv.Options{Now: now}).Open(t.Context(), provider.Config{ID: "kv", Driver: "nats", Settings: settings})
	}
	until(t, "the cluster has a leader", func() bool {
		p, err := next(nil)
		return err == nil && p.Close() == nil
	})
	// Where a cluster could differ; a stream of it takes a second to make.
	onACluster := []string{
		"values_of_every_size_replace_one_another", "versions_grow_and_never_repeat", "list_pages_are_bounded_in_bytes",
		"concurrent_increments_by_cas_add_up", "of_two_generations_that_race_none_comes_back",
	}
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		name := strings.TrimPrefix(t.Name(), "TestNatsClusterConforms/")
		if !slices.Contains(onACluster, name) {
			t.Skip("TestNatsConforms runs it")
		}
		p, err := next(now)
		if err != nil {
			t.Fatal(err)
		}
		return p
	})
}
