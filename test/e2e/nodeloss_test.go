package e2e

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

const (
	// movedWithin is far above what a move takes (about 4 s) and what a loaded
	// machine makes of it, or an emulated one: only that it happens is asserted here.
	movedWithin = 3 * time.Minute
	// effectsBefore is how many effects a generation has before its node is lost.
	effectsBefore = 100
	// roundsVariable says how many rounds the tests of lost nodes make.
	roundsVariable = "WASMATRIX_NODELOSS_ROUNDS"
	// pausesVariable lists how long agents stand still, as in "1s,10s".
	pausesVariable = "WASMATRIX_NODELOSS_PAUSES"
)

// ledger is a workload that writes "effect/<generation>/<counter>" without end.
type ledger struct {
	*harness.Cluster
	t    *testing.T
	name string
	id   string
}

// nodeLossCluster has its provider on n1, where no ledger runs.
func nodeLossCluster(t *testing.T) *harness.Cluster {
	t.Helper()
	return harness.Start(t, dev.Options{Nodes: 3, Adjust: func(i int, cfg *node.Config) {
		if i > 1 {
			cfg.Node.Labels["pool"] = "ledger"
		}
	}})
}

func startLedger(t *testing.T, c *harness.Cluster, name string, change ...func(*pb.WorkloadSpec)) *ledger {
	t.Helper()
	ctx := c.Context(movedWithin)
	module, err := c.Client.UploadModuleFile(ctx, goGuest(t, "ledger"))
	if err != nil {
		t.Fatal(err)
	}
	spec := &pb.WorkloadSpec{
		Name: name, Module: module.Digest, Placement: &pb.PlacementRules{Labels: map[string]string{"pool": "ledger"}},
		Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:write:effect/"}}},
	}
	for _, f := range change {
		f(spec)
	}
	started, err := c.Client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	l := &ledger{Cluster: c, t: t, name: name, id: started.Instances[0].Id}
	l.waitEffect(1)
	return l
}

// kv calls the provider as a user, in the ledger's bucket.
func (l *ledger) kv(ctx context.Context, operation string, req, resp proto.Message) error {
	payload, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	answer, err := l.Client.CallProvider(ctx, &pb.CallProviderRequest{
		ProviderId: "kv", Capability: "kv", Operation: operation, Payload: payload, Bucket: l.name,
	})
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer.GetPayload(), resp)
}

// effects returns what the provider let in, in the order in which it did.
func (l *ledger) effects(ctx context.Context, prefix string) ([]*pb.KvEntry, error) {
	var all []*pb.KvEntry
	req := &pb.KvListRequest{Prefix: []byte(prefix), Limit: 1000, KeysOnly: true}
	for {
		page := &pb.KvListResponse{}
		if err := l.kv(ctx, "list", req, page); err != nil {
			return nil, err
		}
		all = append(all, page.Entries...)
		if req.Cursor = page.NextCursor; len(req.Cursor) == 0 {
			break
		}
	}
	slices.SortFunc(all, func(a, b *pb.KvEntry) int { return cmp.Compare(a.Version, b.Version) })
	return all, nil
}

func generationKey(generation uint64) string { return fmt.Sprintf("effect/%06d/", generation) }

// waitEffect waits until a generation has had an effect, and returns when it was seen.
func (l *ledger) waitEffect(generation uint64) time.Time {
	l.t.Helper()
	return l.waitEffects(generation, 1)
}

