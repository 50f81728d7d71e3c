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
			orDash(info.GetPlatform()), orDash(strings.Join(info.GetRuntimes(), ",")), orDash(info.GetAgentAddress()), labelText(n))
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
				err := a.waitFor(cmd.Context(), c, s, wait{
					what: args[0] + " to be drained", limit: wf.limit,
					look: func(ctx context.Context) (bool, string, error) { return lookNode(ctx, c, args[0], "DRAINED") },
				})
				if err != nil {
					return err
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
