package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	stateRunning = pb.InstanceState_INSTANCE_STATE_RUNNING
	stateStopped = pb.InstanceState_INSTANCE_STATE_STOPPED
)

func (p *fakePeer) reports(id string, state pb.InstanceState, generation uint64) func() bool {
	return func() bool {
		st := p.reported(id)
		return st.GetState() == state && st.GetGeneration() == generation
	}
}

func TestAnAssignedInstanceRunsAndIsReported(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n, func(cfg *Config) {
			cfg.Providers = []*pb.ProviderSpec{{Id: "kv", Type: "kv"}}
		}))
		within(t, time.Second, "the agent has a session", func() bool { return agent.component("session").Ready })
		if got := leader.registered.GetProviders(); len(got) != 1 || got[0].GetId() != "kv" {
			t.Fatalf("declared %v", got)
		}
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "the instance is reported as running", leader.reports("web-1", stateRunning, 1))
		st := leader.reported("web-1")
		if st.GetAttempt() != 1 || st.GetStartedAt() == nil {
			t.Fatalf("reported %v", st)
		}
		if got := leader.registered.GetInfo(); got.GetId() != testNode || got.GetPlatform() == "" || len(got.GetRuntimes()) != 1 {
			t.Fatalf("registered as %v", got)
		}
		told := leader.registered.GetInfo().GetRuntimeInfo()
		if len(told) != 1 || told[0].GetName() != "wasm" || !told[0].GetIsDefault() {
			t.Fatalf("it offers %v", told)
		}
	})
}

func TestTheAgentFollowsTheHintOfAFollower(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		follower, other := n.peer("p0"), n.peer("p2")
		follower.follows, other.follows = "p1", "p1"
		agent := start(t, testConfig(t, n))
		within(t, 100*time.Millisecond, "the agent has a session with the leader", func() bool {
			return agent.session.current().leader == "p1"
		})
		if follower.count("RegisterNode") != 1 || other.count("RegisterNode") != 0 {
			t.Fatalf("asked the follower %d times and the other %d times", follower.count("RegisterNode"), other.count("RegisterNode"))
		}
		leader.mu.Lock()
		leader.follows = "p2"
		leader.mu.Unlock()
		other.mu.Lock()
		other.follows, other.epoch, other.nextEpoch = "", 1, 1
		other.mu.Unlock()
		within(t, testTTL, "the agent is with the new leader in the same epoch", func() bool {
			st := agent.session.current()
			return st.leader == "p2" && st.epoch == 1
		})
	})
}

func TestTheSearchForALeaderIsPaced(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		second := n.peer("p2")
		leader.follows, second.follows = "p2", "p1" // each takes the other for the leader
		agent := start(t, testConfig(t, n))
		still(t, time.Minute, "there is no session", func() bool { return !agent.component("session").Ready })
		calls := leader.count("RegisterNode") + second.count("RegisterNode")
		if calls < 30 || calls > 400 {
			t.Fatalf("%d tries in a minute", calls)
		}
		leader.mu.Lock()
		leader.follows = ""
		leader.mu.Unlock()
		within(t, 3*time.Second, "the agent finds the leader", func() bool { return agent.component("session").Ready })
	})
}

func TestLosingTheControlPlaneStopsNothing(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		leader.isolate(false)
		still(t, 10*time.Minute, "it goes on", agent.running("web-1"))
		if agent.component("session").Ready || agent.component("lease").Ready {
			t.Fatalf("health: %+v", agent.Ready())
		}

		// What happens meanwhile is known to the registry after the return.
		agent.fake.Crash("web-1", trap)
		within(t, 5*time.Second, "it runs again", func() bool { return agent.state("web-1") == stateRunning })
		leader.heal()
		within(t, 5*time.Second, "the crash is reported", func() bool {
			st := leader.reported("web-1")
			return st.GetCrashCount() == 1 && st.GetAttempt() == 2 && st.GetState() == stateRunning
		})
		if st := agent.session.current(); st.epoch != 1 {
			t.Fatalf("the epoch is %d: the process lost only its connection", st.epoch)
		}
	})
}

