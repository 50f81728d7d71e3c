package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newWait() *cobra.Command {
	var state string
	var limit time.Duration
	cmd := &cobra.Command{
		Use: "wait KIND/NAME --for STATE", Short: "wait until an instance, a provider or a node is in a state",
		Long: `Waits until an instance (or all replicas of a workload), a provider or a node is
in a state. KIND is instance, provider or node; without it instance is meant.

States: instance ` + strings.Join(stateNames(), ", ") + `, GONE;
provider PENDING … RUNNING, STOPPED, FAILED, GONE; node READY, LOST, DRAINED.

It ends at once, with exit code 8, when an instance failed for good instead, or
a provider that is to run failed.`,
		Example: "  wasmatrix wait instance/hello --for RUNNING\n  wasmatrix wait node/n2 --for DRAINED --timeout 5m",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			return a.waitState(cmd.Context(), c, args[0], strings.ToUpper(state), limit)
		}),
	}
	cmd.Flags().StringVar(&state, "for", "", "the state to wait for")
	cmd.Flags().DurationVar(&limit, "timeout", defaultWait, "how long to wait")
	return cmd
}

func (a *app) newInstanceWait() *cobra.Command {
	cmd := a.newWait()
	cmd.Use = "wait NAME --for STATE"
	return cmd
}

// gone is the state of what does not exist any more.
const gone = "GONE"

func (a *app) waitState(ctx context.Context, c *client.Client, subject, state string, limit time.Duration) error {
	if state == "" {
		return usagef("say what to wait for: --for STATE")
	}
	kind, name, ok := strings.Cut(subject, "/")
	if !ok {
		kind, name = "instance", subject
	}
	w := wait{what: fmt.Sprintf("%s %s to be %s", kind, name, state), subject: name, limit: limit}
	var known map[string]int32
	prefix := ""
	switch kind {
	case "instance", "workload":
		known, prefix = pb.InstanceState_value, "INSTANCE_STATE_"
		w.look = func(ctx context.Context) (bool, string, error) { return lookInstances(ctx, c, name, state) }
		w.subject = "" // events of a prefix cannot be asked for
	case "provider":
		known, prefix = pb.ProviderState_value, "PROVIDER_STATE_"
		w.look = func(ctx context.Context) (bool, string, error) { return lookProvider(ctx, c, name, state) }
	case "node":
		known, prefix = map[string]int32{"READY": 1, "LOST": 1, "DRAINED": 1}, ""
		w.look = func(ctx context.Context) (bool, string, error) { return lookNode(ctx, c, name, state) }
	default:
		return usagef("unknown kind %q: want instance, provider or node", kind)
	}
	if known[prefix+state] == 0 && (state != gone || kind == "node") {
		article := "a"
		if kind == "instance" {
			article = "an"
		}
		return usagef("%s %s is never %q", article, kind, state)
	}
	s := a.steps()
	if err := a.waitFor(ctx, c, s, w); err != nil {
		return err
	}
	s.done("%s is %s", name, state)
	s.end(0)
	return nil
}

func lookInstances(ctx context.Context, c *client.Client, name, state string) (bool, string, error) {
	found, err := resolve(ctx, c, name)
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND && state == gone {
		return true, "", nil
	}
	if err != nil {
		return false, "", err
	}
	counts := map[string]int{}
	all := true
	var failed []*pb.Instance
	for _, i := range found {
		counts[stateOf(i)]++
		all = all && stateOf(i) == state
		if i.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_FAILED {
			failed = append(failed, i)
		}
	}
	if !all && len(failed) > 0 && state != "STOPPED" && state != gone && state != "FAILED" {
		return false, "", workloadFailed(name, failed)
	}
	return all, tally(counts), nil
}

func lookProvider(ctx context.Context, c *client.Client, name, state string) (bool, string, error) {
	resp, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: name})
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND && state == gone {
		return true, "", nil
	}
	if err != nil {
		return false, "", err
	}
	all := true
	var found []string
	for _, p := range replicasOf(resp) {
		if state == "RUNNING" {
			if err := failedProvider(nil, p); err != nil {
				return false, "", err
			}
		}
		all = all && providerState(p) == state
		found = append(found, strings.TrimSpace(providerState(p)+" "+oneLine(p.GetStatus().GetMessage())))
	}
	return all, strings.Join(found, ", "), nil
}

func lookNode(ctx context.Context, c *client.Client, name, state string) (bool, string, error) {
	resp, err := c.ListNodes(ctx, &pb.ListNodesRequest{})
	if err != nil {
		return false, "", err
	}
	for _, n := range resp.GetNodes() {
		if n.GetId() != name {
			continue
		}
		left := resp.GetInstanceCounts()[name]
		found := fmt.Sprintf("%s, %s", nodeState(n), plural(int(left), "instance"))
		if state == "DRAINED" {
			return n.GetDraining() && left == 0, found, nil
		}
		return shortName(n.GetState().String(), "NODE_STATE_") == state, found, nil
	}
	return false, "", apierror.New(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "no node has the id %q", name).Next("wasmatrix node list")
}
