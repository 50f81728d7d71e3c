package fsm_test

import (
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestAWorkloadBecomesPendingInstancesWithAssignments(t *testing.T) {
	b := newBed(t)
	b.module()
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.do(&pb.RegisterProviderCommand{Spec: kv("other")})
	spec := workload("hello", "always",
		grant("kv", "kv:write", "kv:read", "kv:write"),
		&pb.CapabilityGrant{Provider: "other", Bucket: "shared"},
		grant("kv", "kv:delete", "kv:read"))
	spec.Replicas = 2
	b.news()
	res := b.do(&pb.CreateInstancesCommand{Spec: spec, InstanceIds: []string{"hello-b", "hello-a"}})
	same(t, "created", res.GetIds(), "hello-b", "hello-a")
	b.tells("INSTANCE_REQUESTED hello-b", "INSTANCE_REQUESTED hello-a")
	v := b.s.View()
	same(t, "by name", ids(v.InstancesByName(nil, "hello")), "hello-a", "hello-b")
	same(t, "unplaced", ids(v.UnplacedInstances(nil)), "hello-a", "hello-b")
	b.is("hello-a", "PENDING  0")
	in := b.instance("hello-a")
	if in.GetSpec().GetReplicas() != 1 || spec.GetReplicas() != 2 {
		t.Errorf("replicas: instance %d, command %d", in.GetSpec().GetReplicas(), spec.GetReplicas())
	}
	if !in.GetDesiredRunning() || in.GetCorrelationId() != "call-1" || in.GetCreatedIndex() != b.index ||
		!in.GetCreatedAt().AsTime().Equal(b.now()) || in.GetSpec().GetEnv()["B"] != "2" {
		t.Errorf("got %v", in)
	}
	a, _ := v.Assignment("hello-b", "kv")
	same(t, "merged permissions", a.GetPermissions(), "kv:delete", "kv:read", "kv:write")
	if a.GetBucket() != "hello" || a.GetModifiedIndex() != b.index {
		t.Errorf("got %v", a)
	}
	if a, _ := v.Assignment("hello-b", "other"); a.GetBucket() != "shared" {
		t.Errorf("bucket %q", a.GetBucket())
	}
	if n := len(v.AssignmentsByInstance(nil, "hello-a")); n != 2 {
		t.Errorf("%d assignments", n)
	}
}

func TestAWorkloadIsRefused(t *testing.T) {
	b := newBed(t)
	create := func(spec *pb.WorkloadSpec, ids ...string) *pb.CreateInstancesCommand {
		return &pb.CreateInstancesCommand{Spec: spec, InstanceIds: ids}
	}
	b.refuse(noModule, create(workload("w", ""), "w-1"))
	b.module()
	two := workload("w", "")
	two.Replicas = 2
	b.refuse(invalid, create(nil))
	b.refuse(invalid, create(workload("", ""), "w-1"))
	b.refuse(invalid, create(workload("w", "")))
	b.refuse(invalid, create(two, "w-1"))
	b.refuse(conflict, create(two, "w-1", "w-1"))
	b.refuse(invalid, create(workload("w", ""), ""))
	b.refuse(invalid, create(workload("w", ""), strings.Repeat("x", 257)))
	if e := b.refuse(noProvider, create(workload("w", "", grant("kv")), "w-1")); e.GetNextStep() == "" || e.GetDetails()["provider"] != "kv" {
		t.Errorf("got %v", e)
	}
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.refuse(invalid, create(workload("w", "", grant("kv", "")), "w-1"))
	b.refuse(invalid, create(workload("w", "",
		&pb.CapabilityGrant{Provider: "kv", Bucket: "one"}, &pb.CapabilityGrant{Provider: "kv", Bucket: "two"}), "w-1"))

	b.run("w", "")
	b.refuse(conflict, create(workload("other", ""), "w-1"))
	if e := b.refuse(conflict, create(workload("w", ""), "w-2")); e.GetDetails()["instance"] != "w-1" || !strings.Contains(e.GetNextStep(), "--name") {
		t.Errorf("got %v", e)
	}
}

func TestAnEndedNameMayBeUsedAgain(t *testing.T) {
	for _, end := range []string{"COMPLETED", "FAILED", "STOPPED"} {
		b := newBed(t)
		b.module()
		b.node("n1")
		b.running("w", "on-failure", "n1")
		if end == "STOPPED" {
			b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
		}
		b.report("w-1", state(end), 1)
		b.do(&pb.CreateInstancesCommand{Spec: workload("w", ""), InstanceIds: []string{"w-2"}})
		same(t, "beside each other", ids(b.s.View().InstancesByName(nil, "w")), "w-1", "w-2")
	}
}

func TestStopping(t *testing.T) {
	for _, c := range []struct {
		name   string
		to     string
		policy string
		want   string
		event  string
	}{
		{"what was never placed stops at once", "", "", "STOPPED  0", "INSTANCE_STOPPED w-1"},
		{"what runs is left to its agent", "RUNNING", "", "RUNNING n1 1", ""},
		{"what waits for a retry is left to its agent", "CRASHED", "", "CRASHED n1 1", ""},
		{"what has completed keeps its end", "COMPLETED", "", "COMPLETED n1 1", ""},
		{"what has failed keeps its end", "FAILED", "", "FAILED n1 1", ""},
		{"what was lost stops at once", "LOST", "", "STOPPED n1 1", "INSTANCE_STOPPED w-1"},
		{"what was lost for good keeps its end", "LOST", "never", "LOST n1 1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			b.module()
			b.node("n1")
			b.run("w", c.policy)
			switch c.to {
			case "":
			case "LOST":
				b.place("w-1", "n1")
				b.expire("n1", 1)
			default:
				b.place("w-1", "n1")
				b.report("w-1", state(c.to), 1)
			}
			b.news()
			same(t, "asked to stop", b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1", "w-1"}}).GetIds(), "w-1")
			b.is("w-1", c.want)
			if c.event == "" {
				b.tells()
			} else {
				b.tells(c.event)
			}
			if b.instance("w-1").GetDesiredRunning() {
				t.Error("it is still desired to run")
			}
			same(t, "unplaced", ids(b.s.View().UnplacedInstances(nil)))
			modified := b.instance("w-1").GetModifiedIndex()
			b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
			if b.instance("w-1").GetModifiedIndex() != modified {
				t.Error("stopping again changed the record")
			}
		})
	}
}

func TestWhatWaitsForARetryCanBeStopped(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.running("w", "always", "n1")
	b.report("w-1", state("CRASHED"), 1)
	b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
	if !b.report("w-1", state("STOPPED"), 1) {
		t.Fatal("the stop was not recorded")
	}
	if b.report("w-1", state("CRASHED"), 1) {
		t.Fatal("a crash that is told twice undid the stop")
	}
	b.is("w-1", "STOPPED n1 1")
}

func TestRestarting(t *testing.T) {
	for _, c := range []struct{ name, to, policy, want string }{
		{"what runs stays where it is", "RUNNING", "", "RUNNING n1 1"},
		{"what waits for a retry stays where it is", "CRASHED", "", "CRASHED n1 1"},
		{"what has completed is placed anew", "COMPLETED", "never", "PENDING  1"},
		{"what has failed is placed anew", "FAILED", "", "PENDING  1"},
		{"what has stopped is placed anew", "STOPPED", "", "PENDING  1"},
		{"what was lost is placed anew", "LOST", "", "PENDING  1"},
		{"what was lost for good is placed anew", "LOST", "never", "PENDING  1"},
		{"what was never placed is still to be placed", "", "", "PENDING  0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			b.module()
			b.node("n1")
			b.run("w", c.policy)
			if c.to != "" {
				b.place("w-1", "n1")
			}
			switch c.to {
			case "":
			case "LOST":
				b.expire("n1", 1)
				b.node("n1")
			case "STOPPED":
				b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
				fallthrough
			default:
				b.report("w-1", state(c.to), 1, func(s *pb.InstanceStatus) { s.CrashCount = 2 })
			}
			crashes := b.instance("w-1").GetStatus().GetCrashCount()
			b.news()
			b.do(&pb.RestartInstancesCommand{InstanceIds: []string{"w-1"}})
			b.is("w-1", c.want)
			b.tells("INSTANCE_REQUESTED w-1: restart requested")
			in := b.instance("w-1")
			if !in.GetDesiredRunning() || in.GetRestartEpoch() != 1 || in.GetStatus().GetCrashCount() != crashes {
				t.Errorf("got %v", in)
			}
			if in.GetStatus().GetState() != state("PENDING") {
				return
			}
			generation := in.GetPlacement().GetGeneration()
			b.place("w-1", "n1")
			if got := b.instance("w-1").GetPlacement().GetGeneration(); got != generation+1 {
				t.Errorf("placed in generation %d after %d", got, generation)
			}
			b.tells("INSTANCE_PLACED w-1")
		})
	}
}