func TestAReturningAgentReportsEverythingAnew(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")), putInstance(instance(leader, "web-2")))
		within(t, time.Second, "both run", func() bool {
			return leader.reports("web-1", stateRunning, 1)() && leader.reports("web-2", stateRunning, 1)()
		})
		leader.isolate(false)
		leader.mu.Lock()
		clear(leader.instances) // as a new leader, restored from an old snapshot
		leader.mu.Unlock()
		leader.heal()
		within(t, 5*time.Second, "both are reported again", func() bool {
			return leader.reports("web-1", stateRunning, 1)() && leader.reports("web-2", stateRunning, 1)()
		})
	})
}

func TestADeadEpochBringsANewOneAndEndsStaleGenerations(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")), putInstance(instance(leader, "web-2")))
		within(t, time.Second, "both run", agent.running("web-1", "web-2"))
		leader.isolate(true)
		leader.put(removeInstance("web-1"), putInstance(instance(leader, "web-2", generation(2))))
		still(t, time.Minute, "both go on", agent.running("web-1", "web-2"))
		leader.heal()
		within(t, 5*time.Second, "the new generation is reported", leader.reports("web-2", stateRunning, 2))
		within(t, time.Second, "only that runs", agent.running("web-2"))
		if got := agent.fake.Specs()[0].Generation; got != 2 {
			t.Fatalf("generation %d runs", got)
		}
		if st := agent.session.current(); st.epoch != 2 {
			t.Fatalf("the epoch is %d", st.epoch)
		}
		if agent.worker.status("web-1") != nil {
			t.Fatal("an instance that is assigned elsewhere is still known")
		}
	})
}

func TestARefusedEpochBringsANewOne(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		within(t, time.Second, "there is a session", func() bool { return agent.component("session").Ready })
		leader.mu.Lock()
		leader.strict, leader.epoch = true, 0 // expired without a word; a renewal meets a conflict
		leader.mu.Unlock()
		within(t, 2*time.Second, "there is a session in a new epoch", func() bool { return agent.session.current().epoch == 2 })
		if got := leader.count("RegisterNode"); got != 3 {
			t.Fatalf("it took %d registrations, want the first, the refused one, and a new one", got)
		}
	})
}

func TestAFullSetInSeveralMessagesCountsAsOne(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		leader.parts = 3
		ids := []string{"a-1", "a-2", "a-3", "a-4", "a-5"}
		for _, id := range ids {
			leader.put(putInstance(instance(leader, id)))
		}
		agent := start(t, testConfig(t, n))
		within(t, time.Second, "all run", agent.running(ids...))
		leader.lose(putInstance(instance(leader, "a-6"))) // the set comes again, in parts
		within(t, time.Second, "one more runs", agent.running(append(ids, "a-6")...))
		for _, id := range ids {
			if agent.fake.Starts(id) != 1 {
				t.Errorf("%s started %d times: a part was taken for the whole", id, agent.fake.Starts(id))
			}
		}
	})
}

func TestSearch(t *testing.T) {
	peers := []string{"a", "b", "c"}
	to := func(address string) hint { return hint{address: address} }
	var s search
	for i, c := range []struct {
		at   string
		hint hint
		wait time.Duration
	}{
		{"a", hint{}, 0},                         // next in the list
		{"b", to("x"), 0},                        // a hint is followed at once,
		{"x", to("y"), 0},                        // and again,
		{"y", to("z"), 0},                        // but not for ever;
		{"a", hint{}, searchBackoff.delay(1, 0)}, // the third that gave nothing ends the round
		{"b", to("c"), 0},                        // hints count anew
		{"c", to("b"), 0},                        //
		{"b", to("c"), 0},                        // too many in a row
		{"c", hint{}, 0},                         //
		{"a", hint{}, searchBackoff.delay(2, 0)}, // the second round waits longer
		{"b", hint{}, 0},                         //
		{"c", hint{}, 0},                         //
		{"a", hint{}, searchBackoff.delay(3, 0)}, //
		{"b", hint{}, 0},                         //
	} {
		if got := s.next(peers); got != c.at {
			t.Fatalf("try %d is of %q, want %q", i, got, c.at)
		}
		if got := s.failed(c.at, c.hint, 0, len(peers)); got != c.wait {
			t.Fatalf("after try %d it waits %s, want %s", i, got, c.wait)
		}
	}
	if s := newSearch("a"); s.next(peers) != "b" {
		t.Fatal("after a session with a, a is tried first again")
	}
	if s := newSearch("gone"); s.next(nil) != "" {
		t.Fatal("an address was found where there is none")
	}
}

