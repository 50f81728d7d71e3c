package fsm_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestAProviderIsRegisteredPlacedAndStopped(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	b.news()
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.tells("PROVIDER_REGISTERED kv: kv")
	b.providerIs("kv", "PENDING  0")
	if got := b.s.View().UnplacedProviders(nil); len(got) != 1 {
		t.Fatalf("to be placed: %v", got)
	}
	b.placeProvider("kv", "n1")
	b.providerIs("kv", "ASSIGNED n1 1")
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	b.news()

	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv"})
	b.providerIs("kv", "RUNNING n1 1")
	b.tells()
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	b.providerIs("kv", "STOPPED n1 1")

	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})
	b.providerIs("kv", "ASSIGNED n1 2")
	before := b.provider("kv")
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})
	if !proto.Equal(before, b.provider("kv")) {
		t.Error("starting what is to run changed the record")
	}
}

func TestAStartCutsOffTheReportsOfTheRunBefore(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("kv"))
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	first := b.provider("kv").GetPlacement().GetGeneration()
	late := &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1, Providers: []*pb.ProviderReport{{
		ProviderId: "kv", Status: &pb.ProviderStatus{State: pb.ProviderState_PROVIDER_STATE_STOPPED, Generation: first},
	}}}
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv"})
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})
	b.do(late)
	b.providerIs("kv", "ASSIGNED n1 2")
}

func TestStoppingAProviderNobodyRuns(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("lost"))
	b.do(&pb.RegisterProviderCommand{Spec: kv("pending")})
	b.expire("n1", 1)
	for _, id := range []string{"lost", "pending"} {
		b.news()
		b.do(&pb.SetProviderRunningCommand{ProviderId: id})
		b.tells("PROVIDER_STOPPED " + id)
	}
	b.providerIs("lost", "STOPPED n1 1")
	b.providerIs("pending", "STOPPED  0")

	b.do(&pb.SetProviderRunningCommand{ProviderId: "lost", Running: true})
	b.do(&pb.SetProviderRunningCommand{ProviderId: "pending", Running: true})
	b.providerIs("lost", "LOST n1 1")
	b.providerIs("pending", "PENDING  0")
	b.node("n1")
	b.providerIs("lost", "ASSIGNED n1 2")
}

func TestUpdatingAProvider(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("kv"))
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	old := b.provider("kv")
	b.news()
	spec := kv("kv")
	spec.Driver = "bbolt"
	b.do(&pb.UpdateProviderCommand{Spec: spec})
	b.tells("PROVIDER_UPDATED kv: bbolt")
	b.providerIs("kv", "RUNNING n1 1")
	if p := b.provider("kv"); p.GetSpecVersion() != 2 || p.GetSpec().GetDriver() != "bbolt" || old.GetSpec().GetDriver() != "memory" {
		t.Errorf("got %v, before %v", p, old)
	}

	b.node("n2")
	spec = kv("kv")
	spec.Placement = &pb.PlacementRules{Node: "n2"}
	b.do(&pb.UpdateProviderCommand{Spec: spec})
	b.providerIs("kv", "PENDING  1")
	b.placeProvider("kv", "n2")
	b.providerIs("kv", "ASSIGNED n2 2")

	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv"})
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	spec = kv("kv")
	spec.Placement = &pb.PlacementRules{Node: "n1"}
	b.do(&pb.UpdateProviderCommand{Spec: spec})
	b.providerIs("kv", "STOPPED  2")
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})
	b.providerIs("kv", "PENDING  2")
}

func TestProviderCommandsAreRefused(t *testing.T) {
	b := newBed(t)
	b.refuse(invalid, &pb.RegisterProviderCommand{})
	b.refuse(invalid, &pb.RegisterProviderCommand{Spec: &pb.ProviderSpec{Id: "kv"}})
	b.refuse(invalid, &pb.UpdateProviderCommand{})
	b.refuse(noProvider, &pb.UpdateProviderCommand{Spec: kv("kv")})
	b.refuse(noProvider, &pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})
	b.refuse(noProvider, &pb.DeregisterProviderCommand{ProviderId: "kv"})
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.refuse(conflict, &pb.RegisterProviderCommand{Spec: kv("kv")})
	other := kv("kv")
	other.Type = "http"
	if e := b.refuse(invalid, &pb.UpdateProviderCommand{Spec: other}); e.GetDetails()["type"] != "kv" {
		t.Errorf("got %v", e)
	}
}

func TestDeregisteringAProvider(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", kv("kv"))
	b.running("w", "", "n1", grant("kv", "kv:read"))
	b.running("done", "", "n1", grant("kv", "kv:read"))
	b.report("done-1", state("COMPLETED"), 1)
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	remove := &pb.DeregisterProviderCommand{ProviderId: "kv"}

	if e := b.refuse(conflict, remove); e.GetNextStep() != "wasmatrix provider stop kv" {
		t.Errorf("got %v", e)
	}
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv"})
	b.refuse(conflict, remove)
	b.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	if e := b.refuse(conflict, remove); e.GetDetails()["instances"] != "w-1" {
		t.Errorf("got %v", e)
	}
	b.report("w-1", state("FAILED"), 1)
	b.news()
	b.do(remove)
	b.tells("PROVIDER_DEREGISTERED kv")
	if got := b.s.View().AssignmentsByProvider(nil, "kv"); len(got) != 0 {
		t.Errorf("assignments are left: %v", got)
	}

	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.do(remove) // never placed
}

func TestAProviderRegisteredAgainIsNotTakenForTheOld(t *testing.T) {
	b := newBed(t)
	b.node("n1", kv("kv"))
	old := b.provider("kv").GetPlacement().GetGeneration()
	b.do(&pb.SetProviderRunningCommand{ProviderId: "kv"})
	late := &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1, Providers: []*pb.ProviderReport{{
		ProviderId: "kv", Status: &pb.ProviderStatus{State: pb.ProviderState_PROVIDER_STATE_STOPPED, Generation: old},
	}}}
	b.do(late)
	b.do(&pb.DeregisterProviderCommand{ProviderId: "kv"})
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.placeProvider("kv", "n1")
	b.do(late)
	b.providerIs("kv", "ASSIGNED n1 1")
	if now := b.provider("kv").GetPlacement().GetGeneration(); now <= old {
		t.Errorf("generation %d after %d", now, old)
	}
}
