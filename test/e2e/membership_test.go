package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// follower returns a running node that does not lead.
func follower(c *harness.Cluster) *dev.Node {
	leader := c.Leader()
	return c.Nodes()[slices.IndexFunc(c.Nodes(), func(n *dev.Node) bool { return n != leader })]
}

// TestPeerComesBackAtOtherPorts moves a peer: the others find it, the registry
// follows it, and it counts in the quorum.
func TestPeerComesBackAtOtherPorts(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	moved := follower(c)
	stop(t, c, moved)
	move(t, moved, 300)
	start(t, moved)
	eventually(t, c, "the registry to have the new addresses of "+moved.Name(), func(ctx context.Context) error {
		status, err := statusOf(ctx, c, c.Leader())
		if err != nil {
			return err
		}
		for _, p := range status.Peers {
			if p.Id == moved.Name() && (!p.Alive || p.ApiAddress != moved.Config.APIAddress()) {
				return fmt.Errorf("it is at %s, alive %v", p.ApiAddress, p.Alive)
			}
		}
		return nil
	})
	// With another one gone nothing can be committed without the moved one.
	leader := c.Leader()
	third := c.Nodes()[slices.IndexFunc(c.Nodes(), func(n *dev.Node) bool { return n != leader && n != moved })]
	if err := third.KillPeer(); err != nil {
		t.Fatal(err)
	}
	register(t, c, "after-the-move")
	status, err := c.Client.Status(c.Context(time.Minute), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := harness.WaitApplied(c.Context(time.Minute), c.Cluster, moved, status.CommitIndex); err != nil {
		t.Fatal(err)
	}
	start(t, third)
}

// TestRemovedPeerIsNotLetInAgain removes a peer and starts it again: it says why
// it is out and how it gets back in, and does that.
func TestRemovedPeerIsNotLetInAgain(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	removed := follower(c)
	// A message of the leader a moment before the removal is no place that it loses.
	eventually(t, c, removed.Name()+" to have its place", func(ctx context.Context) error { return oneLeader(ctx, c, 3) })
	if out := c.CLI("cluster", "remove", removed.Name()); out.Code != 0 {
		t.Fatalf("cluster remove: %+v", out)
	}
	stop(t, c, removed)
	start(t, removed)
	eventually(t, c, removed.Name()+" to say why it is out", func(ctx context.Context) error {
		log, err := os.ReadFile(removed.LogPath)
		if err != nil {
			return err
		}
		for _, want := range []string{"this peer was removed from the cluster", filepath.Join(removed.Config.DataDir, "raft")} {
			if !strings.Contains(string(log), want) {
				return fmt.Errorf("its log does not say %q", want)
			}
		}
		return voters(ctx, c, 2)
	})

	// What it says to do gets it back, as a new peer.
	stop(t, c, removed)
	if err := os.RemoveAll(filepath.Join(removed.Config.DataDir, "raft")); err != nil {
		t.Fatal(err)
	}
	start(t, removed)
	eventually(t, c, removed.Name()+" to vote again", func(ctx context.Context) error { return voters(ctx, c, 3) })
	register(t, c, "after-the-return")
}

// register writes something to the registry.
func register(t *testing.T, c *harness.Cluster, id string) {
	t.Helper()
	_, err := c.Client.RegisterProvider(c.Context(time.Minute), &pb.RegisterProviderRequest{
		Spec: &pb.ProviderSpec{Id: id, Type: "kv", Driver: "memory"},
	})
	if err != nil {
		t.Fatal(err)
	}
}

func stop(t *testing.T, c *harness.Cluster, n *dev.Node) {
	t.Helper()
	if err := n.Stop(c.Context(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

// move gives a node that does not run other ports.
func move(t *testing.T, n *dev.Node, by int) {
	t.Helper()
	path := filepath.Join(filepath.Dir(n.LogPath), "config.yaml")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text, old := string(raw), n.Config.Bind.PortBase
	for offset := range node.PortCount {
		text = strings.ReplaceAll(text, fmt.Sprintf(":%d", old+offset), fmt.Sprintf(":%d", old+offset+by))
	}
	text = strings.Replace(text, fmt.Sprintf("port_base: %d", old), fmt.Sprintf("port_base: %d", old+by), 1)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Config.Bind.PortBase += by
}
