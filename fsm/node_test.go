package fsm_test

import (
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	invalid    = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
	conflict   = pb.ErrorCode_ERROR_CODE_CONFLICT
	noNode     = pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND
	noInstance = pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND
	noProvider = pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND
	noModule   = pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND
	denied     = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
	exhausted  = pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED
)

func TestANodeKeepsItsEpochOnlyWhileItIsAliveAndNamed(t *testing.T) {
	b := newBed(t)
	for _, step := range []struct {
		what  string
		epoch uint64
		want  uint64
		event string
	}{
		{"a new node", 0, 1, "NODE_JOINED n1"},
		{"a new agent process", 0, 2, "NODE_RECOVERED n1: agent restarted"},
		{"the same process, session lost", 2, 2, ""},
		{"a process that holds an epoch long gone", 1, 3, "NODE_RECOVERED n1: agent restarted"},
		{"a process that claims an epoch to come", 9, 4, "NODE_RECOVERED n1: agent restarted"},
	} {
		if got := b.register("n1", step.epoch); got != step.want {
			t.Errorf("%s: epoch %d, want %d", step.what, got, step.want)
		}
		want := []string{}
		if step.event != "" {
			want = append(want, step.event)
		}
		b.tells(want...)
	}
	b.expire("n1", 4)
	if got := b.register("n1", 4); got != 5 {
		t.Errorf("an expired epoch was kept: got %d, want 5", got)
	}
	b.tells("NODE_LOST n1: lease expired", "NODE_RECOVERED n1: back after it was lost")
}

func TestARegistrationUpdatesWhatTheNodeTells(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	first, _ := b.s.View().Node("n1")
	info := nodeInfo("n1")
	info.Version = "0.2.0"
	b.do(&pb.RegisterNodeCommand{Info: info, Epoch: 1})
	n, _ := b.s.View().Node("n1")
	if n.GetInfo().GetVersion() != "0.2.0" || first.GetInfo().GetVersion() != "" {
		t.Errorf("version is %q, the record before has %q", n.GetInfo().GetVersion(), first.GetInfo().GetVersion())
	}
	if n.GetCreatedIndex() != 1 || n.GetModifiedIndex() != 2 || !n.GetRegisteredAt().AsTime().Equal(first.GetRegisteredAt().AsTime()) {
		t.Errorf("a kept epoch must keep its registration: %v", n)
	}
}

func TestNodeCommandsAreRefused(t *testing.T) {
	b := newBed(t)
	b.refuse(invalid, &pb.RegisterNodeCommand{})
	b.refuse(invalid, &pb.RegisterNodeCommand{Info: &pb.NodeInfo{Id: "with\x00nul"}})
	b.refuse(invalid, &pb.RegisterNodeCommand{Info: nodeInfo("n1"), Providers: []*pb.ProviderSpec{{Id: "kv"}}})
	b.refuse(noNode, &pb.ExpireNodeCommand{NodeId: "n1", Epoch: 1})
	b.refuse(noNode, &pb.DrainNodeCommand{NodeId: "n1", Draining: true})
	b.refuse(noNode, &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1})
}

