package fsm_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// replicas checks the replicas of a provider as "state node", in order.
func (b *bed) replicas(id string, want ...string) {
	b.t.Helper()
	var got []string
	for i, p := range b.s.View().ProviderReplicas(id) {
		if p.GetId() != id || p.GetReplica() != uint32(i) {
			b.t.Errorf("replica %d is %v", i, p)
		}
		got = append(got, strings.TrimSpace(p.GetStatus().GetState().String()[len("PROVIDER_STATE_"):]+" "+p.GetPlacement().GetNodeId()))
	}
	same(b.t, "replicas of "+id, got, want...)
}

// replicaBed has three nodes and a provider of three replicas, one on each.
func replicaBed(t *testing.T) *bed {
	b := newBed(t)
	b.module()
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus", 3)})
	for i := range uint32(3) {
		node := fmt.Sprintf("n%d", i+1)
		b.node(node)
		b.placeReplica("bus", i, node)
		b.reportReplica("bus", i, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	}
	b.news()
	return b
}

func TestEveryReplicaHasItsRecordAndItsNode(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	b.node("n2")
	b.do(&pb.RegisterProviderCommand{Spec: bus("a", 1)})
	b.news()
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus", 3)})
	b.tells("PROVIDER_REGISTERED bus: messaging")
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus2", 1)})
	var all []string
	for _, p := range b.s.View().Providers(nil) {
		all = append(all, fsm.ReplicaName(p.GetId(), p.GetReplica()))
	}
	same(t, "all", all, "a", "bus", "bus/1", "bus/2", "bus2")
	if n := len(b.s.View().UnplacedProviders(nil)); n != 5 {
		t.Errorf("%d wait for a node", n)
	}
	same(t, "placed", b.placeReplica("bus", 1, "n1").GetIds(), "bus/1")
	b.reportReplica("bus", 1, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
	b.tells("PROVIDER_REGISTERED bus2: messaging", "PROVIDER_STARTED bus: replica 1")
	b.replicas("bus", "PENDING", "RUNNING n1", "PENDING")

	same(t, "a second replica on one node", b.placeReplica("bus", 2, "n1").GetIds())
	same(t, "another provider there", b.placeReplica("bus2", 0, "n1").GetIds(), "bus2")
	same(t, "another node", b.placeReplica("bus", 2, "n2").GetIds(), "bus/2")
	b.replicas("bus", "PENDING", "RUNNING n1", "ASSIGNED n2")

	if p, ok := b.s.View().Provider("bus"); !ok || p.GetReplica() != 0 || p != b.replica("bus", 0) {
		t.Errorf("the provider is %v", p)
	}
	if got := b.s.View().ProviderReplicas("bu"); len(got) != 0 {
		t.Errorf("the beginning of an id has replicas: %v", got)
	}
}

func TestAReportIsOfOneReplica(t *testing.T) {
	b := replicaBed(t)
	p := b.replica("bus", 1)
	report := &pb.ProviderReport{ProviderId: "bus", Replica: 2, Status: &pb.ProviderStatus{
		State: pb.ProviderState_PROVIDER_STATE_FAILED, Generation: p.GetPlacement().GetGeneration(),
	}}
	b.do(&pb.ReportStatusRequest{NodeId: "n2", Epoch: 1, Providers: []*pb.ProviderReport{report}})
	b.replicas("bus", "RUNNING n1", "RUNNING n2", "RUNNING n3")
	report.Replica = 1
	report.Status.CallsInFlight, report.Status.SpecVersion = 7, 9
	res := b.do(&pb.ReportStatusRequest{NodeId: "n2", Epoch: 1, Providers: []*pb.ProviderReport{report}})
	same(t, "changed", res.GetIds(), "bus/1")
	b.replicas("bus", "RUNNING n1", "FAILED n2", "RUNNING n3")
	if s := b.replica("bus", 1).GetStatus(); s.GetCallsInFlight() != 7 || s.GetSpecVersion() != 1 {
		t.Errorf("status %v", s)
	}
	before := b.replica("bus", 1)
	b.do(&pb.ReportStatusRequest{NodeId: "n2", Epoch: 1, Providers: []*pb.ProviderReport{report}})
	if b.replica("bus", 1) != before {
		t.Error("the same report again changed the record")
	}
}

func TestAReplicaThatKeepsNoStateMovesWhenItsNodeIsLost(t *testing.T) {
	b := replicaBed(t)
	b.do(&pb.RegisterProviderCommand{Spec: &pb.ProviderSpec{Id: "own", Type: "messaging"}})
	b.placeProvider("own", "n2")
	pinned := bus("pinned", 1)
	pinned.Placement = &pb.PlacementRules{Node: "n2"}
	b.do(&pb.RegisterProviderCommand{Spec: pinned})
	b.placeProvider("pinned", "n2")
	generation := b.replica("bus", 1).GetPlacement().GetGeneration()
	b.node("n4")
	b.news()
	b.expire("n2", 1)
	b.tells("NODE_LOST n2: lease expired", "PROVIDER_LOST bus: replica 1: node n2 was lost",
		"PROVIDER_LOST own: node n2 was lost", "PROVIDER_LOST pinned: node n2 was lost")
	b.replicas("bus", "RUNNING n1", "PENDING", "RUNNING n3")
	b.replicas("own", "LOST n2")
	b.replicas("pinned", "LOST n2")
	if p := b.replica("bus", 1); p.GetPlacement().GetGeneration() != generation || p.GetStatus().GetMessage() == "" {
		t.Errorf("waits as %v", p)
	}
	same(t, "on the node of another", b.placeReplica("bus", 1, "n1").GetIds())
	b.placeReplica("bus", 1, "n4")
	b.replicas("bus", "RUNNING n1", "ASSIGNED n4", "RUNNING n3")
	if g := b.replica("bus", 1).GetPlacement().GetGeneration(); g != generation+1 {
		t.Errorf("generation %d after %d", g, generation)
	}
	b.node("n2")
	b.replicas("bus", "RUNNING n1", "ASSIGNED n4", "RUNNING n3")
	b.replicas("own", "ASSIGNED n2")
}

func TestStartAndStopAreOfAllReplicas(t *testing.T) {
	b := replicaBed(t)
	b.expire("n3", 1)
	grace := durationpb.New(time.Second)
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus", Grace: grace})
	b.replicas("bus", "RUNNING n1", "RUNNING n2", "STOPPED")
	b.reportReplica("bus", 1, pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	for i := range uint32(3) {
		if p := b.replica("bus", i); p.GetDesiredRunning() || !proto.Equal(p.GetStopGrace(), grace) {
			t.Errorf("replica %d: %v", i, p)
		}
	}
	sooner := durationpb.New(0)
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus", Grace: sooner})
	if b.replica("bus", 0).GetStopGrace().AsDuration() != 0 || b.replica("bus", 1).GetStopGrace().AsDuration() != time.Second {
		t.Error("a second stop gives the grace of those that still drain, and of no others")
	}
	if e := b.refuse(conflict, &pb.DeregisterProviderCommand{ProviderId: "bus"}); e.GetDetails()["provider"] != "bus" {
		t.Errorf("got %v", e)
	}
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus", Running: true})
	b.replicas("bus", "ASSIGNED n1", "ASSIGNED n2", "PENDING")
	if g := b.replica("bus", 0).GetStopGrace(); g != nil {
		t.Errorf("a started one has the grace %v", g)
	}

	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus"})
	b.reportReplica("bus", 0, pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	if e := b.refuse(conflict, &pb.DeregisterProviderCommand{ProviderId: "bus"}); e.GetDetails()["provider"] != "bus/1" {
		t.Errorf("got %v", e)
	}
	b.expire("n2", 1)
	b.replicas("bus", "STOPPED n1", "STOPPED n2", "STOPPED")
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus", Running: true})
	b.replicas("bus", "ASSIGNED n1", "PENDING", "PENDING") // nobody waits for n2
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus"})
	b.reportReplica("bus", 0, pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	b.news()
	b.do(&pb.DeregisterProviderCommand{ProviderId: "bus"})
	b.tells("PROVIDER_DEREGISTERED bus")
	b.replicas("bus")
}

func TestAnUpdateChangesTheNumberOfReplicas(t *testing.T) {
	b := replicaBed(t)
	removed := b.replica("bus", 2).GetPlacement().GetGeneration()
	b.do(&pb.UpdateProviderCommand{Spec: bus("bus", 1)})
	b.tells("PROVIDER_STOPPED bus: replica 1: taken away", "PROVIDER_STOPPED bus: replica 2: taken away",
		"PROVIDER_UPDATED bus: nats")
	b.replicas("bus", "RUNNING n1")
	if got := b.s.View().ProvidersByNode(nil, "n3"); len(got) != 0 {
		t.Errorf("n3 still hosts %v", got)
	}
	b.do(&pb.UpdateProviderCommand{Spec: bus("bus", 4)})
	b.replicas("bus", "RUNNING n1", "PENDING", "PENDING", "PENDING")
	for i := range uint32(4) {
		if p := b.replica("bus", i); p.GetSpecVersion() != 3 || p.GetSpec().GetReplicas() != 4 {
			t.Errorf("replica %d: %v", i, p)
		}
	}
	b.placeReplica("bus", 2, "n3")
	if g := b.replica("bus", 2).GetPlacement().GetGeneration(); g <= removed {
		t.Errorf("generation %d, the one before had %d", g, removed)
	}
	b.do(&pb.SetProviderRunningCommand{ProviderId: "bus"})
	b.do(&pb.UpdateProviderCommand{Spec: bus("bus", 5)})
	if p := b.replica("bus", 4); p.GetDesiredRunning() || p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_STOPPED {
		t.Errorf("added to a stopped provider: %v", p)
	}
}

func TestADriverThatNeedsNoNodeFreesALostProvider(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.placeProvider("kv", "n1")
	b.expire("n1", 1)
	b.replicas("kv", "LOST n1")
	b.do(&pb.UpdateProviderCommand{Spec: &pb.ProviderSpec{Id: "kv", Type: "kv", Driver: "redis"}})
	b.replicas("kv", "PENDING")
}

func TestReplicasThatCannotBeAreRefused(t *testing.T) {
	b := newBed(t)
	pinned := bus("bus", 2)
	pinned.Placement = &pb.PlacementRules{Node: "n1"}
	for name, spec := range map[string]*pb.ProviderSpec{
		"too many": bus("bus", 17),
		"memory":   {Id: "bus", Type: "kv", Driver: "memory", Replicas: 2},
		"bbolt":    {Id: "bus", Type: "kv", Driver: "bbolt", Replicas: 2},
		"default":  {Id: "bus", Type: "kv", Replicas: 2},
		"embedded": {Id: "bus", Type: "messaging", Driver: "embedded", Replicas: 2},
		"pinned":   pinned,
	} {
		e := b.refuse(invalid, &pb.RegisterProviderCommand{Spec: spec})
		if name != "too many" && e.GetNextStep() == "" {
			t.Errorf("%s: no next step: %v", name, e)
		}
		if fsm.KeepsState(spec) && !strings.Contains(e.GetNextStep(), "nats") {
			t.Errorf("%s: no driver is named: %v", name, e)
		}
	}
	for _, spec := range []*pb.ProviderSpec{
		{Id: "a", Type: "kv", Driver: "redis", Replicas: 16},
		{Id: "b", Type: "kv", Driver: "nats", Replicas: 2},
		{Id: "c", Type: "http", Replicas: 2},
		{Id: "d", Type: "external", Replicas: 2},
	} {
		b.do(&pb.RegisterProviderCommand{Spec: spec})
	}
	if e := b.refuse(invalid, &pb.RegisterNodeCommand{Info: nodeInfo("n1"), Providers: []*pb.ProviderSpec{bus("mine", 2)}}); e.GetNextStep() == "" {
		t.Errorf("got %v", e)
	}
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus", 2)})
	b.refuse(invalid, &pb.UpdateProviderCommand{Spec: &pb.ProviderSpec{Id: "bus", Type: "messaging", Replicas: 2}})
}

// TestASnapshotFromBeforeReplicas: a record without a number is the first replica.
func TestASnapshotFromBeforeReplicas(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", kv("kv"))
	b.node("n2", kv("kv2"))
	b.running("w", "", "n1", grant("kv", "kv:read"))
	recs := parse(t, dump(t, b.s))
	recs = recs[:len(recs)-1]
	recs[0].GetHeader().Format = 2
	at := slices.IndexFunc(recs, func(r *pb.SnapshotRecord) bool { return r.GetProvider().GetId() == "kv" })
	if at < 0 || recs[at].GetProvider().ProtoReflect().Has(recs[at].GetProvider().ProtoReflect().Descriptor().Fields().ByName("replica")) {
		t.Fatal("the record of a first replica is not what an older version wrote")
	}
	other := &bed{t: t, s: fsm.New(), index: b.index}
	restoreInto(t, other.s, compose(t, recs...))
	for _, bed := range []*bed{b, other} {
		bed.reportProvider("kv", pb.ProviderState_PROVIDER_STATE_RUNNING, "")
		bed.replicas("kv", "RUNNING n1")
		bed.replicas("kv2", "ASSIGNED n2")
	}
	if b.s.View().Hash() != other.s.View().Hash() {
		t.Error("the hash goes another way")
	}
}
