package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// crashAtOnce makes every instance crash as soon as it serves.
func crashAtOnce(agent *node) {
	agent.fake.OnStart(func(spec runtime.Spec) error { return fmt.Errorf("unreachable: %w", runtime.ErrCrashed) })
}

func TestACrashingInstanceIsRetriedWithGrowingWaitsAndThenFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		crashAtOnce(agent)
		began := time.Now()
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Minute, "it has failed", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
		// 1 + 2 + 4 + 8 + 16 s, each up to 20 % shorter.
		if took := time.Since(began); took > 31*time.Second+100*time.Millisecond || took < 24*time.Second {
			t.Fatalf("five retries took %s", took)
		}
		st := leader.reported("web-1")
		if st.GetCrashCount() != 6 || st.GetAttempt() != 6 || st.GetNextRetryAt() != nil || st.GetMessage() == "" {
			t.Fatalf("reported %v", st)
		}
		still(t, 10*time.Minute, "it stays so", func() bool { return agent.fake.Starts("web-1") == 6 })
	})
}

// The registry learns which runtime was taken for a spec that names none, with
// what keeps the instance apart there.
func TestAnInstanceTellsItsRuntime(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n, func(c *Config) {
			c.Node.RuntimeInfo = []*pb.RuntimeInfo{{Name: "wasm", Isolation: "sandbox"}, {Name: "unknown", Isolation: "none"}}
		}))
		if got := agent.Agent.cfg.Node.GetRuntimeInfo(); len(got) != 1 {
			t.Fatalf("it offers %v, want what it has", got)
		}
		leader.put(putInstance(instance(leader, "web-1")), putInstance(instance(leader, "vm-1", func(i *pb.Instance) { i.Spec.Runtime = "microvm" })))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		if st := leader.reported("web-1"); st.GetRuntime() != "wasm" || st.GetIsolation() != "sandbox" {
			t.Fatalf("reported %v", st)
		}
		within(t, time.Minute, "it cannot", leader.reports("vm-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		if st := leader.reported("vm-1"); st.GetRuntime() != "microvm" || st.GetIsolation() != "" || !strings.Contains(st.GetMessage(), `no runtime "microvm"`) {
			t.Fatalf("reported %v", st)
		}
		agent.fake.Crash("web-1", trap)
		within(t, time.Second, "the crash is reported", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		if st := leader.reported("web-1"); st.GetRuntime() != "wasm" {
			t.Fatalf("reported %v", st)
		}
	})
}

func TestACrashedInstanceTellsWhenItStartsAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1", restart(&pb.RestartPolicy{Backoff: durationpb.New(10 * time.Second)}))))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		agent.fake.Crash("web-1", trap)
		within(t, time.Second, "the crash is reported", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		st := leader.reported("web-1")
		if st.GetReason() != pb.ExitReason_EXIT_REASON_TRAP || st.GetMessage() != "unreachable" || st.GetCrashCount() != 1 || st.GetFinishedAt() == nil {
			t.Fatalf("reported %v", st)
		}
		due := st.GetNextRetryAt().AsTime()
		if wait := time.Until(due); wait < 7*time.Second || wait > 10*time.Second {
			t.Fatalf("the next start is due in %s", wait)
		}
		within(t, 11*time.Second, "it runs again", leader.reports("web-1", stateRunning, 1))
		if late := leader.reported("web-1").GetStartedAt().AsTime().Sub(due); late < 0 || late > 10*time.Millisecond {
			t.Fatalf("it started %s after the time it told", late)
		}
	})
}

