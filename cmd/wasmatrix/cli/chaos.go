package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev/control"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// leaderName stands for whoever leads.
const leaderName = "leader"

func (a *app) newChaos() *cobra.Command {
	cmd := &cobra.Command{
		Use: "chaos", Short: "break a development cluster on purpose, and see it recover",
		Long: `Breaks a cluster that "wasmatrix dev" runs on this machine, and nothing else: the
request goes to that process, which knows its own nodes. NODE is the name of a
node; "leader" is whoever leads. "wasmatrix chaos heal" makes everything whole.`,
		Example: "  wasmatrix chaos kill leader\n  wasmatrix chaos partition n1 n2 --one-way\n  wasmatrix chaos heal\n  wasmatrix chaos failover --rounds 5",
	}
	cmd.AddCommand(a.newChaosKill(), a.newChaosRestart(), a.newChaosPause(), a.newChaosResume(), a.newChaosPartition(),
		a.newChaosIsolate(), a.newChaosLatency(), a.newChaosHeal(), a.newChaosState(), a.newChaosFailover())
	return cmd
}

// chaos is the development cluster that a command breaks.
type chaos struct {
	*app
	control *control.Client
	client  *client.Client
}

// withChaos turns a function that breaks a development cluster into one that cobra runs.
func (a *app) withChaos(f func(ctx context.Context, c *chaos, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		known, path, err := a.loadContext()
		if err != nil {
			return err
		}
		// A development cluster keeps its user's certificate in its own directory.
		dev, err := control.Open(filepath.Dir(known.TLSDir))
		if known.TLSDir == "" || errors.Is(err, control.ErrNotDev) {
			return notDev(path)
		}
		if err != nil {
			return err
		}
		defer dev.Close()
		return a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			err := f(cmd.Context(), &chaos{app: a, control: dev, client: c}, args)
			if errors.Is(err, control.ErrNotDev) {
				return notDev(path)
			}
			return err
		})(cmd, args)
	}
}

func notDev(path string) error {
	return &usageError{
		err:  fmt.Errorf("the context %s is not that of a running development cluster; chaos breaks nothing else", path),
		next: "wasmatrix dev --nodes 3",
	}
}

// do makes a request; a refusal becomes an error of its kind.
func (c *chaos) do(ctx context.Context, path string, req control.Request) (*control.State, error) {
	state, err := c.control.Do(ctx, path, req)
	refusal, ok := errors.AsType[*control.Refusal](err)
	if !ok {
		return state, err
	}
	switch refusal.Status {
	case http.StatusNotFound:
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "%s", refusal.Reason).Next("wasmatrix chaos state")
	case http.StatusConflict:
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "%s", refusal.Reason).Next("wasmatrix chaos state")
	default:
		return nil, refusal
	}
}

// name returns the node that an argument names, and whether that one leads.
func (c *chaos) name(ctx context.Context, arg string) (name string, status *pb.StatusResponse, err error) {
	status, err = c.client.Status(ctx, &pb.StatusRequest{})
	if arg != leaderName {
		// A cluster without an answer can be broken further.
		return arg, status, nil
	}
	switch {
	case err != nil:
		return "", nil, err
	case status.GetLeaderId() == "":
		return "", nil, apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "nobody leads at the moment").Next("wasmatrix chaos heal")
	}
	return status.GetLeaderId(), status, nil
}

// show prints what a request did: said for people, the state of the cluster else.
func (c *chaos) show(state *control.State, names []string, said string) error {
	message, err := chaosState(state)
	if err != nil {
		return err
	}
	return c.print(result{message: message, names: names, table: func(w io.Writer) { fmt.Fprintln(w, said) }})
}

func chaosState(state *control.State) (*structpb.Struct, error) {
	nodes, links := []any{}, []any{}
	for _, n := range state.Nodes {
		nodes = append(nodes, map[string]any{
			"name": n.Name, "peerPid": n.PeerPID, "agentPid": n.AgentPID, "paused": n.Paused, "apiAddress": n.APIAddress,
		})
	}
	for _, l := range state.Links {
		links = append(links, map[string]any{"from": l.From, "to": l.To, "cut": l.Cut, "delayMs": float64(l.Delay) / float64(time.Millisecond)})
	}
	return structpb.NewStruct(map[string]any{"nodes": nodes, "links": links})
}

// simple is a command that makes one request about one node.
func (a *app) simple(path string, request func(name string, args []string) (control.Request, error), said func(*control.State, []string) string) func(*cobra.Command, []string) error {
	return a.withChaos(func(ctx context.Context, c *chaos, args []string) error {
		name, _, err := c.name(ctx, args[0])
		if err != nil {
			return err
		}
		req, err := request(name, args)
		if err != nil {
			return err
		}
		state, err := c.do(ctx, path, req)
		if err != nil {
			return err
		}
		args[0] = name
		return c.show(state, []string{name}, said(state, args))
	})
}

