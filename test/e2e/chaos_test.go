package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// devCluster is a cluster that `wasmatrix dev` runs, to be broken by `wasmatrix chaos`.
type devCluster struct {
	t               *testing.T
	binary, context string
	addresses       []string
}

func startDev(t *testing.T, nodes int) *devCluster {
	t.Helper()
	binary, _ := harness.Binary(t)
	base, dir := harness.FreePortBase(nodes), t.TempDir()
	d := &devCluster{t: t, binary: binary, context: filepath.Join(dir, "context.yaml")}
	for i := range nodes {
		d.addresses = append(d.addresses, fmt.Sprintf("127.0.0.1:%d", base+100*i))
	}
	dev := exec.Command(binary, "dev", "--nodes", fmt.Sprint(nodes), "--port-base", fmt.Sprint(base), "--metrics-port", "0",
		"--persist", filepath.Join(dir, "cluster"), "--write-context", d.context)
	stderr := harness.StartDev(t, dev)
	t.Cleanup(func() {
		if err := dev.Process.Signal(syscall.SIGINT); err != nil {
			t.Errorf("end the cluster: %v", err)
		}
		if err := dev.Wait(); err != nil {
			t.Errorf("dev ended with %v: %s", err, stderr.String())
		}
	})
	return d
}

// run runs a command and returns what it said, and its exit code.
func (d *devCluster) run(args ...string) (stdout string, code int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.binary, args...)
	cmd.Env = append(os.Environ(), "WASMATRIX_CONTEXT="+d.context, "NO_COLOR=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.t.Fatalf("run %v: %v", args, err)
	}
	return out.String() + errs.String(), cmd.ProcessState.ExitCode()
}

// chaos runs `wasmatrix chaos` and expects it to say something.
func (d *devCluster) chaos(want string, args ...string) {
	d.t.Helper()
	said, code := d.run(append([]string{"chaos"}, args...)...)
	if code != 0 || !strings.Contains(said, want) {
		d.t.Fatalf("wasmatrix chaos %s: exit code %d, want %q in\n%s", strings.Join(args, " "), code, want, said)
	}
}

// state is `wasmatrix chaos state -o json`.
type state struct {
	Nodes []struct {
		Name, APIAddress  string
		PeerPid, AgentPid int
		Paused            bool
	}
	Links []struct {
		From, To string
		Cut      bool
		DelayMs  float64
	}
}

func (d *devCluster) state() state {
	d.t.Helper()
	said, code := d.run("chaos", "state", "-o", "json")
	var s state
	if err := json.Unmarshal([]byte(said), &s); err != nil || code != 0 {
		d.t.Fatalf("chaos state: %v, exit code %d\n%s", err, code, said)
	}
	return s
}

