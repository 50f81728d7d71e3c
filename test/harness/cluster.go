package harness

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Cluster is a cluster of real processes of the built binary that ends with its test.
type Cluster struct {
	*dev.Cluster
	// Client reaches every node.
	Client *client.Client
	// Guests is the directory of the built guests.
	Guests string
	// Machines are the virtual machines of its nodes; none may be left at the end.
	Machines *Machines

	binary string
	t      testing.TB
}

// New lays out a cluster and starts nothing. Options that are not set get the
// values that tests want, and guests are executed by Backend. When the test failed, the ends of the nodes' logs are shown.
func New(t testing.TB, o dev.Options) *Cluster {
	t.Helper()
	binary, guests := Binary(t)
	o.Binary, o.PortBase = binary, FreePortBase(max(o.Nodes+2, o.Expect))
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	machines := withBackend(t, &o)
	d, err := dev.Create(o)
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{Cluster: d, Guests: guests, Machines: machines, binary: binary, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range d.Nodes() {
				t.Logf("the end of %s's log:\n%s", n.Name(), dev.Tail(n.LogPath, 40))
			}
		}
		if err := d.Close(); err != nil {
			t.Errorf("shut the cluster down: %v", err)
		}
		if err := machines.Gone(); err != nil {
			t.Errorf("after the end of all nodes: %v", err)
		}
	})
	if c.Client, err = d.Client(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Client.Close() })
	return c
}

// Start lays out a cluster, starts all nodes, and waits until it is ready.
func Start(t testing.TB, o dev.Options) *Cluster {
	t.Helper()
	c := New(t, o)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	c.Ready()
	return c
}

// Ready waits until all running nodes are ready.
func (c *Cluster) Ready() *pb.StatusResponse {
	c.t.Helper()
	status, err := c.WaitReady(c.Context(time.Minute), c.Client)
	if err != nil {
		c.t.Fatal(err)
	}
	return status
}

// Context returns a context of the test with a deadline.
func (c *Cluster) Context(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(c.t.Context(), d)
	c.t.Cleanup(cancel)
	return ctx
}

// Leader waits for a leader and returns its node.
func (c *Cluster) Leader() *dev.Node {
	c.t.Helper()
	var leader *dev.Node
	err := Until(c.Context(30*time.Second), "a leader", func(ctx context.Context) error {
		status, err := c.Client.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return err
		}
		if leader = c.Node(status.LeaderId); leader == nil {
			return errors.New("there is none")
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return leader
}

// RunHello uploads the hello guest, starts it as name on the given node ("" for
// any) with the provider "kv", and waits until it runs.
func (c *Cluster) RunHello(name, node string, change ...func(*pb.WorkloadSpec)) *pb.Instance {
	c.t.Helper()
	ctx := c.Context(3 * time.Minute)
	module, err := c.Client.UploadModuleFile(ctx, filepath.Join(c.Guests, "hello.wasm"))
	if err != nil {
		c.t.Fatal(err)
	}
	spec := &pb.WorkloadSpec{
		Name: name, Module: module.Digest, Placement: &pb.PlacementRules{Node: node},
		Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read", "kv:write"}}},
	}
	for _, f := range change {
		f(spec)
	}
	started, err := c.Client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, i := range started.Instances {
		if err := WaitState(ctx, c.Client, i.Id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
			c.t.Fatal(err)
		}
	}
	return started.Instances[0]
}

// Output is what a command of the CLI printed, and its exit code.
type Output struct {
	Stdout, Stderr string
	Code           int
}

// CLI runs the built binary as a user would.
func (c *Cluster) CLI(args ...string) Output {
	c.t.Helper()
	return c.CLIWithInput("", args...)
}

// CLIWithInput runs the built binary with standard input.
func (c *Cluster) CLIWithInput(stdin string, args ...string) Output {
	c.t.Helper()
	// The first start of a module in an emulated machine takes long on a busy node.
	cmd := exec.CommandContext(c.Context(4*time.Minute), c.binary, args...)
	cmd.Env = append(cmd.Environ(), "WASMATRIX_CONTEXT="+c.ContextPath, "NO_COLOR=1")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewBufferString(stdin), &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("run %v: %v", args, err)
	}
	return Output{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}
