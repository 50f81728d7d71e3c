package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

func TestColdStartInAnyOrder(t *testing.T) {
	for _, order := range [][]int{{2, 0, 1}, {4, 2, 0, 3, 1}} {
		t.Run(fmt.Sprintf("%d peers", len(order)), func(t *testing.T) {
			c := harness.New(t, dev.Options{Nodes: len(order)})
			late := order[len(order)-1]
			for _, i := range order[:len(order)-1] {
				start(t, c.Nodes()[i])
			}
			// With one peer missing nobody may bootstrap, so nobody leads.
			first := c.Nodes()[order[0]]
			eventually(t, c, first.Name()+" to answer without a leader", func(ctx context.Context) error {
				status, err := statusOf(ctx, c, first)
				if err == nil && status.LeaderId != "" {
					t.Fatalf("%s leads although %s is missing", status.LeaderId, c.Nodes()[late].Name())
				}
				return err
			})
			start(t, c.Nodes()[late])
			c.Ready()
			eventually(t, c, "all peers to agree on one leader", func(ctx context.Context) error {
				return oneLeader(ctx, c, len(order))
			})
		})
	}
}

func TestMembershipChanges(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	c.RunHello("hello", "n2")
	fourth, err := c.AddNode()
	if err != nil {
		t.Fatal(err)
	}
	start(t, fourth)
	eventually(t, c, "n4 to become a voter", func(ctx context.Context) error { return voters(ctx, c, 4) })

	if out := c.CLI("cluster", "remove", "n4"); out.Code != 0 {
		t.Fatalf("cluster remove n4: %+v", out)
	}
	eventually(t, c, "n4 to be gone", func(ctx context.Context) error { return voters(ctx, c, 3) })
	if err := fourth.Kill(); err != nil {
		t.Fatal(err)
	}

	// A peer whose disk was lost comes back under its old name.
	leader := c.Leader()
	victim := c.Nodes()[slices.IndexFunc(c.Nodes(), func(n *dev.Node) bool { return n != leader && n != fourth })]
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(victim.Config.DataDir); err != nil {
		t.Fatal(err)
	}
	start(t, victim)
	eventually(t, c, victim.Name()+" to hold the registry again", func(ctx context.Context) error {
		if err := voters(ctx, c, 3); err != nil {
			return err
		}
		cl, err := harness.ClientOf(c.Cluster, victim)
		if err != nil {
			return err
		}
		defer cl.Close()
		_, err = cl.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: "hello", Read: &pb.ReadOptions{Stale: true}})
		return err
	})
}

func start(t *testing.T, n *dev.Node) {
	t.Helper()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, c *harness.Cluster, what string, f func(context.Context) error) {
	t.Helper()
	if err := harness.Until(c.Context(45*time.Second), what, f); err != nil {
		t.Fatal(err)
	}
}

func statusOf(ctx context.Context, c *harness.Cluster, n *dev.Node) (*pb.StatusResponse, error) {
	cl, err := harness.ClientOf(c.Cluster, n)
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	return cl.Status(ctx, &pb.StatusRequest{})
}

// oneLeader checks that all peers name the same leader and see all voters.
func oneLeader(ctx context.Context, c *harness.Cluster, want int) error {
	leaders := map[string]bool{}
	for _, n := range c.Nodes() {
		status, err := statusOf(ctx, c, n)
		if err != nil {
			return err
		}
		leaders[status.LeaderId] = true
		if len(status.Peers) != want {
			return fmt.Errorf("%s sees %d peers", n.Name(), len(status.Peers))
		}
	}
	if len(leaders) != 1 || leaders[""] {
		return fmt.Errorf("leaders: %v", leaders)
	}
	return nil
}

func voters(ctx context.Context, c *harness.Cluster, want int) error {
	status, err := c.Client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	n := 0
	for _, p := range status.Peers {
		if p.Voter {
			n++
		}
	}
	if n != want || len(status.Peers) != want {
		return fmt.Errorf("%d peers, %d of them voters: %v", len(status.Peers), n, status.Peers)
	}
	return nil
}
