package remote_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// Two replicas on other nodes, one of which goes away and comes back: no call is
// lost, though none may be made twice, and both are used again afterwards.
func TestReplicasOnOtherNodes(t *testing.T) {
	p := newPair(t)
	c := p.agent(t, "c", -1)
	for _, x := range []*agent{p.a, p.b, c} {
		x.dir.PutNode(provider.NodeRecord{ID: "c", AgentAddress: "c:1"})
		x.dir.PutProvider(provider.ProviderRecord{ID: "kv", Replica: 1, Type: "kv", Node: "c", Running: true, State: "running"})
	}
	c.dir.Replace(records(t))
	c.dir.PutProvider(provider.ProviderRecord{ID: "kv", Replica: 1, Type: "kv", Node: "c", Running: true, State: "running"})
	if err := c.host.Start(t.Context(), "kv", provider.Config{ID: "kv", Driver: "memory"}); err != nil {
		t.Fatal(err)
	}
	// Each keeps its own keys in memory, so a key tells which one was asked.
	on := func(x *agent, key string) bool {
		port := x.router.Port("i", 3, 5)
		x.dir.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: x.id, NodeEpoch: 5, Generation: 3})
		defer x.dir.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: "a", NodeEpoch: 5, Generation: 3})
		answer, err := port.Call(t.Context(), "kv", "get", getRequest(t, key))
		return err == nil && len(answer) > 0
	}
	calls := func(n int) (b, both int) {
		for range n {
			key := "orders/" + time.Now().Format(time.RFC3339Nano)
			if err := p.set(t, key, "x"); err != nil {
				t.Fatalf("a call failed: %v", err)
			}
			atB, atC := on(p.b, key), on(c, key)
			if atB {
				b++
			}
			if atB == atC {
				both++
			}
		}
		return b, both
	}
	if b, both := calls(40); b != 20 || both > 0 {
		t.Fatalf("%d of 40 at one of two, %d at both or none", b, both)
	}
	p.b.server.Stop()
	// A call on a connection whose end has not been heard of would rightly fail.
	ended, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := p.a.client.Probe(ended, "b:1"); err == nil {
		t.Fatal("the one that is away answers")
	}
	if b, both := calls(40); b > 0 || both > 0 {
		t.Fatalf("%d of 40 at the one that is away, %d at both or none", b, both)
	}
	p.serve(t, p.listen("b:1"), p.issue(t, identity.Node, "b", identity.RoleWorker), served(remote.NewServer(p.b.router)))
	deadline := time.Now().Add(20 * time.Second)
	for b := 0; b == 0; b, _ = calls(2) {
		if time.Now().After(deadline) {
			t.Fatal("the one that came back is not used")
		}
	}
	// A provider that drains is none of the breaker's business: the other one takes over.
	p.b.host.Drain("kv")
	if b, both := calls(20); b > 0 || both > 0 {
		t.Fatalf("%d of 20 at the one that drains, %d at both or none", b, both)
	}
	c.host.Drain("kv")
	if err := p.set(t, "orders/x", "x"); !errors.Is(err, provider.ErrUnavailable) {
		t.Fatalf("with both away: %v", err)
	}
}
