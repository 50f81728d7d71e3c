package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// nodeState is a node's state for people: a drain counts.
func nodeState(n *pb.Node) string {
	state := shortName(n.GetState().String(), "NODE_STATE_")
	if n.GetDraining() {
		state += " draining"
	}
	return state
}

func (a *app) newNode() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Aliases: []string{"nodes"}, Short: "list worker nodes, drain them"}
	cmd.AddCommand(a.newNodeList(), a.newNodeDrain(), a.newNodeUndrain())
	return cmd
}

func (a *app) newNodeList() *cobra.Command {
	var stale, watch bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "list worker nodes", Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			show := func(ctx context.Context) error {
				resp, err := c.ListNodes(ctx, &pb.ListNodesRequest{Read: &pb.ReadOptions{Stale: stale}})
				if err != nil {
					return err
				}
				var ids []string
				for _, n := range resp.GetNodes() {
					ids = append(ids, n.GetId())
				}
				return a.print(result{message: resp, names: ids, table: func(w io.Writer) { a.nodeTable(w, resp) }})
			}
			if watch {
				return a.watch(cmd.Context(), c, show)
			}
			return show(cmd.Context())
		}),
	}
	cmd.Flags().BoolVar(&stale, "stale", false, "read what the answering peer has, without asking the leader")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show again whenever something happens, until Ctrl-C")
	return cmd
}

func (a *app) nodeTable(w io.Writer, resp *pb.ListNodesResponse) {
	if len(resp.GetNodes()) == 0 {
		fmt.Fprintln(w, "no nodes")
		return
	}
	t := table{head: []string{"ID", "STATE", "SINCE", "INSTANCES", "MEMORY", "PLATFORM", "RUNTIMES", "AGENT", "LABELS"}, paint: a.painter()}
	for _, n := range resp.GetNodes() {
		info := n.GetInfo()
		t.row(n.GetId(), nodeState(n), a.age(n.GetStateChangedAt()),
			fmt.Sprintf("%d/%d", resp.GetInstanceCounts()[n.GetId()], info.GetCapacity().GetInstances()), size(info.GetCapacity().GetMemoryBytes()),
			orDash(info.GetPlatform()), runtimesOf(info), orDash(info.GetAgentAddress()), labelText(n))
	}
	t.write(w)
}

func labelText(n *pb.Node) string {
	labels := merged(n.GetInfo().GetLabels(), n.GetLabels())
	var out []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, key+"="+labels[key])
	}
	return orDash(strings.Join(out, ","))
}

func (a *app) newNodeDrain() *cobra.Command {
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "drain NODE", Short: "move all instances off a node and give it no new ones", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.DrainNode(cmd.Context(), &pb.DrainNodeRequest{NodeId: args[0]})
			if err != nil {
				return err
			}
			if !wf.no {
				s := a.steps()
				d := &drain{client: c, node: args[0]}
				err := a.waitFor(cmd.Context(), c, s, wait{
					what: args[0] + " to be drained", limit: wf.limit,
					look: d.look,
				})
				if err != nil {
					s.end(0)
					return d.gaveUp(err)
				}
				s.done("%s has no instances", args[0])
				s.end(a.elapsed())
			}
			return a.printNode(resp, resp.GetNode(), "drains")
		}),
	}
	wf.bind(cmd)
	return cmd
}

// drain waits for the instances of a node to leave it.
type drain struct {
	client *client.Client
	node   string
	// left are the instances seen last.
	left []*pb.Instance
}

// look reports whether the node is drained, and which instances are left.
func (d *drain) look(ctx context.Context) (bool, string, error) {
	done, found, err := lookNode(ctx, d.client, d.node, "DRAINED")
	if done || err != nil {
		return done, found, err
	}
	list, err := listInstances(ctx, d.client, &pb.ListInstancesRequest{NodeId: d.node})
	if err != nil {
		return false, "", err
	}
	d.left = slices.DeleteFunc(list.GetInstances(), over)
	var texts []string
	for _, i := range d.left {
		text := i.GetId() + " " + stateOf(i)
		if held := heldBy(i, d.node); held != "" {
			text += " " + held
		}
		texts = append(texts, text)
	}
	if len(texts) > 0 {
		found += ": " + some(texts)
	}
	return false, found, nil
}

// heldBy says which rule of an instance may keep it on a node; empty when none does.
func heldBy(i *pb.Instance, node string) string {
	rules := i.GetSpec().GetPlacement()
	switch {
	case rules.GetNode() == node:
		return "(pinned by placement.node)"
	case len(rules.GetLabels()) > 0:
		var pairs []string
		for _, key := range slices.Sorted(maps.Keys(rules.GetLabels())) {
			pairs = append(pairs, key+"="+rules.GetLabels()[key])
		}
		return "(wants a node with " + strings.Join(pairs, ",") + ")"
	default:
		return ""
	}
}

// gaveUp adds to the end of a wait in vain what can be done about it.
func (d *drain) gaveUp(err error) error {
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return err
	}
	e := apierror.From(err)
	pinned := slices.IndexFunc(d.left, func(i *pb.Instance) bool { return i.GetSpec().GetPlacement().GetNode() == d.node })
	switch {
	case pinned >= 0:
		return e.Next("what is pinned leaves only when it is stopped: wasmatrix instance stop %s; or wasmatrix node undrain %s", d.left[pinned].GetId(), d.node)
	case len(d.left) > 0:
		return e.Next("wasmatrix explain %s; the drain goes on, or wasmatrix node undrain %s", d.left[0].GetId(), d.node)
	default:
		return e.Next("wasmatrix node list; the drain goes on, or wasmatrix node undrain %s", d.node)
	}
}

func (a *app) newNodeUndrain() *cobra.Command {
	return &cobra.Command{
		Use: "undrain NODE", Short: "let a drained node take work again", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.UndrainNode(cmd.Context(), &pb.UndrainNodeRequest{NodeId: args[0]})
			if err != nil {
				return err
			}
			return a.printNode(resp, resp.GetNode(), "takes work again")
		}),
	}
}

func (a *app) printNode(message proto.Message, n *pb.Node, word string) error {
	return a.print(result{message: message, names: []string{n.GetId()}, table: func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", n.GetId(), word) }})
}
