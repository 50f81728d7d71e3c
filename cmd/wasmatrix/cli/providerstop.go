package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// stopGrace and drainGrace are how long calls in flight may take by default.
	stopGrace  = 10 * time.Second
	drainGrace = 10 * time.Minute
	// afterGrace is what the wait has left once the grace is over.
	afterGrace = 30 * time.Second
)

// stopFlags say how a provider is stopped.
type stopFlags struct {
	grace time.Duration
	yes   bool
	no    bool
}

func (f *stopFlags) bind(cmd *cobra.Command, grace time.Duration) {
	cmd.Flags().DurationVar(&f.grace, "grace", grace, "how long calls in flight may take before they are cut off; at most 1h")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask when instances use it")
	cmd.Flags().BoolVar(&f.no, "no-wait", false, "do not wait until it has stopped")
}

func (a *app) newProviderStop() *cobra.Command {
	var sf stopFlags
	cmd := &cobra.Command{
		Use: "stop NAME", Short: "stop a provider after the calls in flight; later calls fail with PROVIDER_UNAVAILABLE",
		Long: `Lets the calls in flight finish, within --grace, and stops the provider on all its
nodes. New calls fail with PROVIDER_UNAVAILABLE at once. Instances that use it go
on, and their calls work again when it is started.`,
		Example: "  wasmatrix provider stop bus\n  wasmatrix provider stop bus --yes --grace 1s",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			return a.stopProvider(cmd.Context(), c, args[0], sf)
		}),
	}
	sf.bind(cmd, stopGrace)
	return cmd
}

func (a *app) newProviderDrain() *cobra.Command {
	var sf stopFlags
	cmd := &cobra.Command{
		Use: "drain NAME", Short: "stop a provider and wait as long as the calls in flight take",
		Long:    `Does what stop does, with time for calls that take long.`,
		Example: "  wasmatrix provider drain kv --yes && wasmatrix provider update kv --driver memory",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			return a.stopProvider(cmd.Context(), c, args[0], sf)
		}),
	}
	sf.bind(cmd, drainGrace)
	return cmd
}

func (a *app) stopProvider(ctx context.Context, c *client.Client, id string, sf stopFlags) error {
	if sf.grace < 0 {
		return usagef("--grace %s is negative", sf.grace)
	}
	now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
	if err != nil {
		return err
	}
	var users []string
	for _, g := range now.GetAssignments() {
		users = append(users, g.GetInstanceId())
	}
	if len(users) > 0 && !sf.yes && now.GetProvider().GetDesiredRunning() {
		question := fmt.Sprintf("%s (%s, %s) is used by %s. Drain and stop?",
			id, now.GetProvider().GetSpec().GetType(), nodesOf(replicasOf(now)), some(users))
		if err := a.confirm(question); err != nil {
			return err
		}
	}
	resp, err := c.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: id, Grace: durationpb.New(sf.grace)})
	if err != nil {
		return err
	}
	if sf.no {
		return a.print(result{message: resp, names: []string{id}, table: a.providerTable([]*pb.Provider{resp.GetProvider()})})
	}
	return a.awaitStop(ctx, c, id, sf.grace)
}

// awaitStop tells of the steps of a stop as they come.
func (a *app) awaitStop(ctx context.Context, c *client.Client, id string, grace time.Duration) error {
	s := a.steps()
	began := a.env.Now()
	latest := &pb.GetProviderResponse{}
	closed, calls := false, uint32(0)
	err := a.waitFor(ctx, c, s, wait{
		what: fmt.Sprintf("provider %s to be STOPPED", id), subject: id, limit: grace + afterGrace,
		look: func(ctx context.Context) (bool, string, error) {
			now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
			if err != nil {
				return false, "", err
			}
			latest = now
			p := drainOf(replicasOf(now))
			if calls = max(calls, p.calls); p.closed && !closed {
				closed = true
				s.done("no new calls")
			}
			return p.stopped, p.found, nil
		},
	})
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return apierror.From(err).Next("wasmatrix events --for provider/%s", id)
	}
	if err != nil {
		s.end(0)
		return err
	}
	if left := leftovers(replicasOf(latest)); left != "" {
		s.done("%s", left)
	} else if calls > 0 {
		s.done("%s in flight finished (%.1fs)", plural(int(calls), "call"), a.env.Now().Sub(began).Seconds())
	}
	s.done("stopped")
	s.end(0)
	return a.print(result{message: latest, names: []string{id}, table: func(io.Writer) {}})
}

// draining is how far the stop of a provider is.
type draining struct {
	closed, stopped bool
	calls           uint32 // in flight when it began
	found           string
}

func drainOf(replicas []*pb.Provider) draining {
	d := draining{closed: true, stopped: true}
	states := map[string]int{}
	for _, p := range replicas {
		state := p.GetStatus().GetState()
		stopped := state == pb.ProviderState_PROVIDER_STATE_STOPPED
		d.stopped = d.stopped && stopped
		d.closed = d.closed && (stopped || state == pb.ProviderState_PROVIDER_STATE_DRAINING)
		d.calls += p.GetStatus().GetCallsInFlight()
		states[providerState(p)]++
	}
	d.found = tallyOf(states, providerStates())
	if d.calls > 0 {
		d.found += fmt.Sprintf(", %s in flight when it began", plural(int(d.calls), "call"))
	}
	return d
}

// leftovers is what the replicas say of their stop when not all calls finished.
func leftovers(replicas []*pb.Provider) string {
	var out []string
	for _, p := range replicas {
		if m := oneLine(p.GetStatus().GetMessage()); m != "" {
			out = append(out, m)
		}
	}
	return strings.Join(out, "; ")
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
