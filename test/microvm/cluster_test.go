package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// settleTime is far above what anything here takes, emulated on a busy machine too.
const settleTime = 3 * time.Minute

const (
	running = pb.InstanceState_INSTANCE_STATE_RUNNING
	failed  = pb.InstanceState_INSTANCE_STATE_FAILED
)

// cluster is one of three nodes: the provider is on n1, virtual machines on n2 only.
type cluster struct {
	*harness.Cluster
	t *testing.T
}

// on is the same cluster for a subtest.
func (c *cluster) on(t *testing.T) *cluster { return &cluster{Cluster: c.Cluster, t: t} }

// said runs the built binary and returns what it printed; it must succeed.
func (c *cluster) said(args ...string) string {
	c.t.Helper()
	out := c.CLI(args...)
	if out.Code != 0 {
		c.t.Fatalf("%v: %+v", args, out)
	}
	return out.Stdout
}

// start starts a module that the test made and waits until it is in the given state.
func (c *cluster) start(module []byte, spec *pb.WorkloadSpec, want pb.InstanceState) *pb.Instance {
	c.t.Helper()
	ctx := c.Context(settleTime)
	path := filepath.Join(c.t.TempDir(), "guest.wasm")
	if err := os.WriteFile(path, module, 0o600); err != nil {
		c.t.Fatal(err)
	}
	stored, err := c.Client.UploadModuleFile(ctx, path)
	if err != nil {
		c.t.Fatal(err)
	}
	spec.Module, spec.Runtime = stored.Digest, harness.MicroVM
	started, err := c.Client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
	if err != nil {
		c.t.Fatal(err)
	}
	id := started.Instances[0].Id
	if err := harness.WaitState(ctx, c.Client, id, want); err != nil {
		c.t.Fatal(err)
	}
	return c.instance(id)
}

func (c *cluster) instance(target string) *pb.Instance {
	c.t.Helper()
	got, err := c.Client.QueryInstance(c.Context(20*time.Second), &pb.QueryInstanceRequest{Target: target})
	if err != nil {
		c.t.Fatal(err)
	}
	return got.Instance
}

