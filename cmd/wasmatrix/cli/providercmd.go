package cli

import (
	"bufio"
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

func providerState(p *pb.Provider) string {
	return shortName(p.GetStatus().GetState().String(), "PROVIDER_STATE_")
}

func (a *app) newProvider() *cobra.Command {
	cmd := &cobra.Command{Use: "provider", Aliases: []string{"providers"}, Short: "list, start, stop and change capability providers"}
	cmd.AddCommand(a.newProviderList(), a.newProviderGet(), a.newProviderRegister(), a.newProviderUpdate(),
		a.newProviderStart(), a.newProviderStop(), a.newProviderDeregister())
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
			t.row(p.GetId(), p.GetSpec().GetType(), orDash(p.GetSpec().GetDriver()), providerState(p),
				orDash(p.GetPlacement().GetNodeId()), a.age(p.GetCreatedAt()), oneLine(p.GetStatus().GetMessage()))
		}
		t.write(w)
	}
}

func (a *app) printProvider(message proto.Message, p *pb.Provider) error {
	return a.print(result{message: message, names: []string{p.GetId()}, table: a.providerTable([]*pb.Provider{p})})
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
				for _, p := range resp.GetProviders() {
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
				a.providerTable([]*pb.Provider{resp.GetProvider()})(w)
				config := resp.GetProvider().GetSpec().GetConfig()
				for _, key := range slices.Sorted(maps.Keys(config)) {
					fmt.Fprintf(w, "  %s=%s\n", cleanLine(key), cleanLine(config[key]))
				}
				if len(resp.GetAssignments()) > 0 {
					fmt.Fprintln(w)
					assignmentTable(resp.GetAssignments())(w)
				}
			}})
		}),
	}
}

// providerFlags describe a provider on the command line.
type providerFlags struct {
	file, kind, driver, node string
	config, labels           []string
}

func (p *providerFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&p.file, "file", "f", "", "ProviderSpec as YAML, or - for standard input; flags win over it")
	f.StringVar(&p.driver, "driver", "", "driver; for kv memory or bbolt (default: the type's)")
	f.StringArrayVar(&p.config, "config", nil, "setting of the driver, KEY=VALUE (repeatable)")
	f.StringVar(&p.node, "node", "", "the one node it may run on")
	f.StringArrayVar(&p.labels, "label", nil, "label that its node must have, KEY=VALUE (repeatable)")
}

// apply reads the file over spec, then the flags over both.
func (p *providerFlags) apply(a *app, id string, spec *pb.ProviderSpec) error {
	if p.file != "" {
		proto.Reset(spec)
		if err := a.readYAML(p.file, spec); err != nil {
			return err
		}
		if id != "" && spec.GetId() != id {
			return usagef("%s is about provider %s, not %s", p.file, spec.GetId(), id)
		}
	}
	config, err := pairs("--config", p.config)
	if err != nil {
		return err
	}
	labels, err := pairs("--label", p.labels)
	if err != nil {
		return err
	}
	if p.kind != "" {
		spec.Type = p.kind
	}
	if p.driver != "" {
		spec.Driver = p.driver
	}
	spec.Config = merged(spec.GetConfig(), config)
	if p.node != "" || len(labels) > 0 {
		spec.Placement = &pb.PlacementRules{Node: p.node, Labels: merged(spec.GetPlacement().GetLabels(), labels)}
	}
	return nil
}

func (a *app) newProviderRegister() *cobra.Command {
	var pf providerFlags
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "register NAME --type TYPE", Short: "create a provider and start it",
		Example: "  wasmatrix provider register cache --type kv --driver memory",
		Args:    cobra.MaximumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			spec := &pb.ProviderSpec{}
			id := ""
			if len(args) == 1 {
				id = args[0]
				spec.Id = id
			}
			if err := pf.apply(a, id, spec); err != nil {
				return err
			}
			if spec.GetId() == "" || spec.GetType() == "" {
				return usagef("a provider needs a name and a --type: kv")
			}
			resp, err := c.RegisterProvider(cmd.Context(), &pb.RegisterProviderRequest{Spec: spec})
			if err != nil {
				return err
			}
			return a.settleProvider(cmd.Context(), c, resp, resp.GetProvider(), wf, "RUNNING")
		}),
	}
	pf.bind(cmd)
	cmd.Flags().StringVar(&pf.kind, "type", "", "what it serves; this version serves kv")
	wf.bind(cmd)
	return cmd
}

func (a *app) newProviderUpdate() *cobra.Command {
	var pf providerFlags
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "update NAME", Short: "give a provider another driver or configuration",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := a.updateProvider(cmd.Context(), c, args[0], &pf)
			if err != nil {
				return err
			}
			want := "RUNNING"
			if !resp.GetProvider().GetDesiredRunning() {
				want = providerState(resp.GetProvider())
			}
			return a.settleProvider(cmd.Context(), c, resp, resp.GetProvider(), wf, want)
		}),
	}
	pf.bind(cmd)
	wf.bind(cmd)
	return cmd
}

