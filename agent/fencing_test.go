package agent

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func leaving(inst *pb.Instance) { inst.Leaving = true }

// left returns the reports of an instance that it has left its node.
func (p *fakePeer) left(id string) (out []*pb.InstanceReport) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, batch := range p.batches {
		for _, r := range batch.GetInstances() {
			if r.GetInstanceId() == id && r.GetLeft() {
				out = append(out, r)
			}
		}
	}
	return out
}

func (p *fakePeer) states(id string) (out []pb.InstanceState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, st := range p.instances[id] {
		out = append(out, st.GetState())
	}
	return out
}

func TestALeavingInstanceEndsBeforeItIsReportedToHaveLeft(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.OnStop(slowStop(3 * time.Second))
		leader.put(putInstance(instance(leader, "web-1", leaving)))
		still(t, 2900*time.Millisecond, "it is not said to have left", func() bool { return len(leader.left("web-1")) == 0 })
		within(t, 200*time.Millisecond, "it has left", func() bool { return len(leader.left("web-1")) > 0 })
		if len(agent.fake.Running()) != 0 {
			t.Fatal("it was reported to have left and runs")
		}
		r := leader.left("web-1")[0]
		if r.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_STOPPED || r.GetStatus().GetGeneration() != 1 {
			t.Fatalf("reported %v", r)
		}
		// Whatever comes, this generation may run elsewhere as the next one by now.
		leader.put(putInstance(instance(leader, "web-1", func(i *pb.Instance) { i.RestartEpoch = 1 })))
		still(t, time.Minute, "it never runs again here", agent.running())
		leader.put(removeInstance("web-1"))
		leader.put(putInstance(instance(leader, "web-1", generation(2))))
		within(t, time.Second, "the next generation runs, if it comes back", agent.running("web-1"))
	})
}

// An instance that waits, or does not run for another reason, leaves too.
func TestAnInstanceWithoutAGuestLeaves(t *testing.T) {
	for name, before := range map[string]func(agent *node, leader *fakePeer) *pb.Instance{
		"new": func(_ *node, leader *fakePeer) *pb.Instance { return instance(leader, "web-1", leaving) },
		"waiting to start again": func(agent *node, leader *fakePeer) *pb.Instance {
			leader.put(putInstance(instance(leader, "web-1")))
			within(agent.t, time.Second, "it runs", agent.running("web-1"))
			agent.fake.Crash("web-1", trap)
			return instance(leader, "web-1", leaving)
		},
		"stopped, and wanted again": func(agent *node, leader *fakePeer) *pb.Instance {
			leader.put(putInstance(instance(leader, "web-1", stopped)))
			within(agent.t, time.Second, "it is stopped", func() bool {
				return slices.Contains(leader.states("web-1"), pb.InstanceState_INSTANCE_STATE_STOPPED)
			})
			return instance(leader, "web-1", leaving)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
				agent := start(t, testConfig(t, n))
				leader.put(putInstance(before(agent, leader)))
				within(t, time.Second, "it has left", func() bool { return len(leader.left("web-1")) > 0 })
				still(t, time.Minute, "it does not run", agent.running())
			})
		})
	}
}

// STOPPED lets an instance be placed elsewhere, so it is never said of a
// generation that runs again.
func TestAStopThatIsNotTheEndIsNotReportedAsOne(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1", stopOnDisconnect)))
		within(t, time.Second, "it runs", agent.running("web-1"))
		leader.put(putInstance(instance(leader, "web-1", stopOnDisconnect, func(i *pb.Instance) { i.RestartEpoch = 1 })))
		within(t, time.Second, "it runs again after the restart", func() bool {
			return agent.running("web-1")() && leader.reported("web-1").GetAttempt() == 2
		})
		leader.isolate(false)
		within(t, 2*testTTL, "it ends with the lease", agent.running())
		leader.heal()
		within(t, 2*testTTL, "it runs again with the lease", func() bool {
			return agent.running("web-1")() && leader.reported("web-1").GetAttempt() == 3
		})
		if got := leader.states("web-1"); slices.Contains(got, pb.InstanceState_INSTANCE_STATE_STOPPED) {
			t.Fatalf("reported %v", got)
		}
	})
}

// A node that lost its epoch and got another one: what was placed in the old one
// has no part in the new lease, not even for the moment until it is ended.
func TestTheLeaseOfANewEpochDoesNotCoverWhatWasPlacedBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		l := newLease(func() time.Duration { return time.Since(began) }, false, func() {})
		l.begin(1, l.now(), testTTL)
		old := tenure{lease: l, epoch: 1}
		call, release, err := l.bind(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		if _, held := old.Ends(); !held || !l.covers(1) || l.covers(2) {
			t.Fatal("the lease of the first epoch is not held")
		}
		l.begin(2, l.now(), testTTL)
		if _, held := old.Ends(); held || l.covers(1) || !l.covers(2) {
			t.Fatal("the lease of the second epoch covers the first")
		}
		if call.Err() == nil {
			t.Fatal("a call of the first epoch goes on")
		}
		if _, _, err := l.bind(t.Context(), 1); err == nil {
			t.Fatal("a call of the first epoch was let in")
		}
		if at, held := (tenure{lease: l, epoch: 2}).Ends(); !held || at != l.now()+testTTL-testTTL/10 {
			t.Fatalf("the lease ends at %s, held: %t", at, held)
		}
	})
}

