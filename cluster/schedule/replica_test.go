package schedule

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (r *registry) register(t testing.TB, spec *pb.ProviderSpec) {
	t.Helper()
	r.do(t, &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{Spec: spec}}})
}

func (r *registry) expire(t testing.TB, nodeID string) {
	t.Helper()
	n, _ := r.state.View().Node(nodeID)
	r.do(t, &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: nodeID, Epoch: n.GetEpoch()}}})
}

// hosts returns the nodes of a provider's replicas, in order, "" for one without.
func (r *registry) hosts(id string) []string {
	var out []string
	for _, p := range r.state.View().ProviderReplicas(id) {
		out = append(out, p.GetPlacement().GetNodeId())
	}
	return out
}

// wantHosts checks how many replicas are placed, each on a node of its own.
func (r *registry) wantHosts(t *testing.T, id string, want int) {
	t.Helper()
	seen, placed := map[string]bool{}, 0
	for _, node := range r.hosts(id) {
		if node == "" {
			continue
		}
		if placed++; seen[node] {
			t.Errorf("two replicas of %s are on %s", id, node)
		}
		seen[node] = true
	}
	if placed != want {
		t.Errorf("%d replicas of %s are placed, want %d: %v", placed, id, want, r.hosts(id))
	}
}

func TestRunPlacesEachReplicaOnANodeOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		runScheduler(t, r)
		r.addNode(t, "n1", 10)
		r.addNode(t, "n2", 10)
		r.register(t, &pb.ProviderSpec{Id: "bus", Type: "messaging", Driver: "nats", Replicas: 3})
		r.register(t, &pb.ProviderSpec{Id: "web", Type: "http", Replicas: 2})
		synctest.Wait()
		r.wantHosts(t, "bus", 2)
		r.wantHosts(t, "web", 2)
		waits := r.state.View().UnplacedProviders(nil)
		if len(waits) != 1 || !strings.Contains(waits[0].GetStatus().GetMessage(), "2 with another replica of it") {
			t.Fatalf("the registry does not say why one waits: %v", waits)
		}
		before := r.proposals()
		r.register(t, &pb.ProviderSpec{Id: "other", Type: "http"})
		synctest.Wait()
		if got := r.proposals() - before; got != 1 {
			t.Errorf("%d proposals for one provider: what cannot be placed is proposed again", got)
		}
		r.addNode(t, "n3", 10)
		synctest.Wait()
		r.wantHosts(t, "bus", 3)
	})
}

func TestRunReplacesAReplicaOfALostNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		runScheduler(t, r)
		for i := range 3 {
			r.addNode(t, fmt.Sprintf("n%d", i+1), 10)
		}
		r.register(t, &pb.ProviderSpec{Id: "bus", Type: "messaging", Driver: "nats", Replicas: 2})
		r.register(t, &pb.ProviderSpec{Id: "data", Type: "kv"})
		synctest.Wait()
		r.wantHosts(t, "bus", 2)
		lost, home := r.hosts("bus")[0], r.hosts("data")[0]
		r.expire(t, lost)
		synctest.Wait()
		r.wantHosts(t, "bus", 2)
		if r.hosts("bus")[0] == lost {
			t.Errorf("replica 0 stays on %s, which is lost", lost)
		}
		if home != lost {
			r.expire(t, home)
			synctest.Wait()
		}
		if got := r.hosts("data")[0]; got != home {
			t.Errorf("what keeps its data on %s went to %s", home, got)
		}
		r.wantHosts(t, "bus", map[bool]int{true: 2, false: 1}[home == lost])
		r.addNode(t, home, 10)
		synctest.Wait()
		r.wantHosts(t, "bus", 2)
	})
}

// A replica that is taken away makes room where it was, also when another provider
// came to that node in the meantime.
func TestTheRoomThatAReplicaLeavesIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		epoch := r.addNode(t, "n1", 10)
		r.register(t, &pb.ProviderSpec{Id: "bus", Type: "messaging", Driver: "nats", Replicas: 2})
		r.do(t, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
			ProviderId: "bus", Replica: 1, NodeId: "n1", NodeEpoch: epoch,
			SeenGeneration: r.state.View().ProviderReplicas("bus")[1].GetPlacement().GetGeneration(),
		}}}}})
		runScheduler(t, r)
		synctest.Wait()
		if got := r.hosts("bus"); got[0] != "" || got[1] != "n1" {
			t.Fatalf("the replicas are on %q", got)
		}
		r.do(t, &pb.Command{Payload: &pb.Command_UpdateProvider{UpdateProvider: &pb.UpdateProviderCommand{
			Spec: &pb.ProviderSpec{Id: "bus", Type: "messaging", Driver: "nats"},
		}}})
		synctest.Wait()
		r.wantHosts(t, "bus", 1)
	})
	was := &nodeLoad{providers: 1, hosts: map[string]int{"bus": 1}}
	if is := (&nodeLoad{providers: 1, hosts: map[string]int{"web": 1}}); !is.roomier(was) || was.roomier(was) {
		t.Error("a provider that left is not seen because another one came")
	}
}

func TestVerdictsOnAReplica(t *testing.T) {
	w := newWorld(node("n1"), node("n2"))
	w.providers = []*pb.Provider{{Id: "bus", Placement: &pb.Placement{NodeId: "n1"}}} // stopped ones stay
	second := &pb.Provider{Id: "bus", Replica: 1, Spec: &pb.ProviderSpec{Id: "bus", Type: "messaging", Driver: "nats", Replicas: 2}}
	got, verdicts := PlaceProvider(w, second)
	if got.NodeID != "n2" || verdicts[0].GetEligible() || !strings.Contains(verdicts[0].GetReasons()[0], "another replica of provider bus is here") {
		t.Errorf("placed on %q, verdicts %v", got.NodeID, verdicts)
	}
	// A placed replica is not in its own way.
	second.Placement, second.DesiredRunning = &pb.Placement{NodeId: "n2"}, true
	w.providers = append(w.providers, second)
	if got, verdicts := PlaceProvider(w, second); got.NodeID != "n2" {
		t.Errorf("placed on %q, verdicts %v", got.NodeID, verdicts)
	}
}
