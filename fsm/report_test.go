package fsm_test

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestReportsBecomeStatesAndFacts(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "always")
	b.place("w-1", "n1")
	for _, step := range []struct {
		state   string
		attempt uint32
		crashes uint32
		message string
		applied bool
		events  []string
	}{
		{"PREPARING", 1, 0, "", true, nil},
		{"RUNNING", 1, 0, "", true, []string{"INSTANCE_STARTED w-1"}},
		{"RUNNING", 1, 0, "", false, nil},
		{"PREPARING", 1, 0, "", false, nil},
		{"CRASHED", 1, 1, "unreachable", true, []string{"INSTANCE_CRASHED w-1: unreachable"}},
		{"RUNNING", 1, 1, "", false, nil},
		{"CRASHED", 1, 1, "unreachable, again in 2s", true, nil},
		{"RUNNING", 2, 1, "", true, []string{"INSTANCE_RESTARTED w-1"}},
		{"CRASHED", 1, 1, "unreachable", false, nil},
		{"RUNNING", 4, 3, "", true, []string{"INSTANCE_CRASHED w-1: crashed 2 times since the report before", "INSTANCE_RESTARTED w-1"}},
		{"CRASHED", 5, 5, "trap", true, []string{"INSTANCE_CRASHED w-1: crashed once since the report before", "INSTANCE_CRASHED w-1: trap"}},
		{"FAILED", 5, 5, "", true, []string{"INSTANCE_FAILED w-1: EXIT_REASON_TRAP"}},
		{"PENDING", 9, 5, "", false, nil},
		{"ASSIGNED", 9, 5, "", false, nil},
		{"LOST", 9, 5, "", false, nil},
		{"UNSPECIFIED", 9, 5, "", false, nil},
	} {
		b.news()
		applied := b.report("w-1", state(step.state), step.attempt, func(s *pb.InstanceStatus) {
			s.CrashCount, s.Message = step.crashes, step.message
			if step.state == "FAILED" {
				s.Reason = pb.ExitReason_EXIT_REASON_TRAP
			}
		})
		if applied != step.applied {
			t.Fatalf("%s, attempt %d: applied %v, want %v", step.state, step.attempt, applied, step.applied)
		}
		b.tells(step.events...)
	}
}

func TestEndsAreFacts(t *testing.T) {
	for end, event := range map[string]string{
		"COMPLETED": "INSTANCE_COMPLETED w-1", "STOPPED": "INSTANCE_STOPPED w-1", "FAILED": "INSTANCE_FAILED w-1",
	} {
		b := newBed(t)
		b.module()
		b.node("n1")
		b.running("w", "", "n1")
		b.news()
		b.report("w-1", state(end), 1)
		b.tells(event)
	}
}

func TestAReportOfADeadEpochIsRefusedAsAWhole(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "always")
	b.place("w-1", "n1")
	report := func(epoch, generation uint64) *pb.ReportStatusRequest {
		return &pb.ReportStatusRequest{NodeId: "n1", Epoch: epoch, Instances: []*pb.InstanceReport{{
			InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("RUNNING"), Generation: generation, Attempt: 1},
		}}}
	}
	b.node("n1")
	if e := b.refuse(conflict, report(1, 1)); e.GetDetails()["epoch"] != "2" {
		t.Errorf("the refusal does not say the epoch: %v", e)
	}
	b.expire("n1", 2)
	if e := b.refuse(conflict, report(2, 2)); e.GetDetails()["state"] != "NODE_STATE_LOST" {
		t.Errorf("the refusal does not say the state: %v", e)
	}
}

func TestAReportOfAnotherGenerationOrNodeIsSkipped(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.running("w", "", "n1")
	b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
	b.move("w-1", "n2")
	for name, r := range map[string]*pb.ReportStatusRequest{
		"the node it left":      {NodeId: "n1", Epoch: 1, Instances: []*pb.InstanceReport{{InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("FAILED"), Generation: 1, Attempt: 7}}}},
		"its present number":    {NodeId: "n1", Epoch: 1, Instances: []*pb.InstanceReport{{InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("FAILED"), Generation: 2, Attempt: 7}}}},
		"an old generation":     {NodeId: "n2", Epoch: 1, Instances: []*pb.InstanceReport{{InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("FAILED"), Generation: 1, Attempt: 7}}}},
		"an unknown instance":   {NodeId: "n2", Epoch: 1, Instances: []*pb.InstanceReport{{InstanceId: "nobody", Status: &pb.InstanceStatus{State: state("FAILED")}}}},
		"nothing at all":        {NodeId: "n2", Epoch: 1, Instances: []*pb.InstanceReport{{InstanceId: "w-1"}, nil}},
		"an unknown provider":   {NodeId: "n2", Epoch: 1, Providers: []*pb.ProviderReport{{ProviderId: "nobody"}}},
		"an entry without body": {NodeId: "n2", Epoch: 1, Providers: []*pb.ProviderReport{nil}},
	} {
		if res := b.do(r); len(res.GetIds()) != 0 {
			t.Errorf("%s: %v had an effect", name, res.GetIds())
		}
	}
	b.is("w-1", "ASSIGNED n2 2")
}

