package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestLeaderKills kills the leader again and again under load: no acknowledged
// write is lost, none is applied twice, invocations go on.
func TestLeaderKills(t *testing.T) {
	kills := 20
	if testing.Short() {
		kills = 3
	}
	c := harness.Start(t, dev.Options{Nodes: 3})
	c.RunHello("hello", "n2")
	ctx := c.Context(4 * time.Minute)
	load := harness.StartLoad(ctx, c.Client, "hello")
	defer load.Stop()
	var gaps []time.Duration
	for range kills {
		if err := load.WaitProgress(ctx, 20); err != nil {
			t.Fatal(err)
		}
		victim := c.Leader()
		killed := time.Now()
		if err := victim.KillPeer(); err != nil {
			t.Fatal(err)
		}
		first, err := load.WaitWriteAfter(ctx, killed)
		if err != nil {
			t.Fatal(err)
		}
		gaps = append(gaps, first.Sub(killed))
		start(t, victim)
		status, err := c.Client.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if err := harness.WaitApplied(ctx, c.Cluster, victim, status.CommitIndex); err != nil {
			t.Fatal(err)
		}
	}
	report, err := load.Verify(ctx)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(gaps)
	t.Logf("write gap over %d leader kills: p50 %s, p90 %s, max %s", kills, gaps[len(gaps)/2], gaps[len(gaps)*9/10], gaps[len(gaps)-1])
	t.Logf("writes %d, lost %d, applied twice %d; invocations %d, failed %d, visits %d, longest gap %s", report.Writes, report.Lost,
		report.Doubled, report.Invocations, report.Failed, report.Visits, report.LongestGap)
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
}

// TestAllPeersKilled kills every peer and agent at once, as a power cut would.
func TestAllPeersKilled(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	running := c.RunHello("hello", "n2")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 1\n")
	ctx := c.Context(90 * time.Second)
	before := events(ctx, t, c)
	for _, n := range c.Nodes() {
		if err := n.KillPeer(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.Nodes() {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.Nodes() {
		start(t, n)
	}
	c.Ready()
	if err := harness.WaitState(ctx, c.Client, running.Id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, "the visits to go on", func(ctx context.Context) error {
		got, err := c.Client.Invoke(ctx, &pb.InvokeRequest{Target: "hello", Payload: []byte("Ada")})
		if err != nil {
			return err
		}
		if string(got.Payload) != "hello, Ada: visit 2\n" {
			t.Fatalf("after the restart: %q, want visit 2", got.Payload)
		}
		return nil
	})
	after := events(ctx, t, c)
	if len(after) <= len(before) {
		t.Fatalf("%d events before the power cut, %d after it", len(before), len(after))
	}
	for i, e := range after {
		if e.Sequence != after[0].Sequence+uint64(i) {
			t.Fatalf("event %d has sequence %d: a gap", i, e.Sequence)
		}
		if i > 0 && e.Index < after[i-1].Index {
			t.Fatalf("event %d has an older index than the one before", i)
		}
	}
}

// TestNoLeader takes two of three peers away: nothing can be written, and
// running instances serve with local and remote key-value calls.
func TestNoLeader(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	c.RunHello("near", "n1") // the provider is on n1
	c.RunHello("far", "n3")
	for _, name := range []string{"n1", "n2"} {
		if err := c.Node(name).KillPeer(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, c, "n3 to notice that there is no leader", func(ctx context.Context) error {
		status, err := statusOf(ctx, c, c.Node("n3"))
		if err == nil && status.LeaderId != "" {
			err = fmt.Errorf("it still names %s", status.LeaderId)
		}
		return err
	})
	for visit := 1; visit <= 20; visit++ {
		invoke(t, c, "near", "Ada", fmt.Sprintf("hello, Ada: visit %d\n", visit))
		invoke(t, c, "far", "Ada", fmt.Sprintf("hello, Ada: visit %d\n", visit))
	}
	if out := c.CLI("node", "drain", "n1", "--timeout", "3s"); out.Code != 6 {
		t.Errorf("a write without a leader: exit code %d, want 6\n%s", out.Code, out.Stderr)
	}
	for _, name := range []string{"n1", "n2"} {
		start(t, c.Node(name))
	}
	c.Ready()
	invoke(t, c, "far", "Ada", "hello, Ada: visit 21\n")
}

func invoke(t *testing.T, c *harness.Cluster, target, payload, want string) {
	t.Helper()
	got, err := c.Client.Invoke(c.Context(20*time.Second), &pb.InvokeRequest{Target: target, Payload: []byte(payload)})
	if err != nil {
		t.Fatalf("invoke %s: %v", target, err)
	}
	if string(got.Payload) != want {
		t.Fatalf("invoke %s: %q, want %q", target, got.Payload, want)
	}
}

func events(ctx context.Context, t *testing.T, c *harness.Cluster) []*pb.Event {
	t.Helper()
	var all []*pb.Event
	for got, err := range c.Client.WatchEvents(ctx, &pb.WatchEventsRequest{}) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, got.Event)
	}
	return all
}
