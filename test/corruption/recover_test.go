package corruption

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// takeStep runs the command that a peer's refusal names, literally.
func (p *peers) takeStep(n *dev.Node) {
	p.t.Helper()
	raw, err := os.ReadFile(n.LogPath)
	if err != nil {
		p.t.Fatal(err)
	}
	found := regexp.MustCompile("`(mv [^`]+)`").FindAllSubmatch(raw, -1)
	if len(found) == 0 {
		p.t.Fatalf("%s names no step:\n%s", n.Name(), dev.Tail(n.LogPath, 20))
	}
	step := string(found[len(found)-1][1])
	p.t.Logf("%s says: %s", n.Name(), step)
	if out, err := exec.CommandContext(p.t.Context(), "sh", "-c", step).CombinedOutput(); err != nil {
		p.t.Fatalf("%s: %v: %s", step, err, out)
	}
}

// TestDamagedPeerComesBackByTheStepItNames damages the log of a stopped peer.
func TestDamagedPeerComesBackByTheStepItNames(t *testing.T) {
	p := startPeers(t, 3, nil)
	p.mustWrite(20)
	victim := p.Leader()
	if err := victim.Stop(p.Context(time.Minute)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(victim.Config.DataDir, "raft", "raft.db")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(raw, []byte("w00007")); n == 0 {
		t.Fatal("the log does not hold what was written")
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(raw, []byte("w00007"), []byte("w00005")), 0o600); err != nil {
		t.Fatal(err)
	}
	p.mustWrite(5)
	p.start(victim)
	p.ended(victim, 30*time.Second)
	p.said(victim, "checksum")
	p.said(victim, path)
	p.said(victim, "exit 11")
	p.mustWrite(5)
	p.takeStep(victim)
	p.start(victim)
	p.caughtUp(victim)
	voters := func(ctx context.Context) error {
		status, err := p.Client.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return err
		}
		for _, peer := range status.Peers {
			if peer.Id == victim.Name() && peer.Voter {
				return nil
			}
		}
		return fmt.Errorf("%s does not vote", victim.Name())
	}
	if err := harness.Until(p.Context(time.Minute), "the peer to vote again", voters); err != nil {
		t.Fatal(err)
	}
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}

// TestRecoverAfterTheQuorumIsLost loses two of three peers for ever.
func TestRecoverAfterTheQuorumIsLost(t *testing.T) {
	p := startPeers(t, 3, nil)
	p.mustWrite(20)
	nodes := p.Nodes()
	last := nodes[2]
	config := filepath.Join(filepath.Dir(last.LogPath), "config.yaml")
	recover := []string{"cluster", "recover", "--config", config}
	if out := p.CLI(append(recover, "--yes")...); out.Code == 0 || !strings.Contains(out.Stderr, "stop it first") {
		t.Errorf("while the peer runs: %+v", out)
	}
	p.caughtUp(last)
	for _, n := range nodes {
		if err := n.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if out := p.CLI(recover...); out.Code == 0 || !strings.Contains(out.Stderr, "--yes") || !strings.Contains(out.Stdout, "last entry") {
		t.Errorf("without a yes: %+v", out)
	}
	out := p.CLI(append(recover, "--yes")...)
	if out.Code != 0 {
		t.Fatalf("recover: %+v", out)
	}
	t.Log(out.Stdout)
	backups, err := filepath.Glob(filepath.Join(last.Config.DataDir, "raft.before-recovery-*", "raft.db"))
	if err != nil || len(backups) != 1 {
		t.Errorf("backups: %v, %v", backups, err)
	}
	p.start(last)
	p.mustWrite(5)
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
	for range 2 {
		n, err := p.AddNode()
		if err != nil {
			t.Fatal(err)
		}
		p.start(n)
	}
	three := func(ctx context.Context) error {
		status, err := p.Client.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return err
		}
		voters := 0
		for _, peer := range status.Peers {
			if peer.Voter {
				voters++
			}
		}
		if voters != 3 {
			return fmt.Errorf("%d peers vote", voters)
		}
		return nil
	}
	if err := harness.Until(p.Context(time.Minute), "two new peers to vote", three); err != nil {
		t.Fatal(err)
	}

	// Those that were lost for ever come back after all: they had a quorum.
	for _, n := range nodes[:2] {
		p.start(n)
	}
	for _, n := range nodes[:2] {
		p.ended(n, time.Minute)
		p.said(n, "was recovered without it")
	}
	p.mustWrite(5)
	for _, n := range nodes[:2] {
		p.takeStep(n)
		p.start(n)
		p.caughtUp(n)
	}
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}
