package schedule

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// registry is the replicated state without replication.
type registry struct {
	state *fsm.State

	mu       sync.Mutex
	index    uint64
	places   int
	failures []error
}

func newRegistry(t testing.TB) *registry {
	r := &registry{state: fsm.New()}
	r.do(t, &pb.Command{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: &pb.Module{Digest: digest}}}})
	return r
}

func (r *registry) View(context.Context, *pb.ReadOptions) (fsm.View, error) {
	return r.state.View(), nil
}

func (r *registry) Propose(_ context.Context, cmd *pb.Command) (*pb.CommandResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if cmd.GetPlace() != nil {
		r.places++
		if len(r.failures) > 0 {
			err := r.failures[0]
			r.failures = r.failures[1:]
			return nil, err
		}
	}
	r.index++
	result := r.state.Apply(r.index, cmd)
	if result.GetError() != nil {
		return nil, apierror.FromProto(result.GetError())
	}
	return result, nil
}

func (r *registry) do(t testing.TB, cmd *pb.Command) *pb.CommandResult {
	t.Helper()
	result, err := r.Propose(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func (r *registry) proposals() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.places
}

func (r *registry) addNode(t testing.TB, id string, instances uint32) uint64 {
	t.Helper()
	return r.do(t, &pb.Command{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{
		Info: node(id, capacity(instances, 1<<40)).Info,
	}}}).GetEpoch()
}

func (r *registry) start(t testing.TB, name string, replicas int) []string {
	t.Helper()
	ids := make([]string, replicas)
	for k := range ids {
		ids[k] = fmt.Sprintf("%s-%05d", name, k)
	}
	r.do(t, &pb.Command{Payload: &pb.Command_CreateInstances{CreateInstances: &pb.CreateInstancesCommand{
		Spec: &pb.WorkloadSpec{Name: name, Module: digest, Replicas: uint32(replicas)}, InstanceIds: ids,
	}}})
	return ids
}

func (r *registry) nodeOf(id string) string {
	in, ok := r.state.View().Instance(id)
	if !ok || !fsm.Placed(in) {
		return ""
	}
	return in.GetPlacement().GetNodeId()
}

// leave reports the end of every instance that was asked to leave a node.
func (r *registry) leave(t testing.TB, nodeID string) {
	t.Helper()
	n, _ := r.state.View().Node(nodeID)
	req := &pb.ReportStatusRequest{NodeId: nodeID, Epoch: n.GetEpoch()}
	for _, in := range r.state.View().InstancesByNode(nil, nodeID) {
		if in.GetLeaving() {
			req.Instances = append(req.Instances, &pb.InstanceReport{InstanceId: in.GetId(), Left: true, Status: &pb.InstanceStatus{
				State: pb.InstanceState_INSTANCE_STATE_STOPPED, Generation: in.GetPlacement().GetGeneration(),
			}})
		}
	}
	r.do(t, &pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: req}})
}

// runScheduler runs a scheduler until the test ends and returns its end.
func runScheduler(t *testing.T, r *registry) <-chan error {
	t.Helper()
	s, err := New(Config{Viewer: r, Proposer: r, Registerer: prometheus.NewPedanticRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		synctest.Wait()
	})
	return ended
}

func TestRunPlacesWhatIsStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		r.addNode(t, "n1", 10)
		r.addNode(t, "n2", 10)
		runScheduler(t, r)
		ids := r.start(t, "a", 4)
		synctest.Wait()
		count := map[string]int{}
		for _, id := range ids {
			count[r.nodeOf(id)]++
		}
		if count["n1"] != 2 || count["n2"] != 2 {
			t.Errorf("replicas by node: %v, want 2 each", count)
		}
		if got := r.proposals(); got != 1 {
			t.Errorf("%d commands for one start, want 1", got)
		}
	})
}

func TestRunWakesWhenThereIsRoomAndOtherwiseRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		runScheduler(t, r)
		ids := r.start(t, "a", 3)
		synctest.Wait()
		in, _ := r.state.View().Instance(ids[0])
		if got := in.GetStatus().GetMessage(); got != "no node can take it: no node has registered" {
			t.Errorf("message %q", got)
		}
		if got := r.proposals(); got != 1 {
			t.Errorf("%d commands to record the reasons, want 1", got)
		}

		r.addNode(t, "n1", 2)
		synctest.Wait()
		if r.nodeOf(ids[0]) != "n1" || r.nodeOf(ids[1]) != "n1" || r.nodeOf(ids[2]) != "" {
			t.Fatal("the new node was not filled")
		}
		before := r.proposals()
		r.report(t, "n1", ids[0], pb.InstanceState_INSTANCE_STATE_RUNNING)
		synctest.Wait()
		if got := r.proposals(); got != before {
			t.Errorf("%d commands although a status report makes no room", got-before)
		}
		r.report(t, "n1", ids[0], pb.InstanceState_INSTANCE_STATE_COMPLETED)
		synctest.Wait()
		if r.nodeOf(ids[2]) != "n1" {
			t.Error("an ended instance's place was not given to the one that waits")
		}
	})
}

