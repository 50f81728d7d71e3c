package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func providerState(p *pb.Provider) string {
	return shortName(p.GetStatus().GetState().String(), "PROVIDER_STATE_")
}

// replicaName names one replica of a provider: its id, followed by a slash and
// the number of the replica when that is not the first.
func replicaName(p *pb.Provider) string {
	if p.GetReplica() == 0 {
		return p.GetId()
	}
	return fmt.Sprintf("%s/%d", p.GetId(), p.GetReplica())
}

// replicasOf returns the replicas of the provider that was asked for.
func replicasOf(resp *pb.GetProviderResponse) []*pb.Provider {
	if list := resp.GetReplicas(); len(list) > 0 {
		return list
	}
	return []*pb.Provider{resp.GetProvider()}
}

// nodesOf names the nodes that replicas are on.
func nodesOf(replicas []*pb.Provider) string {
	var nodes []string
	for _, p := range replicas {
		if n := p.GetPlacement().GetNodeId(); n != "" && !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	return orDash(strings.Join(nodes, ", "))
}

// distinct returns one record of each provider, the first of its replicas.
func distinct(list []*pb.Provider) []*pb.Provider {
	var out []*pb.Provider
	for _, p := range list {
		if !slices.ContainsFunc(out, func(known *pb.Provider) bool { return known.GetId() == p.GetId() }) {
			out = append(out, p)
		}
	}
	return out
}

func (a *app) newProvider() *cobra.Command {
	cmd := &cobra.Command{Use: "provider", Aliases: []string{"providers"}, Short: "list, start, stop, test and change capability providers"}
	cmd.AddCommand(a.newProviderList(), a.newProviderGet(), a.newProviderRegister(), a.newProviderUpdate(),
		a.newProviderStart(), a.newProviderStop(), a.newProviderDrain(), a.newProviderDeregister(), a.newProviderTest())
	return cmd
}

func (a *app) providerTable(list []*pb.Provider) func(io.Writer) {
	return func(w io.Writer) {
		if len(list) == 0 {
			fmt.Fprintln(w, "no providers")
			return
		}
		t := table{head: []string{"ID", "TYPE", "DRIVER", "STATE", "NODE", "AGE", "MESSAGE"}, paint: a.painter()}
		for _, p := range list {
			t.row(replicaName(p), p.GetSpec().GetType(), orDash(p.GetSpec().GetDriver()), providerState(p),
				orDash(p.GetPlacement().GetNodeId()), a.age(p.GetCreatedAt()), oneLine(p.GetStatus().GetMessage()))
		}
		t.write(w)
	}
}

func (a *app) newProviderList() *cobra.Command {
	var stale, watch bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "list providers", Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			show := func(ctx context.Context) error {
				resp, err := c.ListProviders(ctx, &pb.ListProvidersRequest{Read: &pb.ReadOptions{Stale: stale}})
				if err != nil {
					return err
				}
				var ids []string
				for _, p := range distinct(resp.GetProviders()) {
					ids = append(ids, p.GetId())
				}
				return a.print(result{message: resp, names: ids, table: a.providerTable(resp.GetProviders())})
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

func (a *app) newProviderGet() *cobra.Command {
	return &cobra.Command{
		Use: "get NAME", Aliases: []string{"describe", "show"}, Short: "tell everything about a provider, and who uses it",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.GetProvider(cmd.Context(), &pb.GetProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			return a.print(result{message: resp, names: []string{resp.GetProvider().GetId()}, table: func(w io.Writer) {
				a.providerTable(replicasOf(resp))(w)
				providerSettings(w, resp.GetProvider())
				if len(resp.GetAssignments()) > 0 {
					fmt.Fprintln(w)
					assignmentTable(resp.GetAssignments())(w)
				}
			}})
		}),
	}
}

// providerSettings tells what a provider was asked to be.
func providerSettings(w io.Writer, p *pb.Provider) {
	spec := p.GetSpec()
	if n := spec.GetReplicas(); n > 1 {
		fmt.Fprintf(w, "  replicas  %d\n", n)
	}
	if node := spec.GetPlacement().GetNode(); node != "" {
		fmt.Fprintf(w, "  node      %s\n", cleanLine(node))
	}
	labels := spec.GetPlacement().GetLabels()
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		fmt.Fprintf(w, "  label     %s=%s\n", cleanLine(key), cleanLine(labels[key]))
	}
	for _, key := range slices.Sorted(maps.Keys(spec.GetConfig())) {
		fmt.Fprintf(w, "  %s=%s\n", cleanLine(key), cleanLine(spec.GetConfig()[key]))
	}
}