func TestABatchThatWasNotAcknowledgedIsKept(t *testing.T) {
	r := newReporter(func(error) {})
	of := func(id string, attempt uint32) *pb.InstanceReport {
		return &pb.InstanceReport{InstanceId: id, Status: &pb.InstanceStatus{Attempt: attempt}}
	}
	first, old, newer := of("a-1", 1), of("a-2", 1), of("a-2", 2)
	r.instance(first)
	r.instance(old)
	r.provider(&pb.ProviderReport{ProviderId: "kv", Replica: 2, Status: &pb.ProviderStatus{}})
	batch := r.take("n1", 7)
	if len(batch.GetInstances()) != 2 || len(batch.GetProviders()) != 1 || batch.GetProviders()[0].GetReplica() != 2 || batch.GetEpoch() != 7 || r.take("n1", 7) != nil {
		t.Fatalf("took %v", batch)
	}
	r.instance(newer)
	r.done(batch, errGap)
	if r.instances["a-1"] != first || r.instances["a-2"] != newer || len(r.providers) != 1 {
		t.Fatalf("kept %v and %v", r.instances, r.providers)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.flush(ctx); err == nil {
		t.Fatal("there is nothing left to send, it says")
	}
	r.done(r.take("n1", 7), nil)
	if err := r.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestJoinParts(t *testing.T) {
	first := &pb.WatchAssignmentsResponse{Complete: true, More: true, AppliesTo: 0, ResultsIn: 1, Changes: make([]*pb.AssignmentChange, 2)}
	joined, err := joinParts(nil, first)
	if err != nil || joined.GetMore() {
		t.Fatalf("got %v, %v", joined, err)
	}
	last := &pb.WatchAssignmentsResponse{Complete: true, AppliesTo: 1, ResultsIn: 2, Changes: make([]*pb.AssignmentChange, 1)}
	if joined, err = joinParts(joined, last); err != nil || len(joined.GetChanges()) != 3 || joined.GetResultsIn() != 2 {
		t.Fatalf("got %v, %v", joined, err)
	}
	if _, err := joinParts(joined, last); !errors.Is(err, errGap) {
		t.Fatalf("a part that is missing gave %v", err)
	}
}

func TestAnInstanceTiedToTheLeaseStopsAtTheOwnDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "keep-1")), putInstance(instance(leader, "tied-1", stopOnDisconnect)))
		within(t, time.Second, "both run", agent.running("keep-1", "tied-1"))
		renewals := leader.count("Heartbeat")
		within(t, 2*time.Second, "a renewal comes", func() bool { return leader.count("Heartbeat") > renewals })
		renewed := time.Now()
		leader.isolate(false)
		var ended time.Time
		within(t, testTTL, "the tied one has ended", func() bool {
			ended = time.Now()
			return agent.running("keep-1")()
		})
		// The renewal was sent up to 10 ms before it was noticed here.
		own := testTTL - testTTL/10
		if took := ended.Sub(renewed); took > own || took < own-30*time.Millisecond {
			t.Fatalf("it ended %s after the renewal, want %s", took, own)
		}
		still(t, time.Minute, "it does not start without a lease", agent.running("keep-1"))
		leader.heal()
		within(t, 5*time.Second, "it runs again with the lease", agent.running("keep-1", "tied-1"))
	})
}

func TestAGapInTheDifferencesOpensTheStreamAnew(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "the first runs", agent.running("web-1"))
		opened := leader.count("WatchAssignments")
		leader.lose(putInstance(instance(leader, "web-2")))
		within(t, time.Second, "the second runs too", agent.running("web-1", "web-2"))
		if got := leader.count("WatchAssignments"); got != opened+1 {
			t.Fatalf("the stream was opened %d times more", got-opened)
		}
		if got := leader.count("RegisterNode"); got != 1 {
			t.Fatalf("a gap cost %d registrations", got-1)
		}
		leader.put(removeInstance("web-1"))
		within(t, time.Second, "differences go on", agent.running("web-2"))
	})
}