// until waits until an instance is as f wants it, and returns it.
func (c *cluster) until(target, what string, f func(*pb.Instance) bool) (last *pb.Instance) {
	c.t.Helper()
	err := harness.Until(c.Context(settleTime), target+" "+what, func(ctx context.Context) error {
		got, err := c.Client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: target})
		if err != nil {
			return err
		}
		if last = got.Instance; !f(last) {
			return fmt.Errorf("it is %s in attempt %d: %s", last.Status.State, last.Status.Attempt, last.Status.Message)
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return last
}

// told waits until an event of that kind tells of the instance, with the text. The
// text of a crash is not certain: an agent without a leader reports it later, as one
// of so many.
func (c *cluster) told(id string, kind pb.EventKind, text string) {
	c.t.Helper()
	var heard []string
	err := harness.Until(c.Context(settleTime), fmt.Sprintf("%s of %s with %q", kind, id, text), func(ctx context.Context) error {
		var now []string
		for got, err := range c.Client.WatchEvents(ctx, &pb.WatchEventsRequest{Subject: id}) {
			if err != nil {
				return err
			}
			e := got.GetEvent()
			if e.Kind == kind && strings.Contains(e.Message, text) {
				return nil
			}
			now = append(now, e.Kind.String()+": "+e.Message)
		}
		heard = now
		return errors.New("it was not told")
	})
	if err != nil {
		c.t.Fatalf("%v; heard: %s", err, strings.Join(heard, "; "))
	}
}

// machines returns the processes of n2's virtual machines.
func (c *cluster) machines() []int {
	c.t.Helper()
	agent, err := c.Node("n2").AgentPID()
	if err != nil {
		c.t.Fatal(err)
	}
	return c.Machines.RunningOf(agent)
}

// TestMicroVMOnOneNodeOfThree runs guests on a cluster in which one node offers virtual
// machines: everything lands there and is told, and what happens to a machine is a
// fact of its instance alone.
func TestMicroVMOnOneNodeOfThree(t *testing.T) {
	harness.NeedMicroVM(t)
	c := &cluster{t: t, Cluster: harness.Start(t, dev.Options{Nodes: 3, Adjust: func(i int, cfg *node.Config) {
		cfg.Runtime.Default, cfg.MicroVM.Accel = "wasm", "off"
		if i == 2 {
			cfg.MicroVM.Accel = "tcg"
		}
	}})}
	t.Run("the nodes tell what they offer", func(t *testing.T) { offers(c.on(t)) })
	t.Run("no node that may take it offers it", func(t *testing.T) { nowhere(c.on(t)) })
	t.Run("a handler with a provider on another node", func(t *testing.T) { hello(c.on(t)) })
	t.Run("a command", func(t *testing.T) { wordcount(c.on(t)) })
	t.Run("guests that crash", func(t *testing.T) { crashes(c.on(t)) })
	t.Run("machines that are killed", func(t *testing.T) { killed(c.on(t)) })
	t.Run("stopped for good", func(t *testing.T) { stopped(c.on(t)) })
}

func offers(c *cluster) {
	list, err := c.Client.ListNodes(c.Context(20*time.Second), &pb.ListNodesRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, n := range list.Nodes {
		want := []string{"wasm sandbox  true"}
		if n.Id == "n2" {
			want = []string{"microvm emulated tcg false", "wasm sandbox  true"}
		}
		var got []string
		for _, r := range n.Info.RuntimeInfo {
			got = append(got, fmt.Sprint(r.Name, " ", r.Isolation, " ", r.Accelerator, " ", r.IsDefault))
		}
		if !slices.Equal(got, want) || len(n.Info.Runtimes) != len(want) {
			c.t.Errorf("%s offers %q (%q), want %q", n.Id, got, n.Info.Runtimes, want)
		}
	}
	if said := c.said("node", "list"); strings.Count(said, "  wasm, microvm (emulated)  ") != 1 {
		c.t.Errorf("node list:\n%s", said)
	}
	if said := c.said("status"); !strings.Contains(said, "microvm (emulated) on 1 node, wasm on 3 nodes\n") {
		c.t.Errorf("status:\n%s", said)
	}
}

// nowhere pins a workload to a node without virtual machines.
func nowhere(c *cluster) {
	path := filepath.Join(c.t.TempDir(), "echo.wasm")
	if err := os.WriteFile(path, runtimetest.Echo(), 0o600); err != nil {
		c.t.Fatal(err)
	}
	out := c.CLI("run", path, "--name", "nowhere", "--runtime", "microvm", "--node", "n3")
	if out.Code != 9 || !strings.Contains(out.Stderr, "runtime microvm is wanted, node offers wasm") {
		c.t.Errorf("run: %+v", out)
	}
	if in := c.instance("nowhere"); in.Status.State != pb.InstanceState_INSTANCE_STATE_PENDING || !strings.Contains(in.Status.Message, "1 without runtime microvm") {
		c.t.Errorf("it is %v", in.Status)
	}
	c.said("instance", "rm", "nowhere", "--force")
}

func hello(c *cluster) {
	run := c.CLI("run", filepath.Join(c.Guests, "hello.wasm"), "--runtime", "microvm", "--allow", "kv:read", "--allow", "kv:write", "--wait-timeout", settleTime.String())
	if run.Code != 0 {
		c.t.Fatalf("run: %+v", run)
	}
	for n := range 3 {
		if said := c.said("invoke", "hello", "-d", "Ada"); said != fmt.Sprintf("hello, Ada: visit %d\n", n+1) {
			c.t.Fatalf("invoke: %q", said)
		}
	}
	if said := c.said("kv", "list", "--bucket", "hello", "-o", "name"); said == "" {
		c.t.Error("the counter is not in the provider")
	}
	if logs := c.said("logs", "hello"); !strings.Contains(logs, "Ada") {
		c.t.Errorf("logs:\n%s", logs)
	}
	in := c.instance("hello")
	if in.Placement.NodeId != "n2" || in.Status.Runtime != "microvm" || in.Status.Isolation != "emulated" {
		c.t.Errorf("it is on %s, in %s, %s", in.Placement.NodeId, in.Status.Runtime, in.Status.Isolation)
	}
	var shown struct {
		Instance struct {
			Status struct{ Runtime, Isolation string }
		}
	}
	if err := json.Unmarshal([]byte(c.said("instance", "get", "hello", "-o", "json")), &shown); err != nil || shown.Instance.Status.Isolation != "emulated" {
		c.t.Errorf("get -o json: %v, %+v", err, shown)
	}
	for _, args := range [][]string{{"ps"}, {"instance", "get", "hello"}} {
		if said := c.said(args...); !strings.Contains(said, "microvm (emulated)") {
			c.t.Errorf("%v:\n%s", args, said)
		}
	}
	explained := c.said("explain", "hello")
	for _, want := range []string{"best", "microvm (emulated)", "runtime microvm is wanted, node offers wasm"} {
		if !strings.Contains(explained, want) {
			c.t.Errorf("explain does not say %q:\n%s", want, explained)
		}
	}
}

func wordcount(c *cluster) {
	out := c.CLIWithInput("the fox and the dog and the owl", "run", filepath.Join(c.Guests, "wordcount.wasm"),
		"--runtime", "microvm", "--wait-timeout", settleTime.String(), "--stdin", "-", "--", "-top", "2")
	if out.Code != 0 || out.Stdout != "     3 the\n     2 and\n" {
		c.t.Fatalf("wordcount: %+v", out)
	}
	if in := c.instance("wordcount"); in.Status.Isolation != "emulated" || in.Status.Reason != pb.ExitReason_EXIT_REASON_COMPLETED {
		c.t.Errorf("it ended as %v", in.Status)
	}
}

// crashes has guests fail in a call: each is told with its reason, is started again
// as often as its policy says, and leaves no machine behind.
func crashes(c *cluster) {
	for _, tt := range []struct {
		name   string
		module []byte
		limits *pb.InstanceLimits
		reason pb.ExitReason
		says   string
	}{
		{"trap", runtimetest.Handler(nil, runtimetest.Unreachable), nil, pb.ExitReason_EXIT_REASON_TRAP, "unreachable"},
		{"endless-loop", runtimetest.Spinner(), &pb.InstanceLimits{Timeout: durationpb.New(2 * time.Second)}, pb.ExitReason_EXIT_REASON_TIME_LIMIT, "time limit"},
		{"out-of-memory", runtimetest.Grower(), &pb.InstanceLimits{Memory: "1MiB"}, pb.ExitReason_EXIT_REASON_MEMORY_LIMIT, "memory"},
	} {
		c.t.Run(tt.name, func(t *testing.T) {
			c := c.on(t)
			in := c.start(tt.module, &pb.WorkloadSpec{
				Name: tt.name, Limits: tt.limits,
				Restart: &pb.RestartPolicy{MaxRetries: 1, Backoff: durationpb.New(100 * time.Millisecond)},
			}, running)
			for attempt := range uint32(2) {
				c.until(in.Id, fmt.Sprintf("to run in attempt %d", attempt+1), func(in *pb.Instance) bool {
					return in.Status.State == running && in.Status.Attempt == attempt+1
				})
				if _, err := c.Client.Invoke(c.Context(time.Minute), &pb.InvokeRequest{Target: in.Id}); err == nil {
					t.Fatal("a call of a guest that crashes succeeded")
				}
				c.until(in.Id, "to have crashed", func(in *pb.Instance) bool { return in.Status.CrashCount > attempt })
			}
			now := c.until(in.Id, "to have failed", func(in *pb.Instance) bool { return in.Status.State == failed })
			if now.Status.Reason != tt.reason || now.Status.Isolation != "emulated" || now.Status.CrashCount != 2 {
				t.Errorf("it ended as %v", now.Status)
			}
			c.told(in.Id, pb.EventKind_EVENT_KIND_INSTANCE_CRASHED, "")
			c.told(in.Id, pb.EventKind_EVENT_KIND_INSTANCE_RESTARTED, "")
			c.told(in.Id, pb.EventKind_EVENT_KIND_INSTANCE_FAILED, tt.says)
		})
	}
}

// killed ends all processes of virtual machines with SIGKILL, paused clones too:
// what may be started again is, and goes on with what its provider keeps.
func killed(c *cluster) {
	once := c.start(runtimetest.Echo(), &pb.WorkloadSpec{Name: "once", Restart: &pb.RestartPolicy{Policy: "never"}}, running)
	before := c.instance("hello")
	victims := c.machines()
	if len(victims) < 2 {
		c.t.Fatalf("%d processes run two instances", len(victims))
	}
	for _, pid := range victims {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			c.t.Fatal(err)
		}
	}
	if err := c.Machines.Gone(victims...); err != nil {
		c.t.Error(err)
	}
	now := c.until(once.Id, "to have failed", func(in *pb.Instance) bool { return in.Status.State == failed })
	if now.Status.Reason != pb.ExitReason_EXIT_REASON_INTERNAL || !strings.Contains(now.Status.Message, "killed") || now.Status.Attempt != 1 {
		c.t.Errorf("it ended as %v", now.Status)
	}
	c.told(once.Id, pb.EventKind_EVENT_KIND_INSTANCE_FAILED, "killed")
	c.told(before.Id, pb.EventKind_EVENT_KIND_INSTANCE_CRASHED, "")
	c.until(before.Id, "to run again", func(in *pb.Instance) bool {
		return in.Status.State == running && in.Status.Attempt > before.Status.Attempt
	})
	if said := c.said("invoke", "hello", "-d", "Ada"); said != "hello, Ada: visit 4\n" {
		c.t.Errorf("invoke after the restart: %q", said)
	}
	if now := c.instance(before.Id); now.Placement.Generation != before.Placement.Generation {
		c.t.Errorf("it was placed anew, in generation %d", now.Placement.Generation)
	}
}

// stopped ends the last instance: its machine goes with it.
func stopped(c *cluster) {
	before := c.machines()
	c.said("instance", "stop", "hello")
	if err := c.Machines.Fewer(before); err != nil {
		c.t.Error(err)
	}
}

// TestMicroVMNowhere runs nothing: without a node that offers virtual machines a
// workload waits, and says why.
func TestMicroVMNowhere(t *testing.T) {
	c := &cluster{t: t, Cluster: harness.Start(t, dev.Options{Nodes: 1, Adjust: func(_ int, cfg *node.Config) {
		cfg.Runtime.Default, cfg.MicroVM.Accel = "wasm", "off"
	}})}
	path := filepath.Join(t.TempDir(), "echo.wasm")
	if err := os.WriteFile(path, runtimetest.Echo(), 0o600); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(t.TempDir(), "echo.yaml")
	if err := os.WriteFile(manifest, []byte("name: echo\nmodule: "+path+"\nruntime: microvm\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := c.CLI("run", manifest)
	if out.Code != 9 || !strings.Contains(out.Stderr, "none of 1 nodes can take it: 1 without runtime microvm") || !strings.Contains(out.Stderr, "wasmatrix doctor") {
		t.Errorf("run: %+v", out)
	}
	if in := c.instance("echo"); in.Status.State != pb.InstanceState_INSTANCE_STATE_PENDING || in.Status.Runtime != "" {
		t.Errorf("it is %v", in.Status)
	}
	if said := c.said("explain", "echo"); !strings.Contains(said, "runtime microvm is wanted, node offers wasm") {
		t.Errorf("explain:\n%s", said)
	}
}