func TestRestartPoliciesOfEndings(t *testing.T) {
	exitCode := runtime.Exit{Reason: runtime.ExitCode, Code: 3, Message: "exit code 3"}
	for _, c := range []struct {
		name   string
		policy string
		exit   runtime.Exit
		state  pb.InstanceState
		starts int
	}{
		{"never leaves a crash as it is", "never", trap, pb.InstanceState_INSTANCE_STATE_FAILED, 1},
		{"never leaves a bad exit code as it is", "never", exitCode, pb.InstanceState_INSTANCE_STATE_FAILED, 1},
		{"on-failure leaves a completed command as it is", "on-failure", completed, pb.InstanceState_INSTANCE_STATE_COMPLETED, 1},
		{"on-failure starts after a bad exit code", "on-failure", exitCode, stateRunning, 2},
		{"always starts after completion", "always", completed, stateRunning, 2},
		{"always starts after a crash", "always", trap, stateRunning, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
				agent := start(t, testConfig(t, n))
				leader.put(putInstance(instance(leader, "job-1", restart(&pb.RestartPolicy{Policy: c.policy}))))
				within(t, time.Second, "it runs", agent.running("job-1"))
				agent.fake.Crash("job-1", c.exit)
				<-time.After(10 * time.Second)
				within(t, time.Second, "it stands where it should", leader.reports("job-1", c.state, 1))
				if got := agent.fake.Starts("job-1"); got != c.starts {
					t.Fatalf("started %d times, want %d", got, c.starts)
				}
				if st := leader.reported("job-1"); c.starts == 1 && st.GetExitCode() != c.exit.Code {
					t.Fatalf("reported %v", st)
				}
			})
		})
	}
}

func TestALongRunBeginsTheRetriesAnew(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1", restart(&pb.RestartPolicy{MaxRetries: 1}))))
		for crash := range 4 {
			within(t, 2*time.Second, "it runs", agent.running("web-1"))
			<-time.After(61 * time.Second)
			if agent.fake.Crash("web-1", trap) != 1 {
				t.Fatalf("it did not run before crash %d", crash)
			}
		}
		within(t, 2*time.Second, "it runs", agent.running("web-1"))
		agent.fake.Crash("web-1", trap)
		within(t, 2*time.Second, "two crashes in a row are too many", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
		if got := leader.reported("web-1").GetCrashCount(); got != 5 {
			t.Fatalf("%d crashes counted", got)
		}
	})
}

func TestAnInvalidModuleIsNotRetried(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		agent.fake.OnPrepare(func(context.Context, runtime.Spec) error {
			return fmt.Errorf("%w: imports env.magic", runtime.ErrModuleInvalid)
		})
		leader.put(putInstance(instance(leader, "web-1", restart(&pb.RestartPolicy{Policy: "always"}))))
		within(t, time.Second, "it has failed", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
		if st := leader.reported("web-1"); st.GetReason() != pb.ExitReason_EXIT_REASON_MODULE_INVALID || st.GetMessage() != "invalid module: imports env.magic" {
			t.Fatalf("reported %v", st)
		}
		still(t, 10*time.Minute, "it is not tried again", func() bool { return agent.fake.Prepares("web-1") == 1 })
	})
}

func TestAModuleThatCannotBeFetchedUsesUpNoRetry(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		inst := instance(leader, "web-1", restart(&pb.RestartPolicy{Policy: "never"}))
		leader.mu.Lock()
		clear(leader.modules)
		leader.mu.Unlock()
		leader.put(putInstance(inst))
		<-time.After(10 * time.Minute)
		within(t, time.Second, "it waits for the module", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_PREPARING, 1))
		st := leader.reported("web-1")
		if st.GetReason() != pb.ExitReason_EXIT_REASON_MODULE_UNAVAILABLE || st.GetMessage() == "" || st.GetNextRetryAt() == nil || st.GetCrashCount() != 0 {
			t.Fatalf("reported %v", st)
		}
		leader.add(testModule)
		within(t, 20*time.Second, "it runs when the module is there", leader.reports("web-1", stateRunning, 1))
		if st := leader.reported("web-1"); st.GetReason() != 0 || st.GetMessage() != "" || st.GetAttempt() != 1 {
			t.Fatalf("reported %v", st)
		}
		agent.end()
	})
}

func TestANewGenerationEndsTheOldRunFirst(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		agent.fake.OnStop(slowStop(3 * time.Second))
		overlap := false
		agent.fake.OnPrepare(func(_ context.Context, spec runtime.Spec) error {
			overlap = overlap || len(agent.fake.Running()) > 0
			return nil
		})
		counted := func(inst *pb.Instance) { inst.Status = &pb.InstanceStatus{CrashCount: 7} }
		leader.put(putInstance(instance(leader, "web-1", generation(2), counted)))
		within(t, time.Second, "the new generation runs: the old one gets no grace", leader.reports("web-1", stateRunning, 2))
		if st := leader.reported("web-1"); st.GetCrashCount() != 7 {
			t.Fatalf("the crashes counted on other nodes are lost: %v", st)
		}
		if overlap {
			t.Fatal("the new generation was prepared while the old one ran")
		}
		if st := leader.reported("web-1"); st.GetAttempt() != 1 {
			t.Fatalf("attempts count anew in a generation; reported %v", st)
		}
	})
}