func TestReportsGatherWhileOneIsUnderWay(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		within(t, time.Second, "there is a session", func() bool { return agent.component("session").Ready })
		leader.mu.Lock()
		leader.mute = true
		leader.mu.Unlock()
		for _, id := range []string{"a-1", "a-2", "a-3", "a-4"} {
			leader.put(putInstance(instance(leader, id)))
		}
		within(t, time.Second, "all run", agent.running("a-1", "a-2", "a-3", "a-4"))
		leader.mu.Lock()
		leader.mute = false
		leader.mu.Unlock()
		within(t, reportTimeout+5*time.Second, "all are reported", func() bool {
			return !slices.ContainsFunc([]string{"a-1", "a-2", "a-3", "a-4"}, func(id string) bool {
				return leader.reported(id).GetState() != stateRunning
			})
		})
		leader.mu.Lock()
		defer leader.mu.Unlock()
		if len(leader.batches) != 1 {
			t.Fatalf("%d batches for what had gathered", len(leader.batches))
		}
	})
}

func TestARestartedAgentRunsItsJournalWithoutAControlPlane(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(
			putInstance(instance(leader, "web-1")), putInstance(instance(leader, "off-1", stopped)),
			putInstance(instance(leader, "done-1")), putInstance(instance(leader, "tied-1", stopOnDisconnect)),
		)
		within(t, time.Second, "they run", agent.running("web-1", "done-1", "tied-1"))
		agent.fake.Crash("done-1", completed)
		within(t, time.Second, "one has completed", func() bool {
			return agent.state("done-1") == pb.InstanceState_INSTANCE_STATE_COMPLETED
		})
		leader.isolate(false)

		agent = agent.again()
		within(t, journalPatience+time.Second, "what the journal wants runs", agent.running("web-1"))
		still(t, time.Minute, "and nothing else", agent.running("web-1"))
		leader.put(putInstance(instance(leader, "web-1", generation(2))), removeInstance("tied-1"))
		leader.heal()
		within(t, 5*time.Second, "the control plane's word replaces it", leader.reports("web-1", stateRunning, 2))
		if leader.registered.GetEpoch() != 0 {
			t.Fatal("a new process claimed the epoch of the old one")
		}
	})
}

func TestTheControlPlaneComesBeforeTheJournal(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.end()
		leader.put(removeInstance("web-1"))
		leader.mu.Lock()
		leader.delay = time.Second
		leader.mu.Unlock()
		agent = agent.again()
		still(t, 2*journalPatience, "what the journal wanted does not start", func() bool { return agent.fake.Starts("web-1") == 0 })
	})
}

func TestShutdownDrainsAndKeepsTheLease(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")), putInstance(instance(leader, "web-2")))
		within(t, time.Second, "both run", agent.running("web-1", "web-2"))
		agent.fake.OnStop(slowStop(5 * time.Second))
		began, renewals := time.Now(), leader.count("Heartbeat")
		agent.end()
		if took := time.Since(began); took < 5*time.Second || took > 6*time.Second {
			t.Fatalf("two instances that take 5 s each were drained in %s", took)
		}
		if leader.count("Heartbeat") < renewals+5 {
			t.Fatal("the lease was not renewed during the drain")
		}
		for _, id := range []string{"web-1", "web-2"} {
			if st := leader.reported(id); st.GetState() != pb.InstanceState_INSTANCE_STATE_STOPPING {
				t.Errorf("%s is still wanted and was reported as %v", id, st)
			}
		}
	})
}

func TestARefusedNodeSaysSo(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		cfg := testConfig(t, n)
		leader.isolate(true)
		agent := start(t, cfg)
		within(t, time.Second, "its health tells why", func() bool {
			c := agent.component("session")
			return !c.Ready && c.Reason == "none: p1: "+status.Error(codes.Unavailable, "cut off").Error()
		})
		if apierror.CodeOf(agent.session.current().err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
			t.Fatalf("the reason is %v", agent.session.current().err)
		}
	})
}
