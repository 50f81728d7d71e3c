package agent

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/runtime"
)

func TestStepProvider(t *testing.T) {
	now := stepNow
	rec := func(change ...func(*pb.Provider)) *pb.Provider {
		p := &pb.Provider{DesiredRunning: true, SpecVersion: 1, Placement: &pb.Placement{Generation: 2, NodeEpoch: 5}}
		for _, c := range change {
			c(p)
		}
		return p
	}
	off := func(p *pb.Provider) { p.DesiredRunning = false }
	updated := func(p *pb.Provider) { p.SpecVersion = 2 }
	started := func(p *pb.Provider) { p.Placement.Generation = 3 }
	returned := func(p *pb.Provider) { p.Placement.Generation, p.Placement.NodeEpoch = 3, 6 }
	open := providerHave{open: true, generation: 2, nodeEpoch: 5, specVersion: 1}
	another := func(p *pb.Provider) { p.Replica = 2 }
	refused := open
	refused.tried, refused.due = 2, now.Add(time.Second)
	failed := providerHave{generation: 2, nodeEpoch: 5, specVersion: 1, due: now.Add(time.Second)}
	closed := providerHave{stopped: true, generation: 2, nodeEpoch: 5, specVersion: 1}
	for _, c := range []struct {
		name     string
		want     *pb.Provider
		have     providerHave
		shutdown bool
		step     providerStep
	}{
		{"a new one is opened", rec(), providerHave{}, false, providerOpen},
		{"one to be stopped is told so", rec(off), providerHave{}, false, providerClose},
		{"an open one rests", rec(), open, false, providerRest},
		{"a new spec updates it", rec(updated), open, false, providerUpdate},
		{"a spec that could not be opened waits", rec(updated), refused, false, providerAwait},
		{"the next spec does not wait", rec(updated, func(p *pb.Provider) { p.SpecVersion = 3 }), refused, false, providerUpdate},
		{"nor does a new start", rec(started), refused, false, providerOpen},
		{"a new start opens it anew", rec(started), open, false, providerOpen},
		{"in a new epoch of the node it goes on", rec(returned), open, false, providerAdopt},
		{"and is updated after that", rec(returned, updated), open, false, providerAdopt},
		{"as another replica it goes on", rec(another), open, false, providerAdopt},
		{"a stop closes it", rec(off), open, false, providerClose},
		{"once closed it rests", rec(off), closed, false, providerRest},
		{"a start of a later generation opens it", rec(started), closed, false, providerOpen},
		{"a stop of a later generation is told too", rec(started, off), closed, false, providerClose},
		{"a failed one waits", rec(), failed, false, providerAwait},
		{"a new spec does not wait", rec(updated), failed, false, providerOpen},
		{"a new start does not wait", rec(started), failed, false, providerOpen},
		{"a stop of a failed one is told", rec(off), failed, false, providerClose},
		{"one that left is closed", nil, open, false, providerClose},
		{"and then forgotten", nil, closed, false, providerForget},
		{"a failed one that left is forgotten", nil, failed, false, providerForget},
		{"shutdown closes", rec(), open, true, providerClose},
		{"shutdown opens nothing", rec(), providerHave{}, true, providerForget},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := stepProvider(c.want, c.have, c.shutdown, now); got != c.step {
				t.Fatalf("step %d, want %d", got, c.step)
			}
		})
	}
	if got := stepProvider(rec(), failed, false, failed.due); got != providerOpen {
		t.Fatalf("when its time has come: step %d", got)
	}
	if got := stepProvider(rec(updated), refused, false, refused.due); got != providerUpdate {
		t.Fatalf("when the time of an update has come: step %d", got)
	}
}

// memoKind is a type of provider that answers with what it was opened with.
type memoKind struct {
	hold chan struct{} // calls wait for it, when it is set

	mu     sync.Mutex
	fail   error
	bad    string // the driver that does not open
	opened []provider.Config
	closed int
}

func (k *memoKind) Type() string { return "kv" }
func (k *memoKind) Demand(string, []byte) (provider.Demand, error) {
	return provider.Demand{Need: permission.Need{Capability: "kv", Action: "read", Resource: "key"}}, nil
}

func (k *memoKind) Open(_ context.Context, cfg provider.Config) (provider.Provider, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.opened = append(k.opened, cfg)
	if k.fail != nil {
		return nil, k.fail
	}
	if k.bad != "" && cfg.Driver == k.bad {
		return nil, errors.New("no such driver")
	}
	return &memo{kind: k, driver: cfg.Driver}, nil
}

func (k *memoKind) count() (opened, closed int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.opened), k.closed
}

type memo struct {
	kind   *memoKind
	driver string
}

func (k *memoKind) refuse(driver string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.bad = driver
}

