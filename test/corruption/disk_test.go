package corruption

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// within is 5 s on a machine that does nothing else, where figures are taken.
var within = flag.Duration("within", 20*time.Second, "how long the replacement of a leader whose disk hangs may take")

// diskCalls are the system calls through which a peer changes its files. Its
// sockets and its log use others.
const diskCalls = "pwrite64,fsync,fdatasync,ftruncate,fallocate"

// peers is a cluster of control-plane peers alone.
type peers struct {
	*harness.Cluster
	t      *testing.T
	module string
	tried  int
	acked  []string
}

// startPeers starts n peers. adjust may be nil.
func startPeers(t *testing.T, n int, adjust func(i int, cfg *node.Config)) *peers {
	t.Helper()
	p := &peers{t: t}
	p.Cluster = harness.Start(t, dev.Options{Nodes: n, Providers: []node.ProviderConfig{}, Adjust: func(i int, cfg *node.Config) {
		cfg.Node.Role = node.RoleServer
		if adjust != nil {
			adjust(i, cfg)
		}
	}})
	ctx := p.Context(time.Minute)
	module, err := p.Client.UploadModuleFile(ctx, filepath.Join(p.Guests, "wordcount.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	p.module = module.Digest
	return p
}

// write registers one more workload that nobody runs.
func (p *peers) write(ctx context.Context, c *client.Client) error {
	// One that failed may still happen.
	p.tried++
	name := fmt.Sprintf("w%05d", p.tried)
	_, err := c.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: name, Module: p.module,
		Placement: &pb.PlacementRules{Labels: map[string]string{"node": "none-has-this"}},
	}})
	if err == nil {
		p.acked = append(p.acked, name)
	}
	return err
}

func (p *peers) mustWrite(n int) {
	p.t.Helper()
	ctx := p.Context(time.Minute)
	for range n {
		if err := p.write(ctx, p.Client); err != nil {
			p.t.Fatal(err)
		}
	}
}