func TestAnAgentThatRestartsSharesNoGenerationWithItsPredecessor(t *testing.T) {
	for _, c := range []struct {
		name, policy string
		state        string
		stop         bool
		want         string
		event        string
	}{
		{"running on-failure", "on-failure", "RUNNING", false, "ASSIGNED n1 2", "INSTANCE_RESTARTED w-1: agent restarted"},
		{"running by default", "", "RUNNING", false, "ASSIGNED n1 2", "INSTANCE_RESTARTED w-1: agent restarted"},
		{"running always", "always", "RUNNING", false, "ASSIGNED n1 2", "INSTANCE_RESTARTED w-1: agent restarted"},
		{"waiting to start again", "on-failure", "CRASHED", false, "ASSIGNED n1 2", "INSTANCE_RESTARTED w-1: agent restarted"},
		{"between two runs", "always", "COMPLETED", false, "ASSIGNED n1 2", "INSTANCE_RESTARTED w-1: agent restarted"},
		{"running never", "never", "RUNNING", false, "LOST n1 1", "INSTANCE_LOST w-1: agent restarted"},
		{"completed", "on-failure", "COMPLETED", false, "COMPLETED n1 1", ""},
		{"failed", "always", "FAILED", false, "FAILED n1 1", ""},
		{"asked to stop", "always", "RUNNING", true, "STOPPED n1 1", "INSTANCE_STOPPED w-1: agent restarted"},
		{"stopped", "always", "STOPPED", true, "STOPPED n1 1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			b.module()
			b.node("n1")
			b.running("w", c.policy, "n1")
			b.report("w-1", state(c.state), 1, func(s *pb.InstanceStatus) { s.CrashCount = 3 })
			if c.stop {
				b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
			}
			b.news()
			b.node("n1")
			b.is("w-1", c.want)
			want := []string{"NODE_RECOVERED n1: agent restarted"}
			if c.event != "" {
				want = append(want, c.event)
			}
			b.tells(want...)
			in := b.instance("w-1")
			if in.GetStatus().GetCrashCount() != 3 {
				t.Errorf("crash count %d, want 3: a restarted agent is no crash and forgets none", in.GetStatus().GetCrashCount())
			}
			if in.GetStatus().GetState() == state("ASSIGNED") {
				if p := in.GetPlacement(); p.GetNodeEpoch() != 2 || in.GetStatus().GetGeneration() != 2 || in.GetStatus().GetAttempt() != 0 {
					t.Errorf("the new process got %v with %v", p, in.GetStatus())
				}
				if in.GetStatus().GetReason() != pb.ExitReason_EXIT_REASON_NODE_LOST {
					t.Errorf("reason %v", in.GetStatus().GetReason())
				}
			}
		})
	}
}

func TestALostSessionAloneRestartsNothing(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", kv("kv"))
	b.running("w", "always", "n1")
	b.register("n1", 1)
	b.is("w-1", "RUNNING n1 1")
	b.providerIs("kv", "ASSIGNED n1 1")
}

func TestANodeThatIsLostGivesUpItsInstances(t *testing.T) {
	for _, c := range []struct {
		name, policy, state string
		stop                bool
		want                string
		unplaced            bool
	}{
		{"on-failure is placed again", "on-failure", "RUNNING", false, "LOST n1 1", true},
		{"always is placed again", "always", "RUNNING", false, "LOST n1 1", true},
		{"never is not", "never", "RUNNING", false, "LOST n1 1", false},
		{"completed stays completed", "on-failure", "COMPLETED", false, "COMPLETED n1 1", false},
		{"failed stays failed", "always", "FAILED", false, "FAILED n1 1", false},
		{"one asked to stop has stopped", "always", "STOPPING", true, "STOPPED n1 1", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			b.module()
			b.node("n1")
			b.running("w", c.policy, "n1")
			b.report("w-1", state(c.state), 1)
			if c.stop {
				b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
			}
			b.expire("n1", 1)
			b.is("w-1", c.want)
			v := b.s.View()
			if got := len(v.UnplacedInstances(nil)) == 1; got != c.unplaced {
				t.Errorf("unplaced: %v, want %v", got, c.unplaced)
			}
			if v.InstanceCount("n1") != 0 {
				t.Errorf("a lost node counts %d instances", v.InstanceCount("n1"))
			}
			if n, _ := v.Node("n1"); n.GetState() != pb.NodeState_NODE_STATE_LOST {
				t.Errorf("the node is %v", n.GetState())
			}
			// The node returns: what was LOST is not its own any more.
			b.node("n1")
			if c.unplaced {
				b.is("w-1", "LOST n1 1")
				same(t, "instances of the returned node", ids(b.s.View().InstancesByNode(nil, "n1")))
			}
		})
	}
}

func TestAnExpiryOfAnotherEpochIsIgnored(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n1")
	b.running("w", "always", "n1")
	b.news()
	if res := b.do(&pb.ExpireNodeCommand{NodeId: "n1", Epoch: 1}); res.GetEpoch() != 2 || len(res.GetIds()) != 0 {
		t.Errorf("got %v", res)
	}
	b.is("w-1", "RUNNING n1 1")
	b.tells()
	b.expire("n1", 2)
	b.news()
	b.expire("n1", 2)
	b.tells()
}