func (m *memo) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	if m.kind.hold != nil {
		select {
		case <-m.kind.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return []byte(m.driver + " " + call.Bucket), nil
}

func (m *memo) Close() error {
	m.kind.mu.Lock()
	defer m.kind.mu.Unlock()
	m.kind.closed++
	return nil
}

func putProvider(change ...func(*pb.Provider)) *pb.AssignmentChange {
	p := &pb.Provider{
		Id: "kv", Spec: &pb.ProviderSpec{Id: "kv", Type: "kv", Driver: "memory"}, DesiredRunning: true, SpecVersion: 1,
		Placement: &pb.Placement{NodeId: testNode, NodeEpoch: 1, Generation: 1},
	}
	for _, c := range change {
		c(p)
	}
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutProvider{PutProvider: p}}
}

func (p *fakePeer) reportsProvider(state pb.ProviderState, generation uint64) func() bool {
	return func() bool {
		st := p.reportedProvider("kv")
		return st.GetState() == state && st.GetGeneration() == generation
	}
}

func withKind(k *memoKind) func(*Config) {
	return func(cfg *Config) { cfg.Kinds = map[string]provider.Kind{"kv": k} }
}

const providerRunning = pb.ProviderState_PROVIDER_STATE_RUNNING

func TestAPlacedProviderIsOpenedUpdatedAndStopped(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "it is reported as running", leader.reportsProvider(providerRunning, 1))
		if cfg := kind.opened[0]; cfg.Driver != "memory" || cfg.Dir != filepath.Join(agent.cfg.DataDir, "providers", "kv") {
			t.Fatalf("opened with %+v", cfg)
		}
		leader.put(putProvider(func(p *pb.Provider) { p.SpecVersion, p.Spec.Driver = 2, "bbolt" }))
		within(t, time.Second, "the new driver is open and the old one closed", func() bool {
			opened, closed := kind.count()
			return opened == 2 && closed == 1 && kind.opened[1].Driver == "bbolt" && leader.reportsProvider(providerRunning, 1)()
		})
		leader.put(putProvider(func(p *pb.Provider) { p.SpecVersion, p.DesiredRunning = 2, false }))
		within(t, time.Second, "it has stopped", leader.reportsProvider(pb.ProviderState_PROVIDER_STATE_STOPPED, 1))
		leader.put(putProvider(func(p *pb.Provider) { p.SpecVersion, p.Placement.Generation = 2, 2 }))
		within(t, time.Second, "it runs again", leader.reportsProvider(providerRunning, 2))
		leader.put(&pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveProvider{RemoveProvider: "kv"}})
		within(t, time.Second, "nothing is left of it", func() bool {
			opened, closed := kind.count()
			return opened == closed && len(agent.hosting.reports()) == 0
		})
	})
}

func TestAProviderThatDoesNotOpenIsTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{fail: errors.New("the disk is full")}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "the failure is reported", leader.reportsProvider(pb.ProviderState_PROVIDER_STATE_FAILED, 1))
		if got := leader.reportedProvider("kv").GetMessage(); got != "open provider kv: the disk is full" {
			t.Fatal(got)
		}
		if c := agent.component("providers"); c.Ready || c.Reason != "0 of 1 serve; kv is failed (open provider kv: the disk is full)" {
			t.Fatalf("health %+v", c)
		}
		<-time.After(5 * time.Minute)
		if opened, _ := kind.count(); opened < 10 || opened > 20 {
			t.Fatalf("tried %d times in five minutes", opened)
		}
		kind.mu.Lock()
		kind.fail = nil
		kind.mu.Unlock()
		within(t, 31*time.Second, "it runs", leader.reportsProvider(providerRunning, 1))
		if c := agent.component("providers"); !c.Ready {
			t.Fatalf("health %+v", c)
		}
	})
}

func TestAProviderOfAnotherNodeIsNotHosted(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider(func(p *pb.Provider) { p.Placement.NodeId = "n2" }))
		within(t, time.Second, "it is known", func() bool {
			rec, ok := agent.directory.Provider("kv")
			return ok && rec.Node == "n2"
		})
		leader.put(putProvider())
		within(t, time.Second, "once it moves here it is hosted", leader.reportsProvider(providerRunning, 1))
		leader.put(putProvider(func(p *pb.Provider) { p.Placement.NodeId, p.Placement.Generation = "n2", 2 }))
		within(t, time.Second, "once it has left it is closed", func() bool {
			_, closed := kind.count()
			return closed == 1
		})
	})
}