// agent waits until the agent of node i, from 1, runs, and returns its pid.
func (d *devCluster) agent(i int) (pid int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	err := harness.Until(ctx, "the agent to run", func(context.Context) error {
		if pid = d.state().Nodes[i-1].AgentPid; pid == 0 {
			return errors.New("it has no pid")
		}
		return nil
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

// status asks node i, from 1.
func (d *devCluster) status(ctx context.Context, i int) (*pb.StatusResponse, error) {
	known, err := client.LoadContext(d.context)
	if err != nil {
		return nil, err
	}
	known.Addresses = []string{d.addresses[i-1]}
	c, err := client.FromContext(known)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return c.Status(ctx, &pb.StatusRequest{})
}

// until waits for a condition on what node i knows.
func (d *devCluster) until(what string, i int, ok func(*pb.StatusResponse) bool) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	err := harness.Until(ctx, what, func(ctx context.Context) error {
		status, err := d.status(ctx, i)
		if err == nil && !ok(status) {
			err = fmt.Errorf("it is %s in term %d and follows %q", status.RaftState, status.Term, status.LeaderId)
		}
		return err
	})
	if err != nil {
		d.t.Fatal(err)
	}
}

// leader waits until all agree on a leader and returns its number.
func (d *devCluster) leader() int {
	d.t.Helper()
	leader := ""
	for i := range d.addresses {
		d.until("everybody to follow one leader", i+1, func(s *pb.StatusResponse) bool {
			if leader == "" {
				leader = s.LeaderId
			}
			return s.LeaderId == leader && leader != ""
		})
	}
	return int(leader[1] - '0')
}

// ready waits until all nodes take part.
func (d *devCluster) ready() {
	d.t.Helper()
	d.until("all nodes to be ready", d.leader(), func(s *pb.StatusResponse) bool { return int(s.NodesReady) == len(d.addresses) })
}

// TestChaosProcesses kills, restarts and pauses nodes of a development cluster.
func TestChaosProcesses(t *testing.T) {
	d := startDev(t, 3)
	first := d.leader()
	name := fmt.Sprintf("n%d", first)
	before := d.state()
	d.chaos(fmt.Sprintf("killed %s (peer pid %d, agent pid %d)", name, before.Nodes[first-1].PeerPid, before.Nodes[first-1].AgentPid), "kill", "leader")
	if s := d.state(); s.Nodes[first-1].PeerPid != 0 || s.Nodes[first-1].AgentPid != 0 {
		t.Errorf("the killed node has processes: %+v", s.Nodes[first-1])
	}
	if said, code := d.run("chaos", "kill", name); code != 4 {
		t.Errorf("kill it again: exit code %d, want 4\n%s", code, said)
	}
	d.chaos("started "+name, "restart", name)
	d.ready()

	paused := d.leader()
	name = fmt.Sprintf("n%d", paused)
	d.chaos("paused "+name, "pause", "leader")
	other := paused%3 + 1
	d.until("another leader than the paused one", other, func(s *pb.StatusResponse) bool { return s.LeaderId != "" && s.LeaderId != name })
	if s := d.state(); !s.Nodes[paused-1].Paused {
		t.Errorf("the paused node is shown as %+v", s.Nodes[paused-1])
	}
	d.chaos("resumed "+name, "resume", name)
	d.chaos("paused "+name, "pause", name, "--for", "100ms")
	d.until("the pause to end by itself", paused, func(s *pb.StatusResponse) bool { return s.LeaderId != "" })

	agent := d.agent(1)
	d.chaos(fmt.Sprintf("killed n1 (agent pid %d)", agent), "kill", "n1", "--only", "agent")
	for _, tc := range [][]string{{"kill", "nope"}, {"resume", "n1"}, {"pause", "n1", "--for", "-1s"}, {"kill", "n1", "--only", "disk"}} {
		if said, code := d.run(append([]string{"chaos"}, tc...)...); code == 0 || !strings.Contains(said, "error: ") {
			t.Errorf("chaos %v: exit code %d\n%s", tc, code, said)
		}
	}
}

// TestChaosNetwork cuts and delays what the nodes of a development cluster send.
func TestChaosNetwork(t *testing.T) {
	d := startDev(t, 3)
	old := d.leader()
	name := fmt.Sprintf("n%d", old)
	d.chaos("cut "+name+" from all other nodes", "isolate", "leader")
	d.until("the isolated leader to step down", old, func(s *pb.StatusResponse) bool { return s.LeaderId == "" })
	d.until("another leader", old%3+1, func(s *pb.StatusResponse) bool { return s.LeaderId != "" && s.LeaderId != name })
	d.chaos("the network is whole", "heal")
	d.ready()

	// A peer that hears nobody, and is heard, must not disturb the leader.
	leader := d.leader()
	deaf := leader%3 + 1
	d.chaos("cut what", "partition", fmt.Sprintf("n%d", leader), fmt.Sprintf("n%d", deaf), "--one-way")
	if s := d.state(); len(s.Links) != 1 || !s.Links[0].Cut {
		t.Errorf("one direction was cut, and the state shows %+v", s.Links)
	}
	d.until("the deaf peer to lose its leader", deaf, func(s *pb.StatusResponse) bool { return s.LeaderId == "" })
	d.chaos("the network is whole", "heal")
	if again := d.leader(); again != leader {
		t.Errorf("a peer that was deaf moved leadership from n%d to n%d", leader, again)
	}

	d.chaos("comes 30ms later", "latency", fmt.Sprintf("n%d", deaf), "30ms")
	if s := d.state(); len(s.Links) != 4 || s.Links[0].DelayMs != 30 {
		t.Errorf("a node was delayed, and the state shows %+v", s.Links)
	}
	// A write needs one of the others only; one through the delayed peer takes the way there and back.
	began := time.Now()
	if said, code := d.run("kv", "put", "k", "v", "--bucket", "b", "--address", d.addresses[deaf-1]); code != 0 {
		t.Fatalf("a write through a delayed peer: exit code %d\n%s", code, said)
	}
	if took := time.Since(began); leader != deaf && took < 60*time.Millisecond {
		t.Errorf("a write through a delayed peer took %s, want at least there and back", took)
	}
	d.chaos("the network is whole", "heal")
	d.ready()
}

// TestChaosFailover measures failovers of a development cluster.
func TestChaosFailover(t *testing.T) {
	d := startDev(t, 3)
	said, code := d.run("chaos", "failover", "--rounds", "2", "-o", "json")
	var got struct {
		Rounds []struct {
			Killed, Elected          string
			ElectionMs, FirstWriteMs float64
			Writes                   int
		}
		Total struct{ Rounds, Writes, Lost, AppliedTwice int }
	}
	if err := json.Unmarshal([]byte(said), &got); err != nil || code != 0 {
		t.Fatalf("%v, exit code %d\n%s", err, code, said)
	}
	if len(got.Rounds) != 2 || got.Total.Rounds != 2 || got.Total.Writes == 0 || got.Total.Lost+got.Total.AppliedTwice != 0 {
		t.Errorf("it says %+v", got)
	}
	for _, r := range got.Rounds {
		if r.Killed == r.Elected || r.ElectionMs <= 0 || r.FirstWriteMs < r.ElectionMs/2 || r.Writes == 0 {
			t.Errorf("a round says %+v", r)
		}
	}
	if said, _ := d.run("provider", "list", "-o", "name"); strings.Join(strings.Fields(said), " ") != "bus kv web" {
		t.Errorf("failover left something behind: %q", said)
	}
	d.chaos("2 failovers: ", "failover", "--rounds", "2", "--only", "peer")
	d.ready()
}

// TestChaosNeedsADevelopmentCluster refuses every command on a cluster that was started otherwise.
func TestChaosNeedsADevelopmentCluster(t *testing.T) {
	d := startDev(t, 1)
	known, err := client.LoadContext(d.context)
	if err != nil {
		t.Fatal(err)
	}
	// The same cluster through a context that knows its certificate by another place.
	dir := t.TempDir()
	for _, name := range []string{"node.crt", "node.key", "ca.crt"} {
		raw, err := os.ReadFile(filepath.Join(known.TLSDir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	known.TLSDir = dir
	foreign := &devCluster{t: t, binary: d.binary, context: filepath.Join(dir, "context.yaml")}
	if err := client.SaveContext(foreign.context, known); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"kill leader", "restart n1", "pause n1", "resume", "partition n1 n2", "isolate n1", "latency n1 5ms", "heal", "state", "failover",
	} {
		said, code := foreign.run(append([]string{"chaos"}, strings.Fields(args)...)...)
		if code != 2 || !strings.Contains(said, "is not that of a running development cluster") {
			t.Errorf("chaos %s: exit code %d, want 2\n%s", args, code, said)
		}
	}
	if s := d.state(); s.Nodes[0].PeerPid == 0 {
		t.Error("a refused command did something")
	}
	// An agent that nobody's dev started cannot be made breakable by a variable.
	config := filepath.Join(filepath.Dir(d.context), "cluster", "nodes", "n1", "config.yaml")
	agent := exec.Command(d.binary, "agent", "--config", config)
	agent.Env = append(slices.Clone(os.Environ()), "WASMATRIX_DEV_FAULTS="+filepath.Join(filepath.Dir(d.context), "cluster", "network.json"))
	if out, err := agent.CombinedOutput(); err == nil || !strings.Contains(string(out), "only the nodes of a development cluster") {
		t.Errorf("an agent with the variable set: %v\n%s", err, out)
	}
}
