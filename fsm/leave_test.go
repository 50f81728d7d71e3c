package fsm_test

import (
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// leaving brings an instance to where it runs on n1 and was asked to leave it.
func leaving(t *testing.T, policy string) *bed {
	t.Helper()
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.running("w", policy, "n1")
	b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
	b.place("w-1", "n2")
	if !b.instance("w-1").GetLeaving() {
		t.Fatal("it was not asked to leave")
	}
	return b
}

// The next generation begins only after the end of the one before it is committed.
func TestOnlyItsEndLetsALeavingInstanceBePlaced(t *testing.T) {
	left := func(r *pb.InstanceReport) { r.Left = true }
	for name, c := range map[string]struct {
		state  string
		edit   func(*pb.InstanceReport)
		policy string
		is     string
	}{
		"it goes on":                      {"RUNNING", left, "", "RUNNING n1 1"},
		"it is being stopped":             {"STOPPING", left, "", "STOPPING n1 1"},
		"a crash, to be tried again":      {"CRASHED", left, "", "CRASHED n1 1"},
		"stopped before it was asked":     {"STOPPED", func(*pb.InstanceReport) {}, "", "STOPPED n1 1"},
		"completed, to be started again":  {"COMPLETED", left, "always", "COMPLETED n1 1"},
		"completed for good":              {"COMPLETED", left, "on-failure", "COMPLETED n1 1"},
		"failed for good":                 {"FAILED", left, "", "FAILED n1 1"},
		"another generation":              {"STOPPED", func(r *pb.InstanceReport) { r.Left, r.Status.Generation = true, 2 }, "", "RUNNING n1 1"},
		"an end before the present start": {"STOPPED", func(r *pb.InstanceReport) { r.Left, r.RestartEpoch = true, 0 }, "", "RUNNING n1 1"},
		"its end":                         {"STOPPED", left, "", "PENDING n1 1"},
	} {
		t.Run(name, func(t *testing.T) {
			b := leaving(t, c.policy)
			b.do(&pb.RestartInstancesCommand{InstanceIds: []string{"w-1"}})
			in := b.instance("w-1")
			r := &pb.InstanceReport{InstanceId: "w-1", RestartEpoch: 1, Status: &pb.InstanceStatus{
				State: state(c.state), Generation: 1, Attempt: 1,
			}}
			c.edit(r)
			b.reports(in, r)
			b.is("w-1", c.is)
			placed := len(b.place("w-1", "n2").GetIds()) == 1
			if want := c.is == "PENDING n1 1"; placed != want {
				t.Errorf("placed again: %t, want %t", placed, want)
			}
		})
	}
}

func TestALateReportOfAnInstanceThatLeftIsSkipped(t *testing.T) {
	b := leaving(t, "")
	before := b.instance("w-1")
	b.report("w-1", state("STOPPED"), 1)
	for _, s := range []string{"RUNNING", "STOPPED", "FAILED"} {
		late := &pb.InstanceReport{InstanceId: "w-1", Left: true, Status: &pb.InstanceStatus{State: state(s), Generation: 1, Attempt: 9}}
		if b.reports(before, late) {
			t.Errorf("%s had an effect", s)
		}
	}
	b.is("w-1", "PENDING n1 1")
}

func TestTheEndOfANodeIsTheEndOfWhatLeavesIt(t *testing.T) {
	b := leaving(t, "")
	b.expire("n1", 1)
	b.is("w-1", "LOST n1 1")
	if b.instance("w-1").GetLeaving() {
		t.Error("what belongs to no node cannot leave one")
	}
	b.place("w-1", "n2")
	b.is("w-1", "ASSIGNED n2 2")
}

func TestAnInstanceThatLeavesCanBeStopped(t *testing.T) {
	b := leaving(t, "")
	b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
	b.report("w-1", state("STOPPED"), 1)
	b.is("w-1", "STOPPED n1 1")
	if b.instance("w-1").GetLeaving() {
		t.Error("it has ended and still leaves")
	}
	if got := b.place("w-1", "n2").GetIds(); len(got) != 0 {
		t.Error("it was placed although it is to be stopped")
	}
}

// An end that the agent reported before it knew of a restart must not let the
// instance be placed elsewhere while that agent starts it again.
func TestAnEndFromBeforeARestartIsNotItsEnd(t *testing.T) {
	for _, s := range []string{"STOPPED", "FAILED", "COMPLETED"} {
		b := newBed(t)
		b.module()
		b.node("n1")
		b.running("w", "", "n1")
		before := b.instance("w-1")
		b.do(&pb.RestartInstancesCommand{InstanceIds: []string{"w-1"}})
		b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
		late := &pb.InstanceReport{InstanceId: "w-1", Status: &pb.InstanceStatus{State: state(s), Generation: 1, Attempt: 1}}
		if b.reports(before, late) {
			t.Errorf("%s of the run before had an effect", s)
		}
		b.is("w-1", "RUNNING n1 1")
		late.RestartEpoch = 1
		if !b.reports(before, late) {
			t.Errorf("%s of the run that was asked for had no effect", s)
		}
	}
}

// A row of crashes is not forgotten by a move or the loss of a node, but by a
// user who asks for a new start.
func TestRetriesGoWithTheInstance(t *testing.T) {
	crashed := func(s *pb.InstanceStatus) { s.Retries = 3 }
	for name, c := range map[string]struct {
		what func(b *bed)
		want uint32
	}{
		"a move": {func(b *bed) {
			b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
			b.place("w-1", "n2")
			b.report("w-1", state("STOPPED"), 1, crashed)
		}, 3},
		"a lost node": {func(b *bed) { b.expire("n1", 1) }, 3},
		"a new agent": {func(b *bed) { b.node("n1") }, 3},
		"a user's restart": {func(b *bed) {
			b.report("w-1", state("FAILED"), 1, crashed)
			b.do(&pb.RestartInstancesCommand{InstanceIds: []string{"w-1"}})
		}, 0},
	} {
		b := newBed(t)
		b.module()
		b.node("n1")
		b.node("n2")
		b.running("w", "", "n1")
		b.report("w-1", state("CRASHED"), 1, crashed)
		c.what(b)
		b.place("w-1", "n2")
		if got := b.instance("w-1").GetStatus(); got.GetRetries() != c.want || got.GetState() != state("ASSIGNED") {
			t.Errorf("%s: %v", name, got)
		}
	}
}