// missing counts the workloads that were acknowledged and are not there.
func (p *peers) missing() int {
	p.t.Helper()
	found := map[string]bool{}
	ctx := p.Context(time.Minute)
	for token := ""; ; {
		page, err := p.Client.ListInstances(ctx, &pb.ListInstancesRequest{PageToken: token, PageSize: 1000})
		if err != nil {
			p.t.Fatal(err)
		}
		for _, i := range page.Instances {
			found[i.Name] = true
		}
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	n := 0
	for _, name := range p.acked {
		if !found[name] {
			n++
		}
	}
	return n
}

// status asks one peer about itself.
func (p *peers) status(n *dev.Node) (*pb.StatusResponse, error) {
	c, err := harness.ClientOf(p.Cluster.Cluster, n)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Status(p.Context(10*time.Second), &pb.StatusRequest{})
}

// caughtUp waits until a peer has applied what the leader has committed.
func (p *peers) caughtUp(n *dev.Node) {
	p.t.Helper()
	ctx := p.Context(time.Minute)
	status, err := p.Client.Status(ctx, &pb.StatusRequest{})
	if err == nil {
		err = harness.WaitApplied(ctx, p.Cluster.Cluster, n, status.CommitIndex)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// said waits until the node's log has the text.
func (p *peers) said(n *dev.Node, text string) {
	p.t.Helper()
	err := harness.Until(p.Context(time.Minute), fmt.Sprintf("%s to say %q", n.Name(), text), func(context.Context) error {
		raw, err := os.ReadFile(n.LogPath)
		if err == nil && !strings.Contains(string(raw), text) {
			err = errors.New("it has not")
		}
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

// ended waits until a peer's process has ended by itself.
func (p *peers) ended(n *dev.Node, within time.Duration) {
	p.t.Helper()
	select {
	case <-n.Exited():
	case <-time.After(within):
		p.t.Fatalf("%s still runs after %s", n.Name(), within)
	}
}

func (p *peers) start(n *dev.Node) {
	p.t.Helper()
	if err := n.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// inject makes the disk of a peer's process misbehave until the test or stop ends it.
func (p *peers) inject(n *dev.Node, what string) (stop func()) {
	p.t.Helper()
	harness.NeedRoot(p.t, "strace")
	pid, err := n.PID()
	if err != nil {
		p.t.Fatal(err)
	}
	trace, err := harness.Inject(pid, what)
	if err != nil {
		p.t.Fatal(err)
	}
	stop = func() {
		if err := trace.Stop(); err != nil {
			p.t.Error(err)
		}
	}
	p.t.Cleanup(stop)
	return stop
}

// hang makes every change of a file by a peer's process block, until stop or the
// test ends it. A strace that holds up a call for an hour does not listen, so it is killed.
func (p *peers) hang(n *dev.Node) (stop func()) {
	p.t.Helper()
	harness.NeedRoot(p.t, "strace")
	pid, err := n.PID()
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("strace", "-f", "-p", strconv.Itoa(pid), "-o", "/dev/null", "-e", "trace="+diskCalls, "-e", "inject="+diskCalls+":delay_enter=3600000000")
	said, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	p.t.Cleanup(stop)
	lines := bufio.NewScanner(said)
	if !lines.Scan() || !strings.Contains(lines.Text(), "attached") {
		p.t.Fatalf("strace says %q", lines.Text())
	}
	go func() {
		for lines.Scan() { // so that it never blocks
		}
	}()
	return stop
}

// TestLeaderWhoseDiskHangsIsReplacedAndEnds makes every write of the leader's
// process block for ever, while nobody writes: the others replace it, and it
// does not pretend to live.
func TestLeaderWhoseDiskHangsIsReplacedAndEnds(t *testing.T) {
	p := startPeers(t, 3, nil)
	p.mustWrite(20)
	old := p.Leader()
	began := time.Now()
	stop := p.hang(old)
	attached := time.Now()
	err := harness.Until(p.Context(30*time.Second), "another leader", func(context.Context) error {
		for _, n := range p.Nodes() {
			if n == old {
				continue
			}
			if status, err := p.status(n); err == nil && status.LeaderId != "" && status.LeaderId != old.Name() {
				return nil
			}
		}
		return errors.New("there is none")
	})
	if err != nil {
		t.Fatal(err)
	}
	replaced := time.Since(attached)
	p.mustWrite(1)
	t.Logf("a new leader %s after the disk hung, the next write %s after (attaching took %s)", replaced.Round(time.Millisecond), time.Since(attached).Round(time.Millisecond), attached.Sub(began).Round(time.Millisecond))
	if replaced > *within {
		t.Errorf("replaced after %s, want at most %s", replaced, *within)
	}
	p.said(old, "the disk hangs")
	p.said(old, "exit 10")
	t.Logf("its process ended %s after the disk hung", time.Since(attached).Round(100*time.Millisecond))
	// What strace holds up is not gone before strace is.
	stop()
	p.ended(old, 20*time.Second)
	p.start(old)
	p.caughtUp(old)
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}

// TestSlowDisksDoNotFlap slows each sync of the leader down to 200 ms: it is slow
// and keeps its leadership.
func TestSlowDisksDoNotFlap(t *testing.T) {
	p := startPeers(t, 3, nil)
	p.mustWrite(5)
	leader := p.Leader()
	stop := p.inject(leader, "fsync,fdatasync:delay_enter=200000")
	before, err := p.status(leader)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	p.mustWrite(8)
	took := time.Since(began)
	after, err := p.status(leader)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	// A loaded machine may cause an election by itself; a disk that counts as hanging would cause one after the other.
	if after.Term > before.Term+3 {
		t.Errorf("%s led in term %d; with a slow disk %s leads in term %d", leader.Name(), before.Term, after.LeaderId, after.Term)
	}
	if raw, err := os.ReadFile(leader.LogPath); err != nil || strings.Contains(string(raw), "a write to the disk hangs") {
		t.Errorf("a slow disk is taken for one that hangs: %v", err)
	}
	t.Logf("8 writes in %s, led by %s in term %d before and %s in term %d after", took.Round(time.Millisecond), leader.Name(), before.Term, after.LeaderId, after.Term)
}

// TestPeerWhoseSyncFailsEnds makes the syncs of a follower, then of the leader, fail.
func TestPeerWhoseSyncFailsEnds(t *testing.T) {
	p := startPeers(t, 3, nil)
	p.mustWrite(5)
	leader := p.Leader()
	follower := p.Nodes()[0]
	if follower == leader {
		follower = p.Nodes()[1]
	}
	for _, victim := range []*dev.Node{follower, leader} {
		p.inject(victim, "fsync,fdatasync:error=EIO")
		p.mustWrite(3)
		p.ended(victim, 30*time.Second)
		p.said(victim, "the disk failed")
		p.said(victim, "then start this peer again")
		p.said(victim, "exit 10")
		if raw, err := os.ReadFile(victim.LogPath); err != nil || strings.Contains(string(raw), "panic:") || strings.Contains(string(raw), "goroutine 1 ") {
			t.Errorf("%s panicked: %v", victim.Name(), err)
		}
		p.start(victim)
		p.caughtUp(victim)
	}
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}

// fill writes a file until the disk is full, leaving at most leave bytes, and returns what frees the space.
func fill(t *testing.T, dir string, leave int64) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 64<<10)
	var size int64
	for {
		n, err := f.Write(block)
		size += int64(n)
		if err != nil {
			break
		}
	}
	if err := errors.Join(f.Truncate(max(size-leave, 0)), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// TestFullDisks fills the disk of a leader, of a follower, and of all peers.
func TestFullDisks(t *testing.T) {
	const size = 64 << 20
	disks := map[string]string{}
	for _, n := range []string{"n1", "n2", "n3"} {
		disks[n] = harness.Tmpfs(t, size)
	}
	p := startPeers(t, 3, func(_ int, cfg *node.Config) { cfg.DataDir = filepath.Join(disks[cfg.Node.Name], "data") })
	p.mustWrite(5)
	pids := map[string]int{}
	for _, n := range p.Nodes() {
		pids[n.Name()], _ = n.PID()
	}
	leader := p.Leader()
	follower := p.Nodes()[0]
	if follower == leader {
		follower = p.Nodes()[1]
	}

	t.Log("a follower:", follower.Name())
	free := fill(t, disks[follower.Name()], 0)
	p.mustWrite(200)
	free()
	p.caughtUp(follower)

	t.Log("the leader:", leader.Name())
	free = fill(t, disks[leader.Name()], 0)
	err := harness.Until(p.Context(30*time.Second), "leadership to move away", func(ctx context.Context) error {
		status, err := p.Client.Status(ctx, &pb.StatusRequest{})
		if err == nil && (status.LeaderId == leader.Name() || status.LeaderId == "") {
			err = fmt.Errorf("the leader is %q", status.LeaderId)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p.mustWrite(200)
	free()
	p.caughtUp(leader)

	t.Log("all")
	var frees []func()
	for _, dir := range disks {
		frees = append(frees, fill(t, dir, 0))
	}
	var refusal error
	err = harness.Until(p.Context(30*time.Second), "a write to be refused", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if refusal = p.write(ctx, p.Client); apierror.CodeOf(refusal) != pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED {
			return fmt.Errorf("it came to %w", refusal)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("a write:", refusal)
	if e := apierror.From(refusal); !strings.Contains(e.Error(), "is full") || e.Detail("outcome") != "failed" {
		t.Errorf("the refusal says %v, outcome %q", e, e.Detail("outcome"))
	}
	_, err = p.Client.UploadModuleFile(p.Context(20*time.Second), filepath.Join(p.Guests, "hello.wasm"))
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED {
		t.Errorf("an upload: %v", err)
	}
	for _, free := range frees {
		free()
	}
	began := time.Now()
	err = harness.Until(p.Context(30*time.Second), "writes to go on", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return p.write(ctx, p.Client)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("writes went on %s after there was room", time.Since(began).Round(time.Millisecond))
	if _, err := p.Client.UploadModuleFile(p.Context(20*time.Second), filepath.Join(p.Guests, "hello.wasm")); err != nil {
		t.Errorf("an upload after there was room: %v", err)
	}
	for _, n := range p.Nodes() {
		p.caughtUp(n)
		if pid, err := n.PID(); err != nil || pid != pids[n.Name()] {
			t.Errorf("%s did not live through it: %v", n.Name(), err)
		}
	}
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}

// TestElectedWithAFullDisk has a peer elected that has no room to lead: it says why
// nothing is written, and it does not stay in the way of those that have room.
func TestElectedWithAFullDisk(t *testing.T) {
	disks := map[string]string{}
	for _, n := range []string{"n1", "n2", "n3"} {
		disks[n] = harness.Tmpfs(t, 64<<20)
	}
	p := startPeers(t, 3, func(_ int, cfg *node.Config) { cfg.DataDir = filepath.Join(disks[cfg.Node.Name], "data") })
	p.mustWrite(5)
	frees := map[string]func(){}
	for name, dir := range disks {
		frees[name] = fill(t, dir, 0)
	}
	old := p.Leader()
	var left []*dev.Node
	for _, n := range p.Nodes() {
		if n != old {
			left = append(left, n)
		}
	}
	if err := old.KillPeer(); err != nil {
		t.Fatal(err)
	}
	for _, n := range left {
		c, err := harness.ClientOf(p.Cluster.Cluster, n)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		err = harness.Until(p.Context(time.Minute), n.Name()+" to refuse a write", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			err := p.write(ctx, c)
			if err == nil {
				return errors.New("the files have room inside")
			}
			if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED || !strings.Contains(err.Error(), "is full") {
				return fmt.Errorf("it came to %w", err)
			}
			t.Logf("%s: %v", n.Name(), err)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var full *dev.Node
	err := harness.Until(p.Context(time.Minute), "a leader that has no room", func(context.Context) error {
		status, err := p.status(left[0])
		for _, n := range left {
			if err == nil && n.Name() == status.LeaderId {
				full = n
				return nil
			}
		}
		return errors.Join(err, errors.New("there is none"))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range p.Nodes() {
		if n != full {
			frees[n.Name()]()
		}
	}
	p.start(old)
	began := time.Now()
	err = harness.Until(p.Context(time.Minute), "writes to go on", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return p.write(ctx, p.Client)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s led on a full disk; writes went on %s after the others had room", full.Name(), time.Since(began).Round(time.Millisecond))
	frees[full.Name()]()
	p.mustWrite(5)
	p.caughtUp(full)
	if n := p.missing(); n > 0 {
		t.Errorf("%d acknowledged writes are gone", n)
	}
}