func about(name string, _ []string) (control.Request, error) { return control.Request{Node: name}, nil }

func partFlag(cmd *cobra.Command, part *string) {
	cmd.Flags().StringVar(part, "only", "", "one of the node's processes: peer, agent (default: both)")
}

func checkPart(part string) error {
	switch part {
	case control.Both, control.Peer, control.Agent:
		return nil
	default:
		return usagef("--only %q: want peer or agent", part)
	}
}

func (a *app) newChaosKill() *cobra.Command {
	var part string
	cmd := &cobra.Command{
		Use: "kill NODE|leader", Short: "kill a node with SIGKILL, as a power cut would", Args: cobra.ExactArgs(1),
		Example: "  wasmatrix chaos kill leader\n  wasmatrix chaos kill n2 --only agent",
		RunE: a.withChaos(func(ctx context.Context, c *chaos, args []string) error {
			if err := checkPart(part); err != nil {
				return err
			}
			name, before, err := c.name(ctx, args[0])
			if err != nil {
				return err
			}
			state, err := c.do(ctx, control.PathKill, control.Request{Node: name, Part: part})
			if err != nil {
				return err
			}
			said := fmt.Sprintf("killed %s (%s)", name, pids(state))
			if before.GetLeaderId() == name && part != control.Agent {
				said += "\n" + c.succession(ctx, state, before)
			}
			if part == control.Agent {
				return c.show(state, []string{name}, said+"; its node starts another")
			}
			return c.show(state, []string{name}, said+"\nbring it back: wasmatrix chaos heal")
		}),
	}
	partFlag(cmd, &part)
	return cmd
}

// pids tells which processes a request was about.
func pids(state *control.State) string {
	var out []string
	for _, n := range state.Changed {
		if n.PeerPID != 0 {
			out = append(out, fmt.Sprintf("peer pid %d", n.PeerPID))
		}
		if n.AgentPID != 0 {
			out = append(out, fmt.Sprintf("agent pid %d", n.AgentPID))
		}
	}
	return strings.Join(out, ", ")
}

// succession waits for the leader after a killed one and says who it is.
func (c *chaos) succession(ctx context.Context, state *control.State, before *pb.StatusResponse) string {
	ctx, cancel := context.WithTimeout(ctx, electionPatience)
	defer cancel()
	next, err := c.nextLeader(ctx, state, before)
	if err != nil {
		return fmt.Sprintf("no leader within %s: too few peers are left", electionPatience)
	}
	return fmt.Sprintf("%s elected, term %d, %s after the kill", next.leader, next.term, took(next.at.Sub(state.Began)))
}

func (a *app) newChaosRestart() *cobra.Command {
	return &cobra.Command{
		Use: "restart NODE|leader", Short: "start a node that was killed; stop and start one that runs", Args: cobra.ExactArgs(1),
		RunE: a.simple(control.PathRestart, about, func(s *control.State, args []string) string {
			return fmt.Sprintf("started %s (%s)", args[0], pids(s))
		}),
	}
}

func (a *app) newChaosPause() *cobra.Command {
	var d time.Duration
	cmd := &cobra.Command{
		Use: "pause NODE|leader", Short: "stop a node's processes where they stand (SIGSTOP)", Args: cobra.ExactArgs(1),
		Example: "  wasmatrix chaos pause leader --for 5s",
		RunE: a.simple(control.PathPause, func(name string, _ []string) (control.Request, error) {
			if d < 0 {
				return control.Request{}, usagef("--for %s is negative", d)
			}
			return control.Request{Node: name, For: d}, nil
		}, func(s *control.State, args []string) string {
			if d > 0 {
				return fmt.Sprintf("paused %s (%s) for %s", args[0], pids(s), d)
			}
			return fmt.Sprintf("paused %s (%s)\nlet it go on: wasmatrix chaos resume %s", args[0], pids(s), args[0])
		}),
	}
	cmd.Flags().DurationVar(&d, "for", 0, "let it go on after this time (default: until chaos resume)")
	return cmd
}

func (a *app) newChaosResume() *cobra.Command {
	return &cobra.Command{
		Use: "resume [NODE]", Short: "let a paused node, or all, go on", Args: cobra.MaximumNArgs(1),
		RunE: a.withChaos(func(ctx context.Context, c *chaos, args []string) error {
			req := control.Request{}
			if len(args) == 1 {
				req.Node = args[0]
			}
			state, err := c.do(ctx, control.PathResume, req)
			if err != nil {
				return err
			}
			return c.show(state, changed(state), listed("resumed", changed(state)))
		}),
	}
}

func changed(state *control.State) []string {
	var out []string
	for _, n := range state.Changed {
		out = append(out, n.Name)
	}
	return out
}

