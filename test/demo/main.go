// Demo shows wasmatrix at work on this machine: three real nodes, a guest whose
// key-value provider lives on another node, a leader killed with SIGKILL while
// writes and invocations go on. It ends with exit code 0 only if no acknowledged
// write was lost, invocations went on and the killed peer caught up.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// longest bounds the whole demo after the build.
const longest = 60 * time.Second

func main() { os.Exit(start()) }

// start returns the exit code.
func start() int {
	binary := flag.String("binary", "build/wasmatrix", "the wasmatrix binary")
	guests := flag.String("guests", "build/guests", "directory of the built guests")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *binary, *guests); err != nil {
		fmt.Fprintln(os.Stderr, "demo failed:", err)
		return 1
	}
	return 0
}

type demo struct {
	began   time.Time
	cluster *dev.Cluster
	client  *client.Client
}

func (d *demo) say(format string, args ...any) {
	fmt.Printf("%7.2fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, binary, guests string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	dir, err := os.MkdirTemp("", "wasmatrix-demo-")
	if err != nil {
		return err
	}
	d := &demo{began: time.Now()}
	defer func() {
		if err != nil {
			for _, n := range d.nodes() {
				fmt.Fprintf(os.Stderr, "--- the end of %s's log\n%s", n.Name(), dev.Tail(n.LogPath, 10))
			}
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	d.cluster, err = dev.Create(dev.Options{Nodes: 3, Dir: dir, Binary: binary, PortBase: harness.FreePortBase(3)})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.cluster.Close(), d.cluster.CheckPorts())
		d.say("all processes ended, ports and files released")
	}()
	return d.play(ctx, filepath.Join(guests, "hello.wasm"))
}

func (d *demo) nodes() []*dev.Node {
	if d.cluster == nil {
		return nil
	}
	return d.cluster.Nodes()
}

func (d *demo) play(ctx context.Context, guest string) (err error) {
	if err := d.cluster.Start(); err != nil {
		return err
	}
	if d.client, err = d.cluster.Client(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.client.Close()) }()
	status, err := d.cluster.WaitReady(ctx, d.client)
	if err != nil {
		return err
	}
	d.say("three nodes are up, %s leads in term %d", status.LeaderId, status.Term)
	if err := d.startHello(ctx, guest); err != nil {
		return err
	}
	load := harness.StartLoad(ctx, d.client, "hello")
	defer load.Stop()
	if err := load.WaitProgress(ctx, 50); err != nil {
		return err
	}
	return d.killLeader(ctx, load)
}

// startHello runs the guest on a node that does not host its provider.
func (d *demo) startHello(ctx context.Context, guest string) error {
	p, err := d.client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: "kv"})
	if err != nil {
		return err
	}
	host := p.Provider.Placement.NodeId
	other := "n2"
	if host == other {
		other = "n3"
	}
	module, err := d.client.UploadModuleFile(ctx, guest)
	if err != nil {
		return err
	}
	d.say("stored %s: %s, %d bytes", filepath.Base(guest), module.Digest[:19], module.SizeBytes)
	began := time.Now()
	started, err := d.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "hello", Module: module.Digest,
		Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read", "kv:write"}}},
		Placement:    &pb.PlacementRules{Node: other},
	}})
	if err != nil {
		return err
	}
	id := started.Instances[0].Id
	if err := harness.WaitState(ctx, d.client, id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
		return err
	}
	d.say("%s runs on %s after %d ms; its key-value provider is on %s", id, other, time.Since(began).Milliseconds(), host)
	answer, err := d.client.Invoke(ctx, &pb.InvokeRequest{Target: "hello", Payload: []byte("wasmatrix")})
	if err != nil {
		return err
	}
	d.say("invoke hello: %q", string(answer.Payload))
	return nil
}

func (d *demo) killLeader(ctx context.Context, load *harness.Load) error {
	status, err := d.client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	victim := d.cluster.Node(status.LeaderId)
	if victim == nil {
		return fmt.Errorf("there is no leader to kill")
	}
	before := load.Counts()
	killed := time.Now()
	if err := victim.KillPeer(); err != nil {
		return err
	}
	d.say("killed the leader %s with SIGKILL after %d acknowledged writes and %d invocations", victim.Name(), before.Writes, before.Invocations)
	first, err := load.WaitWriteAfter(ctx, killed)
	if err != nil {
		return err
	}
	status, err = d.client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	d.say("%s leads in term %d; first acknowledged write %d ms after the kill", status.LeaderId, status.Term, first.Sub(killed).Milliseconds())
	if err := load.WaitProgress(ctx, 200); err != nil {
		return err
	}
	if err := victim.Start(); err != nil {
		return err
	}
	target, err := d.client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	if err := harness.WaitApplied(ctx, d.cluster, victim, target.CommitIndex); err != nil {
		return err
	}
	d.say("%s is back and has caught up to index %d", victim.Name(), target.CommitIndex)
	report, err := load.Verify(ctx)
	if err != nil {
		return err
	}
	d.say("acknowledged writes %d, lost %d, applied twice %d", report.Writes, report.Lost, report.Doubled)
	d.say("invocations %d, failed %d, longest gap %d ms, visits counted %d", report.Invocations, report.Failed, report.LongestGap.Milliseconds(), report.Visits)
	return report.Err()
}
