package provider_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// fleet is the replicas on other nodes, by address.
type fleet struct {
	mu     sync.Mutex
	answer map[string]func(provider.RemoteCall) ([]byte, error)
	down   map[string]bool
	calls  []string
	probes int
}

func (f *fleet) Invoke(_ context.Context, address string, call provider.RemoteCall) ([]byte, error) {
	f.mu.Lock()
	f.calls = append(f.calls, address)
	answer, down := f.answer[address], f.down[address]
	f.mu.Unlock()
	switch {
	case down:
		return nil, provider.Errorf(provider.ErrCommunication, "no route").OnTheWay()
	case answer != nil:
		return answer(call)
	default:
		return []byte(address), nil
	}
}

func (f *fleet) Probe(_ context.Context, address string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.probes++
	if f.down[address] {
		return errors.New("no route")
	}
	return nil
}

func (f *fleet) set(address string, down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down[address] = down
}

func (f *fleet) took() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// spread is node n1 with an instance that may use provider "many" of replicas on nodes.
func spread(t *testing.T, nodes ...string) (*node, *fleet, *provider.Port) {
	t.Helper()
	f := &fleet{answer: map[string]func(provider.RemoteCall) ([]byte, error){}, down: map[string]bool{}}
	n := newNode(t, func(c *provider.RouterConfig) { c.Remote = f })
	for i, at := range nodes {
		n.dir.PutProvider(provider.ProviderRecord{ID: "many", Replica: uint32(i), Type: "kv", Node: at, Running: true, State: "running"})
		n.dir.PutNode(provider.NodeRecord{ID: at, AgentAddress: at + ":1"})
	}
	n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "many", Permissions: set(t, "kv:read", "kv:write"), Bucket: "b"})
	return n, f, n.router.Port("i", 3, 5)
}

// idle lets what carried calls to other nodes end before a bubble does.
func idle() { time.Sleep(time.Second) }

func TestTheReplicaOfThisNodeComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, f, port := spread(t, "n2", "n1", "n3")
		start(t, n.host, "many")
		for range 10 {
			if got, err := port.Call(t.Context(), "kv", "set", []byte("many|x")); err != nil || !strings.HasPrefix(string(got), "i/hello/3/b/set") {
				t.Fatalf("%q, %v", got, err)
			}
		}
		if took := f.took(); len(took) > 0 {
			t.Fatalf("calls went to %v", took)
		}
		n.host.Drain("many")
		if got, err := port.Call(t.Context(), "kv", "set", []byte("many|x")); err != nil || !strings.HasSuffix(string(got), ":1") {
			t.Fatalf("while it drains: %q, %v", got, err)
		}
		if took := f.took(); len(took) != 1 {
			t.Fatalf("calls went to %v", took)
		}
		idle()
	})
}

func TestReplicasAreChosenFairly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, f, port := spread(t, "n2", "n3", "n4")
		call := func() {
			if _, err := port.Call(t.Context(), "kv", "get", []byte("many|x")); err != nil {
				t.Error(err)
			}
		}
		for range 90 {
			call()
		}
		count := map[string]int{}
		for _, at := range f.took() {
			count[at]++
		}
		if count["n2:1"] != 30 || count["n3:1"] != 30 || count["n4:1"] != 30 {
			t.Errorf("in turn: %v", count)
		}
		// One that is slow gets no more than it can answer.
		release := make(chan struct{})
		f.answer["n3:1"] = func(provider.RemoteCall) ([]byte, error) { <-release; return nil, nil }
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(call)
			synctest.Wait()
		}
		f.took()
		for range 50 {
			call()
		}
		if took := f.took(); slices.Contains(took, "n3:1") {
			t.Errorf("calls went to the slow one: %v", took)
		}
		close(release)
		wg.Wait()
		idle()
	})
}