func listed(what string, names []string) string {
	if len(names) == 0 {
		return "there was nothing to do"
	}
	return what + " " + strings.Join(names, ", ")
}

func (a *app) newChaosPartition() *cobra.Command {
	var oneWay bool
	cmd := &cobra.Command{
		Use: "partition A B", Short: "cut the network between two nodes", Args: cobra.ExactArgs(2),
		Long: `Cuts what two nodes send to each other; with --one-way only what A sends to B.
Datagrams are lost, connections stand still, new ones wait. Clients reach both.`,
		Example: "  wasmatrix chaos partition n1 n2\n  wasmatrix chaos partition leader n3 --one-way",
		RunE: a.simple(control.PathLink, func(name string, args []string) (control.Request, error) {
			return control.Request{Node: name, To: args[1], OneWay: oneWay, Cut: new(true)}, nil
		}, func(_ *control.State, args []string) string {
			if oneWay {
				return fmt.Sprintf("cut what %s sends to %s; make it whole: wasmatrix chaos heal", args[0], args[1])
			}
			return fmt.Sprintf("cut %s and %s from each other; make it whole: wasmatrix chaos heal", args[0], args[1])
		}),
	}
	cmd.Flags().BoolVar(&oneWay, "one-way", false, "cut only what A sends to B")
	return cmd
}

func (a *app) newChaosIsolate() *cobra.Command {
	return &cobra.Command{
		Use: "isolate NODE|leader", Short: "cut a node from all others", Args: cobra.ExactArgs(1),
		RunE: a.simple(control.PathLink, func(name string, _ []string) (control.Request, error) {
			return control.Request{Node: name, Cut: new(true)}, nil
		}, func(_ *control.State, args []string) string {
			return fmt.Sprintf("cut %s from all other nodes; make it whole: wasmatrix chaos heal", args[0])
		}),
	}
}

func (a *app) newChaosLatency() *cobra.Command {
	return &cobra.Command{
		Use: "latency NODE|leader DURATION", Short: "delay what a node sends and receives; 0 ends it", Args: cobra.ExactArgs(2),
		Example: "  wasmatrix chaos latency n2 50ms\n  wasmatrix chaos latency n2 0s",
		RunE: a.simple(control.PathLink, func(name string, args []string) (control.Request, error) {
			d, err := time.ParseDuration(args[1])
			if err != nil || d < 0 || d > time.Minute {
				return control.Request{}, usagef("delay %q: want 0s to 1m, such as 50ms", args[1])
			}
			return control.Request{Node: name, Delay: &d}, nil
		}, func(_ *control.State, args []string) string {
			return fmt.Sprintf("what %s sends to other nodes and they to it comes %s later", args[0], args[1])
		}),
	}
}

func (a *app) newChaosHeal() *cobra.Command {
	return &cobra.Command{
		Use: "heal", Short: "make everything whole: network, paused and killed nodes", Args: cobra.NoArgs,
		RunE: a.withChaos(func(ctx context.Context, c *chaos, _ []string) error {
			state, err := c.do(ctx, control.PathHeal, control.Request{})
			if err != nil {
				return err
			}
			said := "the network is whole"
			if names := changed(state); len(names) > 0 {
				said += "; " + listed("brought back", names)
			}
			return c.show(state, changed(state), said)
		}),
	}
}

func (a *app) newChaosState() *cobra.Command {
	return &cobra.Command{
		Use: "state", Short: "show the nodes' processes and what is broken", Args: cobra.NoArgs,
		RunE: a.withChaos(func(ctx context.Context, c *chaos, _ []string) error {
			state, err := c.do(ctx, control.PathState, control.Request{})
			if err != nil {
				return err
			}
			message, err := chaosState(state)
			if err != nil {
				return err
			}
			var names []string
			for _, n := range state.Nodes {
				names = append(names, n.Name)
			}
			return c.print(result{message: message, names: names, table: func(w io.Writer) { c.stateTable(w, state) }})
		}),
	}
}

func (c *chaos) stateTable(w io.Writer, state *control.State) {
	t := table{head: []string{"NODE", "STATE", "PEER PID", "AGENT PID", "API"}, paint: c.painter()}
	for _, n := range state.Nodes {
		what := "running"
		switch {
		case n.PeerPID == 0:
			what = "down"
		case n.Paused:
			what = "paused"
		}
		t.row(n.Name, what, pid(n.PeerPID), pid(n.AgentPID), n.APIAddress)
	}
	t.write(w)
	for _, l := range state.Links {
		if l.Cut {
			fmt.Fprintf(w, "%s → %s cut\n", l.From, l.To)
		}
		if l.Delay > 0 {
			fmt.Fprintf(w, "%s → %s delayed by %s\n", l.From, l.To, l.Delay)
		}
	}
}

func pid(n int) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}