func TestAProviderOutlivesALostSession(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "it runs", leader.reportsProvider(providerRunning, 1))
		leader.isolate(true)
		<-time.After(time.Minute)
		leader.put(putProvider(func(p *pb.Provider) { p.Placement.NodeEpoch, p.Placement.Generation = 2, 2 }))
		leader.heal()
		within(t, 5*time.Second, "it is reported under its new generation", leader.reportsProvider(providerRunning, 2))
		if opened, closed := kind.count(); opened != 1 || closed != 0 {
			t.Fatalf("opened %d times and closed %d times: it had never stopped serving", opened, closed)
		}
	})
}

// echoKV answers with what its kv provider said, or with the code of the refusal.
func echoKV(ctx context.Context, _ runtime.Spec, host runtime.Host, _ runtime.Handler, _ []byte) ([]byte, error) {
	answer, err := host.Call(ctx, "kv", "get", nil)
	if f := (*runtime.Failure)(nil); errors.As(err, &f) {
		answer = []byte(strings.TrimPrefix(pb.ErrorCode(f.Code).String(), "ERROR_CODE_"))
	}
	return proto.Marshal(&pb.InvokeResponse{Payload: answer})
}

func TestAGuestCallsAProviderOfItsNode(t *testing.T) {
	served(t, func(t *testing.T, agent *node, leader *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		kind := &memoKind{}
		agent = agent.again(withKind(kind))
		client = agent.serve(t)
		agent.fake.OnInvoke(echoKV)
		grant := &pb.CapabilityAssignment{InstanceId: "web-1", ProviderId: "kv", Permissions: []string{"kv:read", "no:such:thing"}, Bucket: "web"}
		put := &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: grant}}
		leader.put(putProvider(), put, putInstance(instance(leader, "web-1", generation(2))))
		within(t, 5*time.Second, "both run", func() bool {
			return leader.reportsProvider(providerRunning, 1)() && leader.reports("web-1", stateRunning, 2)()
		})
		call := func() string {
			t.Helper()
			resp, err := client.InvokeInstance(ctx, invoke("web-1", "x"))
			if err != nil {
				t.Fatal(err)
			}
			return string(resp.GetResponse().GetPayload())
		}
		if got := call(); got != "memory web" {
			t.Fatalf("the guest got %q; an unreadable permission must not take the others along", got)
		}
		leader.put(&pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveAssignment{
			RemoveAssignment: &pb.AssignmentKey{InstanceId: "web-1", ProviderId: "kv"},
		}})
		within(t, time.Second, "the revocation is in effect", func() bool { return len(agent.directory.Assignments("web-1")) == 0 })
		if got := call(); got != "PERMISSION_DENIED" {
			t.Fatalf("after the revocation the guest got %q", got)
		}
	})
}

func TestAnInstanceTiedToTheLeaseHasNoEffectsAfterIt(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		grant := func(id string) *pb.AssignmentChange {
			return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: &pb.CapabilityAssignment{
				InstanceId: id, ProviderId: "kv", Permissions: []string{"kv:read"}, Bucket: "b",
			}}}
		}
		tied, free := instance(leader, "tied-1", stopOnDisconnect), instance(leader, "free-1")
		leader.put(putProvider(), grant("tied-1"), grant("free-1"), putInstance(tied), putInstance(free))
		within(t, time.Second, "both run", agent.running("tied-1", "free-1"))
		log := agent.logs.open("x", "x")
		hosts := []runtime.Host{agent.hostOf(tied, log), agent.hostOf(free, log)}
		works := func(h runtime.Host) bool {
			_, err := h.Call(t.Context(), "kv", "get", nil)
			return err == nil
		}
		within(t, time.Second, "both may call", func() bool { return works(hosts[0]) && works(hosts[1]) })
		leader.isolate(false)
		<-time.After(testTTL)
		if works(hosts[0]) || !works(hosts[1]) {
			t.Fatalf("after the lease the tied one may call: %t, the other: %t", works(hosts[0]), works(hosts[1]))
		}
	})
}

func TestProvidersAreClosedAtShutdown(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider(), putInstance(instance(leader, "web-1")))
		within(t, time.Second, "they run", func() bool {
			return leader.reportsProvider(providerRunning, 1)() && agent.running("web-1")()
		})
		agent.fake.OnStop(func(context.Context, runtime.Spec) error {
			if _, closed := kind.count(); closed > 0 {
				t.Error("a provider was closed before the guests that use it had ended")
			}
			return nil
		})
		agent.end()
		if opened, closed := kind.count(); opened != 1 || closed != 1 {
			t.Fatalf("opened %d, closed %d", opened, closed)
		}
		if st := leader.reportedProvider("kv"); st.GetState() != providerRunning {
			t.Fatalf("a provider that is still wanted was reported as %v", st)
		}
		if !slices.Equal(agent.fake.Running(), nil) {
			t.Fatal("a guest is left")
		}
	})
}