func (l *ledger) waitEffects(generation uint64, count uint32) time.Time {
	l.t.Helper()
	var seen time.Time
	what := fmt.Sprintf("generation %d of %s to have %d effects", generation, l.name, count)
	err := harness.Until(l.Context(movedWithin), what, func(ctx context.Context) error {
		page := &pb.KvListResponse{}
		if err := l.kv(ctx, "list", &pb.KvListRequest{Prefix: []byte(generationKey(generation)), Limit: count, KeysOnly: true}, page); err != nil {
			return err
		}
		if n := len(page.Entries); n < int(count) {
			return fmt.Errorf("it has had %d", n)
		}
		seen = time.Now()
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return seen
}

// steps says how long after since the steps of a move were recorded.
func (l *ledger) steps(since time.Time) string {
	l.t.Helper()
	var out []string
	for _, e := range events(l.Context(20*time.Second), l.t, l.Cluster) {
		if at := e.Time.AsTime().Sub(since); at > 0 && (e.InstanceId == l.id || e.NodeId != "" && e.InstanceId == "") {
			out = append(out, fmt.Sprintf("%s %s", strings.TrimPrefix(e.Kind.String(), "EVENT_KIND_"), at.Round(time.Millisecond)))
		}
	}
	return strings.Join(out, ", ")
}

// machines returns the virtual machines of a node; none with another runtime.
func (l *ledger) machines(n *dev.Node) []int {
	l.t.Helper()
	agent, err := n.AgentPID()
	if err != nil {
		l.t.Fatal(err)
	}
	return l.Machines.RunningOf(agent)
}

func (l *ledger) instance() *pb.Instance {
	l.t.Helper()
	got, err := l.Client.QueryInstance(l.Context(20*time.Second), &pb.QueryInstanceRequest{Target: l.id})
	if err != nil {
		l.t.Fatal(err)
	}
	return got.Instance
}

// settled waits until the instance runs in a generation that has had an effect,
// and all nodes hold their leases; it returns the instance.
func (l *ledger) settled() *pb.Instance {
	l.t.Helper()
	var in *pb.Instance
	err := harness.Until(l.Context(movedWithin), l.name+" to run and all nodes to be ready", func(ctx context.Context) error {
		nodes, err := l.Client.ListNodes(ctx, &pb.ListNodesRequest{})
		if err != nil {
			return err
		}
		for _, n := range nodes.Nodes {
			if n.State != pb.NodeState_NODE_STATE_READY {
				return fmt.Errorf("%s is %s", n.Id, n.State)
			}
		}
		got, err := l.Client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: l.id})
		if err != nil {
			return err
		}
		if in = got.Instance; in.Status.State != pb.InstanceState_INSTANCE_STATE_RUNNING {
			return fmt.Errorf("it is %s: %s", in.Status.State, in.Status.Message)
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.waitEffects(in.Placement.Generation, effectsBefore)
	return in
}

// verify fails the test when the effects of two generations overlapped: once the
// provider let a generation in, it must never let in an older one.
func (l *ledger) verify() {
	l.t.Helper()
	all, err := l.effects(l.Context(time.Minute), "effect/")
	if err != nil {
		l.t.Fatal(err)
	}
	overlaps, generations := 0, 1
	newest := all[0].Key[:len(generationKey(0))]
	for _, e := range all {
		switch of := e.Key[:len(newest)]; bytes.Compare(of, newest) {
		case -1:
			overlaps++
			l.t.Errorf("%s was let in at version %d, after %s had been", e.Key, e.Version, newest)
		case 1:
			newest, generations = of, generations+1
		}
	}
	l.t.Logf("%s: %d effects of %d generations, %d overlaps", l.name, len(all), generations, overlaps)
}

// TestNodeKilled kills whole nodes, peer and agent: what ran there serves
// elsewhere, and no effects of two generations overlap.
func TestNodeKilled(t *testing.T) {
	c := nodeLossCluster(t)
	l := startLedger(t, c, "ledger")
	var took []time.Duration
	for range rounds(t, roundsVariable, 3) {
		in := l.settled()
		victim := c.Node(in.Placement.NodeId)
		machines := l.machines(victim)
		killed := time.Now()
		if err := victim.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := c.Machines.Gone(machines...); len(machines) > 0 && err != nil {
			t.Error(err)
		}
		took = append(took, l.waitEffect(in.Placement.Generation+1).Sub(killed))
		t.Logf("%s", l.steps(killed))
		start(t, victim)
	}
	l.settled()
	l.verify()
	t.Logf("kill -9 of a node to the first effect elsewhere, %d rounds: %s", len(took), distribution(took))
}

// TestAgentPaused stops agents for a while and lets them go on. Those that slept
// longer than their lease wake up to a world with a newer generation: not one of
// their effects may be let in after that.
func TestAgentPaused(t *testing.T) {
	pauses := []time.Duration{time.Second, 3500 * time.Millisecond, 6 * time.Second}
	if os.Getenv(roundsVariable) != "" {
		pauses = []time.Duration{
			time.Second, 2 * time.Second, 2700 * time.Millisecond, 3100 * time.Millisecond, 3300 * time.Millisecond,
			3500 * time.Millisecond, 4 * time.Second, 6 * time.Second, 10 * time.Second, 30 * time.Second,
		}
	}
	if given := os.Getenv(pausesVariable); given != "" {
		pauses = nil
		for text := range strings.SplitSeq(given, ",") {
			pause, err := time.ParseDuration(text)
			if err != nil {
				t.Fatalf("%s: %v", pausesVariable, err)
			}
			pauses = append(pauses, pause)
		}
	}
	c := nodeLossCluster(t)
	keep := startLedger(t, c, "keep")
	stop := startLedger(t, c, "stop", func(s *pb.WorkloadSpec) { s.OnDisconnect = "stop" })
	var took []time.Duration
	stayed := 0
	for round := range rounds(t, roundsVariable, len(pauses)) {
		pause := pauses[round%len(pauses)]
		in := keep.settled()
		stop.settled()
		victim := c.Node(in.Placement.NodeId)
		machines := keep.machines(victim)
		paused := time.Now()
		if err := victim.SignalAgent(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		timer := time.NewTimer(pause)
		moved := make(chan time.Time, 1)
		if pause > 5*time.Second {
			moved <- keep.waitEffect(in.Placement.Generation + 1)
		}
		<-timer.C
		if err := victim.SignalAgent(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		select {
		case at := <-moved:
			took = append(took, at.Sub(paused))
			// The machine of the old generation ran on while its agent stood still.
			if err := c.Machines.Fewer(machines); err != nil {
				t.Error(err)
			}
		default:
			if keep.settled().Placement.Generation == in.Placement.Generation {
				stayed++
			}
		}
	}
	keep.settled()
	stop.settled()
	keep.verify()
	stop.verify()
	t.Logf("SIGSTOP of an agent: %d pauses ended before the lease; to the first effect elsewhere in %d rounds: %s",
		stayed, len(took), distribution(took))
}

// TestAgentKilled kills agents only. The peer starts a new one, which is a new
// epoch of the node: what the old one ran goes on in the next generation.
func TestAgentKilled(t *testing.T) {
	c := nodeLossCluster(t)
	l := startLedger(t, c, "ledger")
	var took []time.Duration
	for range rounds(t, roundsVariable, 2) {
		in := l.settled()
		victim := c.Node(in.Placement.NodeId)
		machines := l.machines(victim)
		killed := time.Now()
		if err := victim.SignalAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := c.Machines.Gone(machines...); len(machines) > 0 && err != nil {
			t.Error(err)
		}
		took = append(took, l.waitEffect(in.Placement.Generation+1).Sub(killed))
	}
	l.settled()
	l.verify()
	t.Logf("kill -9 of an agent to the first effect of the next generation, %d rounds: %s", len(took), distribution(took))
}

// TestDrainMovesOneAfterTheOther drains nodes: the next generation begins only
// after the one before has ended.
func TestDrainMovesOneAfterTheOther(t *testing.T) {
	c := nodeLossCluster(t)
	l := startLedger(t, c, "ledger")
	var took []time.Duration
	for range rounds(t, roundsVariable, 1) {
		in := l.settled()
		from := in.Placement.NodeId
		began := time.Now()
		if out := c.CLI("node", "drain", from); out.Code != 0 {
			t.Fatalf("drain %s: %+v", from, out)
		}
		took = append(took, l.waitEffect(in.Placement.Generation+1).Sub(began))
		if now := l.instance().Placement; now.NodeId == from || now.Generation != in.Placement.Generation+1 {
			t.Fatalf("after the drain of %s it is in generation %d on %s", from, now.Generation, now.NodeId)
		}
		if out := c.CLI("node", "undrain", from); out.Code != 0 {
			t.Fatalf("undrain %s: %+v", from, out)
		}
	}
	l.settled()
	l.verify()
	t.Logf("drain to the first effect elsewhere, %d rounds: %s", len(took), distribution(took))
}

// TestRestartPolicyOfLostNodes: "never" stays LOST, and what returns with its
// node ends its stale generation.
func TestRestartPolicyOfLostNodes(t *testing.T) {
	c := nodeLossCluster(t)
	never := startLedger(t, c, "never", func(s *pb.WorkloadSpec) { s.Restart = &pb.RestartPolicy{Policy: "never"} })
	moves := startLedger(t, c, "moves", func(s *pb.WorkloadSpec) {
		s.Placement = &pb.PlacementRules{Node: never.instance().Placement.NodeId}
	})
	victim := c.Node(never.instance().Placement.NodeId)
	if err := victim.SignalAgent(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*ledger{never, moves} {
		if err := harness.WaitState(c.Context(movedWithin), c.Client, l.id, pb.InstanceState_INSTANCE_STATE_LOST); err != nil {
			t.Fatal(err)
		}
	}
	if err := victim.SignalAgent(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// It may run nowhere else: it is placed again, on the node that has come back.
	moves.waitEffect(2)
	if st := never.instance().Status; st.State != pb.InstanceState_INSTANCE_STATE_LOST {
		t.Errorf("with policy never it is %s after its node came back", st.State)
	}
	// The process of the first generation was frozen, not killed; it must be gone.
	eventually(t, c, "the stale generation to have ended", func(ctx context.Context) error {
		before, err := never.effects(ctx, "effect/")
		if err != nil {
			return err
		}
		moves.waitEffect(2)
		after, err := never.effects(ctx, "effect/")
		if err == nil && len(after) != len(before) {
			err = fmt.Errorf("%d effects, then %d", len(before), len(after))
		}
		return err
	})
	moves.verify()
	never.verify()
}