func TestARestartEndsTheOldRunWithGrace(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		agent.fake.OnStop(slowStop(3 * time.Second))
		again := func(inst *pb.Instance) { inst.RestartEpoch = 1 }
		leader.put(putInstance(instance(leader, "web-1", again)))
		still(t, 2500*time.Millisecond, "the old run drains", func() bool { return agent.fake.Starts("web-1") == 1 })
		within(t, time.Second, "it runs again", func() bool {
			st := leader.reported("web-1")
			return st.GetState() == stateRunning && st.GetAttempt() == 2 && st.GetCrashCount() == 0
		})
		leader.put(putInstance(instance(leader, "web-1", again)))
		still(t, time.Minute, "the same restart is not carried out twice", func() bool { return agent.fake.Starts("web-1") == 2 })
	})
}

func TestARestartRevivesAFailedInstance(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1", restart(&pb.RestartPolicy{Policy: "never"}))))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.Crash("web-1", trap)
		within(t, time.Second, "it has failed", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
		leader.put(putInstance(instance(leader, "web-1", func(inst *pb.Instance) { inst.RestartEpoch = 1 })))
		within(t, time.Second, "it runs again", leader.reports("web-1", stateRunning, 1))
	})
}

func TestStopDrainsAndIsFinal(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", leader.reports("web-1", stateRunning, 1))
		agent.fake.OnStop(slowStop(time.Hour))
		began := time.Now()
		leader.put(putInstance(instance(leader, "web-1", stopped)))
		within(t, time.Second, "it is stopping", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_STOPPING, 1))
		within(t, time.Minute, "it has stopped", leader.reports("web-1", stateStopped, 1))
		if took := time.Since(began); took < DefaultGrace || took > DefaultGrace+time.Second {
			t.Fatalf("a drain without end took %s", took)
		}
		if st := leader.reported("web-1"); st.GetReason() != pb.ExitReason_EXIT_REASON_STOPPED || st.GetCrashCount() != 0 {
			t.Fatalf("reported %v", st)
		}
		still(t, 10*time.Minute, "it stays stopped", agent.running())
	})
}

func TestStopEndsWhatPrepares(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		agent.fake.OnPrepare(func(ctx context.Context, _ runtime.Spec) error {
			<-ctx.Done()
			return ctx.Err()
		})
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it prepares", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_PREPARING, 1))
		leader.put(putInstance(instance(leader, "web-1", stopped)))
		within(t, time.Second, "it has stopped", leader.reports("web-1", stateStopped, 1))
	})
}

func TestStopWhileWaitingForARetry(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.Crash("web-1", trap)
		within(t, time.Second, "it waits", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		leader.put(putInstance(instance(leader, "web-1", stopped)))
		within(t, 500*time.Millisecond, "it is stopped at once", leader.reports("web-1", stateStopped, 1))
		still(t, time.Minute, "it does not start", agent.running())
	})
}

func TestRemovalEndsAndForgets(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.OnStop(slowStop(3 * time.Second))
		leader.put(removeInstance("web-1"))
		leader.put(putInstance(instance(leader, "web-1", generation(2)))) // comes back while it ends
		within(t, 5*time.Second, "it runs in the new generation", leader.reports("web-1", stateRunning, 2))
		leader.put(removeInstance("web-1"))
		within(t, 5*time.Second, "nothing is left of it", func() bool {
			return agent.running()() && len(agent.Instances()) == 0
		})
		err := agent.logs.follow(t.Context(), &pb.FollowLogsRequest{Targets: []string{"web-1"}}, nil)
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND {
			t.Fatalf("its output: %v", err)
		}
	})
}