// updateProvider changes what the flags name. It never undoes what somebody else
// changes at the same moment; a status that changes meanwhile does not matter.
func (a *app) updateProvider(ctx context.Context, c *client.Client, id string, pf *providerFlags) (*pb.UpdateProviderResponse, error) {
	for {
		now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
		if err != nil {
			return nil, err
		}
		spec := now.GetProvider().GetSpec()
		if err := pf.apply(a, id, spec); err != nil {
			return nil, err
		}
		resp, err := c.UpdateProvider(ctx, &pb.UpdateProviderRequest{
			Spec: spec, Write: &pb.WriteOptions{IfIndex: now.GetProvider().GetModifiedIndex()},
		})
		if err == nil || apierror.From(err).Detail("precondition") == "" || ctx.Err() != nil {
			return resp, err
		}
	}
}

func (a *app) newProviderStart() *cobra.Command {
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "start NAME", Short: "start a stopped provider", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.StartProvider(cmd.Context(), &pb.StartProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			// One that was to run already is not started anew.
			if err := failedProvider(nil, resp.GetProvider()); err != nil && !wf.no {
				return err
			}
			return a.settleProvider(cmd.Context(), c, resp, resp.GetProvider(), wf, "RUNNING")
		}),
	}
	wf.bind(cmd)
	return cmd
}

func (a *app) newProviderStop() *cobra.Command {
	var wf waitFlags
	var yes bool
	cmd := &cobra.Command{
		Use: "stop NAME", Short: "stop a provider after the calls in flight; later calls fail with PROVIDER_UNAVAILABLE",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			now, err := c.GetProvider(cmd.Context(), &pb.GetProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			var users []string
			for _, g := range now.GetAssignments() {
				users = append(users, g.GetInstanceId())
			}
			if len(users) > 0 && !yes {
				p := now.GetProvider()
				question := fmt.Sprintf("%s (%s, %s) is used by %s. Drain and stop?", p.GetId(), p.GetSpec().GetType(),
					orDash(p.GetPlacement().GetNodeId()), some(users))
				if err := a.confirm(question); err != nil {
					return err
				}
			}
			resp, err := c.StopProvider(cmd.Context(), &pb.StopProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			return a.settleProvider(cmd.Context(), c, resp, resp.GetProvider(), wf, "STOPPED")
		}),
	}
	wf.bind(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask when instances use it")
	return cmd
}

func (a *app) newProviderDeregister() *cobra.Command {
	return &cobra.Command{
		Use: "deregister NAME", Aliases: []string{"rm"}, Short: "remove a stopped provider", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.DeregisterProvider(cmd.Context(), &pb.DeregisterProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) { fmt.Fprintf(w, "%s removed\n", args[0]) }})
		}),
	}
}

// settleProvider waits until a provider is in the wanted state and prints it.
func (a *app) settleProvider(ctx context.Context, c *client.Client, resp proto.Message, p *pb.Provider, wf waitFlags, want string) error {
	if wf.no {
		return a.printProvider(resp, p)
	}
	s := a.steps()
	latest := &pb.GetProviderResponse{Provider: p}
	err := a.waitFor(ctx, c, s, wait{
		what: fmt.Sprintf("provider %s to be %s", p.GetId(), want), subject: p.GetId(), limit: wf.limit,
		look: func(ctx context.Context) (bool, string, error) {
			now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: p.GetId()})
			if err != nil {
				return false, "", err
			}
			latest = now
			state := providerState(now.GetProvider())
			fresh := now.GetProvider().GetSpecVersion() >= p.GetSpecVersion()
			if fresh && want == "RUNNING" {
				if err := failedProvider(p, now.GetProvider()); err != nil {
					return false, "", err
				}
			}
			return fresh && state == want, strings.TrimSpace(state + " " + oneLine(now.GetProvider().GetStatus().GetMessage())), nil
		},
	})
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return apierror.From(err).Next("wasmatrix events --for provider/%s", p.GetId())
	}
	if err != nil {
		s.end(0)
		return err
	}
	s.done("%s %s on %s", p.GetId(), strings.ToLower(want), orDash(latest.GetProvider().GetPlacement().GetNodeId()))
	s.end(a.elapsed())
	return a.print(result{message: latest, names: []string{p.GetId()}, table: func(io.Writer) {}})
}

// failedProvider returns an error when a provider is FAILED and was not yet so,
// at the same attempt, when it was seen before: waiting does not help then.
func failedProvider(before, now *pb.Provider) error {
	failed := func(p *pb.Provider) bool { return p.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_FAILED }
	if !failed(now) || failed(before) && proto.Equal(before.GetStatus(), now.GetStatus()) {
		return nil
	}
	message := oneLine(now.GetStatus().GetMessage())
	if message == "" {
		message = "it did not say why"
	}
	return fail(exitFailed, verdict("provider %s failed: %s", now.GetId(), message).
		With("node", orDash(now.GetPlacement().GetNodeId())).
		Next("wasmatrix provider update %s with another --driver or --config; wasmatrix events --for provider/%s", now.GetId(), now.GetId()))
}

// confirm asks a question on a terminal. Without one it refuses: a script must
// say --yes.
func (a *app) confirm(question string) error {
	if !terminal(a.env.Stdin) {
		return &usageError{err: fmt.Errorf("%s", question), next: "say so with --yes"}
	}
	fmt.Fprintf(a.env.Stderr, "%s [y/N] ", question)
	answer, err := bufio.NewReader(a.env.Stdin).ReadString('\n')
	if err != nil || !strings.HasPrefix(strings.ToLower(strings.TrimSpace(answer)), "y") {
		return usagef("nothing was done")
	}
	return nil
}

// some names the first of many.
func some(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