func TestADrainedNodeIsLeftByThoseThatMayMove(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.running("moves", "on-failure", "n1")
	b.running("stays", "never", "n1")
	b.running("done", "on-failure", "n1")
	b.report("done-1", state("COMPLETED"), 1)
	b.news()
	b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
	b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
	b.tells("NODE_DRAINED n1")
	same(t, "to be moved", ids(b.s.View().UnplacedInstances(nil)), "moves-1")
	b.is("moves-1", "RUNNING n1 1")

	if got := b.place("stays-1", "n2").GetIds(); len(got) != 0 {
		t.Errorf("moved %v, whose policy is never", got)
	}
	same(t, "asked to leave", b.place("moves-1", "n2").GetIds(), "moves-1")
	same(t, "asked twice", b.place("moves-1", "n2").GetIds())
	b.is("moves-1", "RUNNING n1 1")
	b.tells()
	b.report("moves-1", state("STOPPED"), 1)
	b.is("moves-1", "PENDING n1 1")
	b.tells("INSTANCE_STOPPED moves-1")
	b.place("moves-1", "n2")
	b.is("moves-1", "ASSIGNED n2 2")
	b.tells("INSTANCE_MOVED moves-1: from n1")
	same(t, "left on the node", ids(b.s.View().InstancesByNode(nil, "n1")), "done-1", "stays-1")

	b.do(&pb.DrainNodeCommand{NodeId: "n1"})
	b.tells("NODE_UNDRAINED n1")
	same(t, "to be moved", ids(b.s.View().UnplacedInstances(nil)))
	if got := b.place("moves-1", "n1").GetIds(); len(got) != 0 {
		t.Errorf("moved %v off a node that does not drain", got)
	}
}

func TestDeclaredProvidersAreRegisteredOnceAndPinned(t *testing.T) {
	b := newBed(t)
	spec := kv("kv")
	spec.Placement = &pb.PlacementRules{Labels: map[string]string{"disk": "ssd"}}
	b.node("n1", spec, spec)
	b.providerIs("kv", "ASSIGNED n1 1")
	b.tells("NODE_JOINED n1", "PROVIDER_REGISTERED kv: kv")
	p := b.provider("kv")
	if rules := p.GetSpec().GetPlacement(); rules.GetNode() != "n1" || rules.GetLabels()["disk"] != "ssd" {
		t.Errorf("rules are %v", rules)
	}
	if spec.GetPlacement().GetNode() != "" {
		t.Error("the command was changed")
	}
	if p.GetPlacement().GetNodeEpoch() != 1 || !p.GetDesiredRunning() || p.GetSpecVersion() != 1 {
		t.Errorf("got %v", p)
	}
	// Another node that declares the same id gets nothing.
	b.node("n2", kv("kv"))
	b.providerIs("kv", "ASSIGNED n1 1")
}

func TestProvidersStayWithTheirNode(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("runs"), kv("stopped"), kv("stopping"))
	for _, id := range []string{"runs", "stopped", "stopping"} {
		b.reportProvider(id, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	}
	b.do(&pb.SetProviderRunningCommand{ProviderId: "stopped"})
	b.reportProvider("stopped", pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	b.do(&pb.SetProviderRunningCommand{ProviderId: "stopping"})
	b.news()

	b.expire("n1", 1)
	b.providerIs("runs", "LOST n1 1")
	b.providerIs("stopped", "STOPPED n1 1")
	b.providerIs("stopping", "STOPPED n1 1")
	b.tells("NODE_LOST n1: lease expired", "PROVIDER_LOST runs: node n1 was lost",
		"PROVIDER_STOPPED stopping: node n1 was lost")
	if got := b.s.View().UnplacedProviders(nil); len(got) != 0 {
		t.Errorf("to be placed elsewhere: %v", got)
	}

	b.node("n1")
	b.providerIs("runs", "ASSIGNED n1 2")
	b.providerIs("stopped", "STOPPED n1 1")
	if e := b.provider("runs").GetPlacement().GetNodeEpoch(); e != 2 {
		t.Errorf("placed in epoch %d, want 2", e)
	}

	b.do(&pb.SetProviderRunningCommand{ProviderId: "stopped", Running: true})
	b.providerIs("stopped", "ASSIGNED n1 2")
	b.do(&pb.SetProviderRunningCommand{ProviderId: "stopped"})
	b.news()
	b.node("n1")
	b.providerIs("runs", "ASSIGNED n1 3")
	b.providerIs("stopped", "STOPPED n1 2")
	b.tells("NODE_RECOVERED n1: agent restarted", "PROVIDER_STOPPED stopped: agent restarted")
}
