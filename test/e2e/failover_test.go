package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestLeaderKills kills the leader again and again under load: no acknowledged
// write is lost, none is applied twice, invocations go on. WASMATRIX_FAILOVER_ROUNDS
// is how often.
func TestLeaderKills(t *testing.T) {
	kills := rounds(t, "WASMATRIX_FAILOVER_ROUNDS", 10)
	c := harness.Start(t, dev.Options{Nodes: 3})
	c.RunHello("hello", "n2")
	ctx := c.Context(time.Minute + time.Duration(kills)*10*time.Second)
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
		// What is acknowledged from now on, nobody but a new leader acknowledges.
		first, err := load.WaitWriteAfter(ctx, time.Now())
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
	t.Logf("from kill -9 of the leader to the next acknowledged write, %d times: %s", kills, distribution(gaps))
	t.Logf("writes %d, lost %d, applied twice %d; invocations %d, failed %d, visits %d, longest gap %s", report.Writes, report.Lost,
		report.Doubled, report.Invocations, report.Failed, report.Visits, report.LongestGap)
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
}

// TestTransfersUnderLoad moves the leadership on, again and again: no call of a
// client fails. WASMATRIX_TRANSFER_ROUNDS is how often.
func TestTransfersUnderLoad(t *testing.T) {
	transfers := rounds(t, "WASMATRIX_TRANSFER_ROUNDS", 10)
	c := harness.Start(t, dev.Options{Nodes: 3})
	c.RunHello("hello", "n2")
	ctx := c.Context(time.Minute + time.Duration(transfers)*5*time.Second)
	load := harness.StartLoad(ctx, c.Client, "hello")
	defer load.Stop()
	var gaps, calls []time.Duration
	for range transfers {
		if err := load.WaitProgress(ctx, 20); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		moved, err := c.Client.TransferLeadership(ctx, &pb.TransferLeadershipRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if moved.LeaderId == moved.PreviousLeaderId {
			t.Errorf("%s stayed the leader", moved.LeaderId)
		}
		calls = append(calls, time.Since(began))
		if err := load.WaitProgress(ctx, 2); err != nil {
			t.Fatal(err)
		}
		gaps = append(gaps, load.WriteGapSince(began))
	}
	report, err := load.Verify(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("longest time without an acknowledged write around a planned transfer, %d times: %s", transfers, distribution(gaps))
	t.Logf("the order itself: %s", distribution(calls))
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	if report.Failed > 0 {
		t.Fatalf("%d calls failed, the last one with: %v", report.Failed, report.LastFailure)
	}
}

// TestNoElectionWithoutAReason leaves a cluster alone on a machine that has more
// to do than it can: the term stays as it is. WASMATRIX_SOAK is for how long.
func TestNoElectionWithoutAReason(t *testing.T) {
	soak := 8 * time.Second
	if given := os.Getenv("WASMATRIX_SOAK"); given != "" {
		var err error
		if soak, err = time.ParseDuration(given); err != nil {
			t.Fatal(err)
		}
	} else if testing.Short() {
		t.Skip("needs seconds in which nothing happens")
	}
	c := harness.Start(t, dev.Options{Nodes: 3})
	before, err := statusOf(c.Context(time.Minute), c, c.Leader())
	if err != nil {
		t.Fatal(err)
	}
	burning, extinguish := context.WithTimeout(t.Context(), soak)
	defer extinguish()
	var burners []*exec.Cmd
	for range 8 {
		burner := exec.CommandContext(burning, "sh", "-c", "while :; do :; done")
		if err := burner.Start(); err != nil {
			t.Fatal(err)
		}
		burners = append(burners, burner)
	}
	<-burning.Done()
	for _, burner := range burners {
		_ = burner.Wait() // it was killed
	}
	after, err := statusOf(c.Context(time.Minute), c, c.Leader())
	if err != nil {
		t.Fatal(err)
	}
	doubts := 0
	for _, n := range c.Nodes() {
		raw, err := os.ReadFile(n.LogPath)
		if err != nil {
			t.Fatal(err)
		}
		doubts += strings.Count(string(raw), "heartbeat timeout reached, starting election")
	}
	t.Logf("%s with 8 burners on %d processors: term %d before, %d after; followers missed the leader %d times, the first election included",
		soak, runtime.NumCPU(), before.Term, after.Term, doubts)
	if after.Term != before.Term || after.LeaderId != before.LeaderId {
		t.Errorf("%s led in term %d, now it is %s in term %d", before.LeaderId, before.Term, after.LeaderId, after.Term)
	}
}

// rounds returns how often something is to be done: what the environment says,
// else usual, and little in short tests.
func rounds(t *testing.T, variable string, usual int) int {
	t.Helper()
	if given := os.Getenv(variable); given != "" {
		n, err := strconv.Atoi(given)
		if err != nil || n < 1 {
			t.Fatalf("%s=%q: want a number of rounds", variable, given)
		}
		return n
	}
	if testing.Short() {
		return min(usual, 3)
	}
	return usual
}

func distribution(all []time.Duration) string {
	slices.Sort(all)
	at := func(percent int) time.Duration {
		return all[min(len(all)*percent/100, len(all)-1)].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, max %s", at(50), at(90), at(99), at(100))
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