func TestAnExecutorThatEndsAGuestUnaskedIsACrash(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.Crash("web-1", runtime.Exit{Reason: runtime.Stopped})
		within(t, time.Second, "that counts as a crash", func() bool {
			st := leader.reported("web-1")
			return st.GetCrashCount() == 1 && st.GetReason() == pb.ExitReason_EXIT_REASON_INTERNAL
		})
	})
}

func TestWhatAGuestSaysCannotSpoilAReport(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		long := strings.Repeat("é", maxReasonBytes)
		agent.fake.Crash("web-1", runtime.Exit{Reason: runtime.Trap, Message: "\xff in\n\tf" + long})
		within(t, time.Second, "the crash is reported", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED, 1))
		if got := leader.reported("web-1").GetMessage(); !strings.HasPrefix(got, "\uFFFD in fé") || len(got) > maxReasonBytes {
			t.Fatalf("reported %q", got)
		}
	})
}

func TestWhatWasRecordedIsTakenUp(t *testing.T) {
	const (
		assigned = pb.InstanceState_INSTANCE_STATE_ASSIGNED
		failed   = pb.InstanceState_INSTANCE_STATE_FAILED
		done     = pb.InstanceState_INSTANCE_STATE_COMPLETED
		crashed  = pb.InstanceState_INSTANCE_STATE_CRASHED
	)
	for _, c := range []struct {
		name       string
		recorded   pb.InstanceState
		generation uint64
		policy     string
		phase      phase
		state      pb.InstanceState
		attempt    uint32
	}{
		{"nothing", 0, 0, "", phaseIdle, assigned, 0},
		{"it ran", stateRunning, 2, "", phaseIdle, assigned, 4},
		{"it waited", crashed, 2, "", phaseIdle, assigned, 4},
		{"it failed", failed, 2, "", phaseDone, failed, 4},
		{"it failed in an older generation", failed, 1, "", phaseIdle, assigned, 0},
		{"it completed", done, 2, "", phaseDone, done, 4},
		{"it completed and runs always", done, 2, "always", phaseIdle, assigned, 4},
		{"it was stopped", stateStopped, 2, "", phaseStopped, stateStopped, 4},
	} {
		w := &worker{logs: newLogBook("n1", time.Now)}
		s := newSupervisor(w, &pb.Instance{
			Id: "web-1", Placement: &pb.Placement{Generation: 2},
			Spec:   &pb.WorkloadSpec{Restart: &pb.RestartPolicy{Policy: c.policy}},
			Status: &pb.InstanceStatus{State: c.recorded, Generation: c.generation, Attempt: 4, CrashCount: 3},
		})
		if s.have.phase != c.phase || s.status.GetState() != c.state || s.status.GetAttempt() != c.attempt ||
			s.status.GetGeneration() != 2 || s.status.GetCrashCount() != 3 {
			t.Errorf("%s: phase %d, %v", c.name, s.have.phase, s.status)
		}
	}
}

func TestAnUnknownRuntimeIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		start(t, testConfig(t, n))
		inst := instance(leader, "vm-1", restart(&pb.RestartPolicy{Policy: "never"}))
		inst.Spec.Runtime = "microvm"
		leader.put(putInstance(inst))
		within(t, time.Second, "it has failed", leader.reports("vm-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
		if got := leader.reported("vm-1").GetMessage(); got != `this node has no runtime "microvm"` {
			t.Fatal(got)
		}
	})
}

func TestAStartThatFailsTellsWhy(t *testing.T) {
	for _, c := range []struct {
		err    error
		reason pb.ExitReason
	}{
		{fmt.Errorf("import missing: %w", runtime.ErrModuleInvalid), pb.ExitReason_EXIT_REASON_MODULE_INVALID},
		{errors.New("no room"), pb.ExitReason_EXIT_REASON_MODULE_INVALID}, // what the fake's exit says
	} {
		bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
			agent := start(t, testConfig(t, n))
			agent.fake.OnStart(func(runtime.Spec) error { return c.err })
			leader.put(putInstance(instance(leader, "web-1")))
			within(t, time.Second, "it has failed", leader.reports("web-1", pb.InstanceState_INSTANCE_STATE_FAILED, 1))
			if st := leader.reported("web-1"); st.GetReason() != c.reason || st.GetMessage() != c.err.Error() {
				t.Fatalf("reported %v", st)
			}
		})
	}
}