func (r *registry) report(t testing.TB, nodeID, id string, state pb.InstanceState) {
	t.Helper()
	in, _ := r.state.View().Instance(id)
	r.do(t, &pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: &pb.ReportStatusRequest{
		NodeId: nodeID, Epoch: in.GetPlacement().GetNodeEpoch(),
		Instances: []*pb.InstanceReport{{InstanceId: id, Status: &pb.InstanceStatus{
			State: state, Generation: in.GetPlacement().GetGeneration(), Attempt: 1,
		}}},
	}}})
}

func TestRunMovesInstancesOfALostNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		epoch := r.addNode(t, "n1", 10)
		runScheduler(t, r)
		id := r.start(t, "a", 1)[0]
		synctest.Wait()
		r.addNode(t, "n2", 10)
		r.do(t, &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n1", Epoch: epoch}}})
		synctest.Wait()
		in, _ := r.state.View().Instance(id)
		if r.nodeOf(id) != "n2" || in.GetPlacement().GetGeneration() != 2 {
			t.Errorf("placement %v, want n2 in generation 2", in.GetPlacement())
		}
	})
}

func TestRunEmptiesADrainingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		r.addNode(t, "n1", 10)
		runScheduler(t, r)
		ids := r.start(t, "a", 3)
		synctest.Wait()
		drain := func(draining bool) {
			r.do(t, &pb.Command{Payload: &pb.Command_DrainNode{DrainNode: &pb.DrainNodeCommand{NodeId: "n1", Draining: draining}}})
		}
		drain(true)
		synctest.Wait()
		before := r.proposals()
		if r.nodeOf(ids[0]) != "n1" {
			t.Fatal("an instance left although there is no other node")
		}
		r.addNode(t, "n2", 2)
		synctest.Wait()
		if r.nodeOf(ids[0]) != "n1" {
			t.Fatal("an instance was placed elsewhere before its end was reported")
		}
		r.leave(t, "n1")
		synctest.Wait()
		left := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return r.nodeOf(id) == "n2" })
		if len(left) != 1 || r.nodeOf(left[0]) != "n1" {
			t.Errorf("left on n1: %v, want the one that has no room elsewhere", left)
		}
		if got := r.proposals() - before; got != 2 {
			t.Errorf("%d commands for one drain, want 2: to leave and to be placed", got)
		}
	})
}

func TestRunPlacesProviders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		runScheduler(t, r)
		r.do(t, &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{
			Spec: &pb.ProviderSpec{Id: "kv", Type: "kv"},
		}}})
		synctest.Wait()
		if p, _ := r.state.View().Provider("kv"); p.GetStatus().GetMessage() == "" {
			t.Error("the registry does not say why the provider is not placed")
		}
		r.addNode(t, "n1", 10)
		synctest.Wait()
		if p, _ := r.state.View().Provider("kv"); p.GetPlacement().GetNodeId() != "n1" {
			t.Errorf("placement %v, want n1", p.GetPlacement())
		}
	})
}

func TestRunEndsWithLeadershipAndRetriesOtherFailures(t *testing.T) {
	noLeader := apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "leadership lost")
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		r.addNode(t, "n1", 1) // room for exactly what could not be committed
		r.failures = []error{errors.New("disk is slow"), errors.New("disk is slow")}
		ended := runScheduler(t, r)
		id := r.start(t, "a", 1)[0]
		time.Sleep(time.Second) // virtual
		synctest.Wait()
		if r.nodeOf(id) != "n1" || r.proposals() != 3 {
			t.Fatalf("placed on %q after %d proposals, want n1 after 3", r.nodeOf(id), r.proposals())
		}
		r.mu.Lock()
		r.failures = []error{noLeader}
		r.mu.Unlock()
		r.start(t, "b", 1)
		synctest.Wait()
		select {
		case err := <-ended:
			if !errors.Is(err, noLeader) {
				t.Errorf("ended with %v, want %v", err, noLeader)
			}
		default:
			t.Error("it goes on without leadership")
		}
	})
}

func TestTenThousandStartOnARealRegistry(t *testing.T) {
	const nodes, workloads, replicas = 1000, 10, 1000
	r := newRegistry(t)
	for k := range nodes {
		r.addNode(t, fmt.Sprintf("n%04d", k), 10)
	}
	for k := range workloads {
		r.start(t, fmt.Sprintf("w%d", k), replicas)
	}
	s, err := New(Config{Viewer: r, Proposer: r})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ended := make(chan error, 1)
	began := time.Now()
	go func() { ended <- s.Run(ctx) }()
	for {
		view := r.state.View()
		if len(view.UnplacedInstances(nil)) == 0 {
			break
		}
		select {
		case <-r.state.Changed(view.Index()):
		case err := <-ended:
			t.Fatalf("ended with %v; %d are not placed", err, len(view.UnplacedInstances(nil)))
		}
	}
	t.Logf("%d instances on %d nodes in %s, %d commands", workloads*replicas, nodes, time.Since(began), r.proposals())
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	view := r.state.View()
	for _, n := range view.Nodes(nil) {
		if got := view.InstanceCount(n.GetId()); got != workloads*replicas/nodes {
			t.Fatalf("%s has %d instances, want %d", n.GetId(), got, workloads*replicas/nodes)
		}
	}
}