func TestALostInstanceIsNotRevivedByItsOldAgent(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.running("w", "", "n1")
	b.expire("n1", 1)
	b.node("n1")
	res := b.do(&pb.ReportStatusRequest{NodeId: "n1", Epoch: 2, Instances: []*pb.InstanceReport{{
		InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("RUNNING"), Generation: 1, Attempt: 9},
	}}})
	if len(res.GetIds()) != 0 {
		t.Error("the report had an effect")
	}
	b.is("w-1", "LOST n1 1")
}

func TestWhatEndedUnderAFormerAgentIsNotRevived(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.running("w", "", "n1")
	b.report("w-1", state("COMPLETED"), 1)
	b.node("n1")
	res := b.do(&pb.ReportStatusRequest{NodeId: "n1", Epoch: 2, Instances: []*pb.InstanceReport{{
		InstanceId: "w-1", Status: &pb.InstanceStatus{State: state("RUNNING"), Generation: 1, Attempt: 2},
	}}})
	if len(res.GetIds()) != 0 {
		t.Error("the report had an effect")
	}
	b.is("w-1", "COMPLETED n1 1")
}

func TestWhatAReportLeavesInTheRegistry(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "")
	b.place("w-1", "n1")
	started := timestamppb.New(time.Date(2026, 11, 1, 13, 0, 0, 0, time.UTC))
	b.report("w-1", state("RUNNING"), 1, func(s *pb.InstanceStatus) {
		s.StartedAt = started
		s.CrashCount = 4
		s.Usage = &pb.ResourceUsage{MemoryBytes: 1}
	})
	b.report("w-1", state("CRASHED"), 1, func(s *pb.InstanceStatus) {
		s.CrashCount = 2
		s.NextRetryAt = &timestamppb.Timestamp{Seconds: 1 << 60}
		s.Message = strings.Repeat("é", 1000)
	})
	got := b.instance("w-1").GetStatus()
	if got.GetUsage() != nil {
		t.Error("usage was stored")
	}
	if got.GetCrashCount() != 4 {
		t.Errorf("the crash count went down to %d", got.GetCrashCount())
	}
	if !got.GetStartedAt().AsTime().Equal(started.AsTime()) {
		t.Errorf("started at %v", got.GetStartedAt())
	}
	if got.GetNextRetryAt() != nil {
		t.Errorf("an invalid time was stored: %v", got.GetNextRetryAt())
	}
	if n := len(got.GetMessage()); n > 1024 || n < 1020 || !utf8.ValidString(got.GetMessage()) {
		t.Errorf("the message has %d bytes, valid %v", n, utf8.ValidString(got.GetMessage()))
	}
}

// Which runtime an instance runs in is what its agent says, until it is placed anew.
func TestTheRuntimeOfAnInstanceIsWhatItsAgentSays(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "always")
	b.place("w-1", "n1")
	in := func(runtime, isolation string) func(*pb.InstanceStatus) {
		return func(s *pb.InstanceStatus) { s.Runtime, s.Isolation = runtime, isolation }
	}
	for _, runtime := range []string{"wasm", "microvm"} {
		if !b.report("w-1", state("RUNNING"), 1, in(runtime, runtime+"'s")) {
			t.Errorf("a report with another runtime changed nothing")
		}
		if st := b.instance("w-1").GetStatus(); st.GetRuntime() != runtime || st.GetIsolation() != runtime+"'s" {
			t.Errorf("runtime %q, isolation %q", st.GetRuntime(), st.GetIsolation())
		}
	}
	if b.report("w-1", state("RUNNING"), 1, in("microvm", "microvm's")) {
		t.Error("the same report had an effect again")
	}
	b.node("n1") // its agent is another one, the instance is to be placed again
	if st := b.instance("w-1").GetStatus(); st.GetState() == state("RUNNING") || st.GetState() == state("PENDING") && st.GetRuntime() != "" {
		t.Errorf("after the loss of its agent: %v", st)
	}
}

func TestProviderReports(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("kv"))
	b.news()
	for _, step := range []struct {
		state   pb.ProviderState
		message string
		applied bool
		event   string
	}{
		{pb.ProviderState_PROVIDER_STATE_STARTING, "", true, ""},
		{pb.ProviderState_PROVIDER_STATE_FAILED, "no such file", true, "PROVIDER_FAILED kv: no such file"},
		{pb.ProviderState_PROVIDER_STATE_FAILED, "no such file", false, ""},
		{pb.ProviderState_PROVIDER_STATE_FAILED, "permission denied", true, ""},
		{pb.ProviderState_PROVIDER_STATE_STARTING, "", true, ""},
		{pb.ProviderState_PROVIDER_STATE_RUNNING, "", true, "PROVIDER_STARTED kv"},
		{pb.ProviderState_PROVIDER_STATE_LOST, "", false, ""},
		{pb.ProviderState_PROVIDER_STATE_PENDING, "", false, ""},
		{pb.ProviderState_PROVIDER_STATE_DRAINING, "2 calls in flight", true, ""},
		{pb.ProviderState_PROVIDER_STATE_RUNNING, "", false, ""},
		{pb.ProviderState_PROVIDER_STATE_STOPPED, "", true, "PROVIDER_STOPPED kv"},
		{pb.ProviderState_PROVIDER_STATE_RUNNING, "", false, ""},
	} {
		if got := b.reportProvider("kv", step.state, step.message); got != step.applied {
			t.Fatalf("%v: applied %v, want %v", step.state, got, step.applied)
		}
		if step.event == "" {
			b.tells()
		} else {
			b.tells(step.event)
		}
	}
}