func TestRemoving(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", kv("kv"))
	b.running("live", "", "n1", grant("kv", "kv:read"))
	b.running("done", "", "n1", grant("kv", "kv:read"))
	b.report("done-1", state("COMPLETED"), 1)
	b.run("waits", "")
	b.news()

	for _, id := range []string{"live-1", "waits-1"} {
		e := b.refuse(conflict, &pb.RemoveInstancesCommand{InstanceIds: []string{"done-1", id}})
		if e.GetDetails()["instances"] != id || !strings.Contains(e.GetNextStep(), "--force") {
			t.Errorf("got %v", e)
		}
	}
	b.do(&pb.RemoveInstancesCommand{InstanceIds: []string{"done-1"}})
	b.tells("INSTANCE_REMOVED done-1: INSTANCE_STATE_COMPLETED")
	if _, ok := b.s.View().Assignment("done-1", "kv"); ok {
		t.Error("its assignment stayed")
	}
	if n := b.s.View().InstanceCount("n1"); n != 1 {
		t.Errorf("the node counts %d instances, want 1", n)
	}
	b.do(&pb.RemoveInstancesCommand{InstanceIds: []string{"live-1"}, Force: true})
	same(t, "on the node", ids(b.s.View().InstancesByNode(nil, "n1")))
	if n := b.s.View().InstanceCount("n1"); n != 0 {
		t.Errorf("the node counts %d instances, want 0", n)
	}
	b.refuse(noInstance, &pb.RemoveInstancesCommand{InstanceIds: []string{"live-1"}})
}