// frozen is an agent's process that stands still: its clock goes on, its timers
// do not fire. Nothing it does after it wakes up may be an effect.
func TestWakingUpIsNoEffect(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		var asleep atomic.Int64
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind), func(cfg *Config) {
			clock := cfg.Clock
			cfg.Clock = func() time.Duration { return clock() + time.Duration(asleep.Load()) }
		}))
		grant := &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: &pb.CapabilityAssignment{
			InstanceId: "tied-1", ProviderId: "kv", Permissions: []string{"kv:read"}, Bucket: "b",
		}}}
		tied := instance(leader, "tied-1", stopOnDisconnect)
		leader.put(putProvider(), grant, putInstance(tied))
		within(t, time.Second, "it runs", agent.running("tied-1"))
		h := agent.hostOf(tied, agent.logs.open("x", "x"))
		call := func() error {
			_, err := h.Call(t.Context(), "kv", "get", nil)
			return err
		}
		within(t, time.Second, "it may call", func() bool { return call() == nil })
		asleep.Store(int64(testTTL))
		if err := call(); err == nil {
			t.Fatal("the first thing after waking up was an effect")
		}
	})
}

// slowPort is a way out with a call that got no answer.
type slowPort struct {
	portFunc
	settles time.Duration

	mu    sync.Mutex
	ended time.Time
}

func (p *slowPort) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = time.Now()
}

func (p *slowPort) Settle(ctx context.Context) error {
	select {
	case <-time.After(p.settles):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The end of an instance is reported when its last call cannot have an effect any
// more, and not before.
func TestTheEndIsReportedAfterTheLastPossibleEffect(t *testing.T) {
	for name, c := range map[string]struct {
		end   func(agent *node, leader *fakePeer)
		waits bool
	}{
		"a move":      {func(_ *node, leader *fakePeer) { leader.put(putInstance(instance(leader, "web-1", leaving))) }, true},
		"a stop":      {func(_ *node, leader *fakePeer) { leader.put(putInstance(instance(leader, "web-1", stopped))) }, true},
		"its own end": {func(agent *node, _ *fakePeer) { agent.fake.Crash("web-1", completed) }, true},
		"a restart here": {func(_ *node, leader *fakePeer) {
			leader.put(putInstance(instance(leader, "web-1", func(i *pb.Instance) { i.RestartEpoch = 1 })))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
				agent := start(t, testConfig(t, n))
				out := &slowPort{settles: 20 * time.Second}
				agent.service.ports = func(*pb.Instance) port { return out }
				leader.put(putInstance(instance(leader, "web-1")))
				within(t, time.Second, "it runs", agent.running("web-1"))
				c.end(agent, leader)
				over := func() bool {
					return slices.ContainsFunc(leader.states("web-1"), func(s pb.InstanceState) bool {
						return s == pb.InstanceState_INSTANCE_STATE_STOPPED || s == pb.InstanceState_INSTANCE_STATE_COMPLETED
					}) || leader.reported("web-1").GetAttempt() == 2
				}
				if c.waits {
					still(t, 19*time.Second, "its end is not reported", func() bool { return !over() })
				}
				within(t, 2*time.Second, "its end is reported, or it runs again", over)
				out.mu.Lock()
				defer out.mu.Unlock()
				if out.ended.IsZero() {
					t.Error("its way out was not closed")
				}
			})
		})
	}
}

// A row of crashes goes on on the node that an instance moved to.
func TestRetriesGoOnInTheNextGeneration(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		policy := restart(&pb.RestartPolicy{MaxRetries: 3})
		leader.put(putInstance(instance(leader, "web-1", policy)))
		for range 2 {
			within(t, 10*time.Second, "it runs", agent.running("web-1"))
			agent.fake.Crash("web-1", trap)
			within(t, time.Second, "it has crashed", agent.running())
		}
		within(t, 10*time.Second, "it runs again", agent.running("web-1"))
		leader.put(putInstance(instance(leader, "web-1", policy, leaving)))
		within(t, time.Second, "it has left", func() bool { return len(leader.left("web-1")) > 0 })
		last := leader.reported("web-1")
		if last.GetRetries() != 2 || last.GetCrashCount() != 2 {
			t.Fatalf("it left with %v", last)
		}
		// As the registry hands it to the next node, which knows nothing of it.
		leader.put(removeInstance("web-1"))
		moved := instance(leader, "web-1", policy, generation(2))
		moved.Status = &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_ASSIGNED, Generation: 2, Retries: 2, CrashCount: 2}
		leader.put(putInstance(moved))
		within(t, time.Second, "its next generation runs", agent.running("web-1"))
		agent.fake.Crash("web-1", trap)
		within(t, 10*time.Second, "it has its last try", func() bool {
			return agent.running("web-1")() && leader.reported("web-1").GetRetries() == 3
		})
		agent.fake.Crash("web-1", trap)
		within(t, time.Second, "it has failed", func() bool {
			return leader.reported("web-1").GetState() == pb.InstanceState_INSTANCE_STATE_FAILED
		})
		// A user gives it all its tries anew.
		moved = instance(leader, "web-1", policy, generation(2), func(i *pb.Instance) { i.RestartEpoch = 1 })
		moved.Status = leader.reported("web-1")
		leader.put(putInstance(moved))
		within(t, time.Second, "it runs", func() bool { return agent.running("web-1")() && leader.reported("web-1").GetRetries() == 0 })
	})
}
