package e2e

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// cutOffCluster is nodeLossCluster on hosts of their own.
func cutOffCluster(t *testing.T) (*harness.Cluster, *harness.Network) {
	t.Helper()
	harness.NeedRoot(t)
	network := harness.NewNetwork(t, 3)
	c := harness.New(t, dev.Options{
		Nodes: 3, Address: network.Address,
		Adjust: func(i int, cfg *node.Config) {
			if i > 1 {
				cfg.Node.Labels["pool"] = "ledger"
			}
		},
		Command: func(name string, argv []string) []string { return network.Command(hostOf(name), argv) },
	})
	known, err := client.LoadContext(c.ContextPath)
	if err != nil {
		t.Fatal(err)
	}
	id, err := known.Identity()
	if err != nil {
		t.Fatal(err)
	}
	reaching, err := client.New(client.Config{
		Addresses: known.Addresses, Identity: id,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return network.Dial(ctx, address)
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = reaching.Close() })
	c.Client = reaching
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	c.Ready()
	return c, network
}

func hostOf(name string) int {
	var i int
	_, _ = fmt.Sscanf(name, "n%d", &i)
	return i
}

// TestNodeCutOff cuts nodes off: by turns from everything, and from the leader
// only, while the provider is still within reach of what runs there. Then it is
// the fence alone that keeps the old generation out.
func TestNodeCutOff(t *testing.T) {
	c, network := cutOffCluster(t)
	keep := startLedger(t, c, "keep")
	stop := startLedger(t, c, "stop", func(s *pb.WorkloadSpec) { s.OnDisconnect = "stop" })
	var took []time.Duration
	wanted := rounds(t, roundsVariable, 2)
	// A round in which another peer came to lead shows nothing and is made again, within a bound.
	for round := 0; len(took) < wanted && round < 3*wanted; round++ {
		in := keep.settled()
		stop.settled()
		victim, other := hostOf(in.Placement.NodeId), 5-hostOf(in.Placement.NodeId)
		lead(t, c, fmt.Sprintf("n%d", other))
		from := []int{1, other}
		if round%2 == 0 {
			from = []int{other}
		}
		cut := time.Now()
		if err := network.Split([]int{victim}, from); err != nil {
			t.Fatal(err)
		}
		if at, moved := waitMoved(t, keep, in.Placement.Generation+1, fmt.Sprintf("n%d", other)); moved {
			took = append(took, at.Sub(cut))
		}
		if err := network.Heal(); err != nil {
			t.Fatal(err)
		}
	}
	keep.settled()
	stop.settled()
	keep.verify()
	stop.verify()
	if len(took) == 0 {
		t.Fatal("no leader stayed for the length of a lease in any round: nothing was seen to move")
	}
	t.Logf("cut-off to %d effects elsewhere, %d rounds: %s", effectsBefore, len(took), distribution(took))
}

// waitMoved waits until a generation has had its effects. It reports false when
// another peer than leader has come to lead, which may hear the victim: then there
// is no reason to move.
func waitMoved(t *testing.T, l *ledger, generation uint64, leader string) (at time.Time, moved bool) {
	t.Helper()
	what := fmt.Sprintf("generation %d of %s to have effects", generation, l.name)
	err := harness.Until(l.Context(movedWithin), what, func(ctx context.Context) error {
		if status, err := l.Client.Status(ctx, &pb.StatusRequest{}); err == nil && status.LeaderId != "" && status.LeaderId != leader {
			return nil
		}
		had, err := l.effects(ctx, generationKey(generation))
		if err != nil {
			return err
		}
		if len(had) < effectsBefore {
			return fmt.Errorf("it has had %d", len(had))
		}
		at, moved = time.Now(), true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return at, moved
}

// lead makes a peer the leader.
func lead(t *testing.T, c *harness.Cluster, id string) {
	t.Helper()
	eventually(t, c, id+" to lead", func(ctx context.Context) error {
		status, err := c.Client.Status(ctx, &pb.StatusRequest{})
		if err != nil || status.LeaderId == id {
			return err
		}
		_, err = c.Client.TransferLeadership(ctx, &pb.TransferLeadershipRequest{PeerId: id})
		if err == nil {
			err = fmt.Errorf("%s leads", status.LeaderId)
		}
		return err
	})
}