func TestCommandsOnUnknownInstancesAreRefusedAsAWhole(t *testing.T) {
	b := newBed(t)
	b.module()
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.run("w", "")
	both := []string{"w-1", "nobody"}
	b.refuse(noInstance, &pb.StopInstancesCommand{InstanceIds: both})
	b.refuse(noInstance, &pb.RestartInstancesCommand{InstanceIds: both})
	b.refuse(noInstance, &pb.RemoveInstancesCommand{InstanceIds: both, Force: true})
	b.refuse(noInstance, &pb.AssignCapabilityCommand{InstanceIds: both, Grant: grant("kv", "kv:read")})
	b.refuse(noInstance, &pb.RevokeCapabilityCommand{InstanceIds: both, ProviderId: "kv"})
	b.refuse(invalid, &pb.StopInstancesCommand{})
}

func TestWhatHasEnded(t *testing.T) {
	for _, c := range []struct {
		state, policy string
		desired       bool
		ended         bool
	}{
		{"PENDING", "", true, false},
		{"ASSIGNED", "never", true, false},
		{"RUNNING", "", true, false},
		{"STOPPING", "", false, false},
		{"CRASHED", "", false, false},
		{"COMPLETED", "", true, true},
		{"COMPLETED", "never", true, true},
		{"COMPLETED", "always", true, false},
		{"COMPLETED", "always", false, true},
		{"STOPPED", "", false, true},
		{"STOPPED", "", true, false},
		{"FAILED", "always", true, true},
		{"LOST", "", true, false},
		{"LOST", "never", true, true},
		{"LOST", "", false, true},
	} {
		in := &pb.Instance{
			Spec: workload("w", c.policy), DesiredRunning: c.desired,
			Status: &pb.InstanceStatus{State: state(c.state)},
		}
		if got := fsm.Ended(in); got != c.ended {
			t.Errorf("%s, policy %q, desired %v: ended %v, want %v", c.state, c.policy, c.desired, got, c.ended)
		}
	}
}