func TestFailOver(t *testing.T) {
	unknown := func(kind error) error {
		return provider.Errorf(kind, "no answer").With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
	for _, c := range []struct {
		name      string
		operation string
		first     error
		next      bool // the call goes to the next replica
	}{
		{"never sent", "set", provider.Errorf(provider.ErrCommunication, "x"), true},
		{"does not serve", "set", provider.Errorf(provider.ErrUnavailable, "x"), true},
		{"sent, and no answer", "set", unknown(provider.ErrCommunication), false},
		{"cut off", "set", unknown(provider.ErrUnavailable), false},
		{"sent, and no answer, but it may be made twice", "get", unknown(provider.ErrCommunication), true},
		{"too late", "get", unknown(provider.ErrTimeout), false},
		{"denied", "get", provider.Errorf(provider.ErrDenied, "x"), false},
		{"a conflict", "get", provider.Errorf(provider.ErrConflict, "x"), false},
		{"broken", "get", provider.Errorf(provider.ErrInternal, "x"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, f, port := spread(t, "n2", "n3")
				failed := ""
				for _, at := range []string{"n2:1", "n3:1"} {
					f.answer[at] = func(call provider.RemoteCall) ([]byte, error) {
						if failed == "" {
							failed = at
							if !call.Once {
								t.Error("the first is tried for long")
							}
							return nil, c.first
						}
						return []byte("from " + at), nil
					}
				}
				got, err := port.Call(t.Context(), "kv", c.operation, []byte("many|x"))
				if calls := f.took(); c.next != (err == nil && len(calls) == 2 && calls[0] != calls[1]) || !c.next && (!errors.Is(err, c.first) || len(calls) != 1) {
					t.Errorf("%q, %v after %v", got, err, calls)
				}
				idle()
			})
		})
	}
}

func TestReplicasThatDoNotRunAreSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, f, port := spread(t, "n2", "n3")
		n.dir.PutProvider(provider.ProviderRecord{ID: "many", Replica: 1, Type: "kv", Node: "n3", State: "draining"})
		for range 10 {
			if _, err := port.Call(t.Context(), "kv", "get", []byte("many|x")); err != nil {
				t.Fatal(err)
			}
		}
		if took := f.took(); slices.Contains(took, "n3:1") {
			t.Fatalf("calls went to the one that drains: %v", took)
		}
		n.dir.PutProvider(provider.ProviderRecord{ID: "many", Replica: 0, Type: "kv", Node: "n2", State: "stopped"})
		_, err := port.Call(t.Context(), "kv", "get", []byte("many|x"))
		wantError(t, err, provider.ErrUnavailable, "stopped", "wasmatrix provider get many")
		if took := f.took(); len(took) > 0 {
			t.Fatalf("calls went to %v", took)
		}
		idle()
	})
}

// One that cannot be reached is left alone, and found again within about a second.
func TestTheBreakerOpensAndClosesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, f, port := spread(t, "n2")
		call := func() error {
			_, err := port.Call(t.Context(), "kv", "set", []byte("many|x"))
			return err
		}
		f.set("n2:1", true)
		for range 3 {
			wantError(t, call(), provider.ErrCommunication, "no route", "")
		}
		began := time.Now()
		f.took()
		for range 50 {
			err := call()
			wantError(t, err, provider.ErrCommunication, "could not be reached by the last calls; the next is made after", "wasmatrix node list")
			if e, _ := errors.AsType[*provider.Error](err); e.Details["until"] == "" || e.Details[provider.DetailOutcome] != "" {
				t.Fatalf("details %v", e.Details)
			}
		}
		if took := f.took(); len(took) > 0 || time.Since(began) > 0 {
			t.Fatalf("calls went to %v and took %s", took, time.Since(began))
		}
		for range 5 { // it stays away: one probe at a time, and never a call
			time.Sleep(time.Second)
			wantError(t, call(), provider.ErrCommunication, "could not be reached", "")
			wantError(t, call(), provider.ErrCommunication, "could not be reached", "")
		}
		if took := f.took(); len(took) > 0 || f.probes != 5 {
			t.Fatalf("calls went to %v after %d probes", took, f.probes)
		}
		f.set("n2:1", false)
		recovered := time.Now()
		for call() != nil {
			time.Sleep(10 * time.Millisecond)
			if time.Since(recovered) > time.Second {
				t.Fatal("it is still hidden a second after it recovered")
			}
		}
		idle()
	})
}

func TestOneThatIsDownCostsOthersNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, f, port := spread(t, "n2", "n3")
		f.set("n2:1", true)
		for range 100 {
			if _, err := port.Call(t.Context(), "kv", "set", []byte("many|x")); err != nil {
				t.Fatal(err)
			}
		}
		down := 0
		for _, at := range f.took() {
			if at == "n2:1" {
				down++
			}
		}
		if down != 3 {
			t.Errorf("%d calls went to the one that is down, want 3", down)
		}
		// It is found again although the other one answers every call.
		f.set("n2:1", false)
		for recovered := time.Now(); !slices.Contains(f.took(), "n2:1"); time.Sleep(10 * time.Millisecond) {
			if _, err := port.Call(t.Context(), "kv", "set", []byte("many|x")); err != nil {
				t.Fatal(err)
			}
			if time.Since(recovered) > 1300*time.Millisecond {
				t.Fatal("it is still hidden")
			}
		}
		idle()
	})
}

func TestDirectoryOfReplicasAndSubscriptions(t *testing.T) {
	d := provider.NewDirectory("n1")
	for i, at := range []string{"n3", "n1", "n2"} {
		d.PutProvider(provider.ProviderRecord{ID: "bus", Replica: uint32(2 - i), Type: "messaging", Node: at})
	}
	nodes := func() string {
		var out []string
		for _, r := range d.Replicas("bus") {
			out = append(out, fmt.Sprintf("%d@%s", r.Replica, r.Node))
		}
		return strings.Join(out, " ")
	}
	if got := nodes(); got != "0@n2 1@n1 2@n3" {
		t.Fatal(got)
	}
	if rec, ok := d.Provider("bus"); !ok || rec.Replica != 1 {
		t.Fatalf("the nearest is %+v", rec)
	}
	d.RemoveProvider("bus/1")
	d.RemoveProvider("bus/7")
	d.RemoveProvider("bus/x")
	if got := nodes(); got != "0@n2 2@n3" {
		t.Fatal(got)
	}
	d.RemoveProvider("bus")
	d.RemoveProvider("bus/2")
	if _, ok := d.Provider("bus"); ok || nodes() != "" {
		t.Fatal(nodes())
	}

	d.PutInstance(provider.InstanceRecord{ID: "b", Name: "web", Node: "n2", Generation: 4, Created: 9})
	d.PutInstance(provider.InstanceRecord{ID: "a", Name: "web", Node: "n1", Generation: 1})
	grant := provider.Assignment{Provider: "bus", Permissions: set(t, "msg:subscribe:orders.>"), Subscriptions: []string{"orders.new", "users.new", "orders.*"}}
	for _, id := range []string{"a", "b", "unknown"} {
		grant.Instance = id
		d.PutAssignment(grant)
	}
	subjects := func() string {
		var out []string
		for _, s := range d.Subscriptions("bus") {
			out = append(out, s.Instance+":"+s.Subject)
		}
		return strings.Join(out, " ")
	}
	if got, want := subjects(), "a:orders.* b:orders.* a:orders.new b:orders.new"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	if got := d.Subscriptions("bus")[1]; got != (provider.Subscription{Instance: "b", Name: "web", Node: "n2", Generation: 4, Created: 9, Provider: "bus", Subject: "orders.*"}) {
		t.Fatalf("%+v", got)
	}
	grant.Instance, grant.Permissions = "a", set(t, "msg:publish")
	d.PutAssignment(grant)
	d.RemoveAssignment("b", "bus")
	if got := subjects(); got != "" {
		t.Fatalf("after the revocation: %s", got)
	}
}
