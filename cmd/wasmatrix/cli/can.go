package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newCan() *cobra.Command {
	var provider string
	cmd := &cobra.Command{
		Use: "can NAME PERMISSION", Short: "tell whether instances may do something, and by which permission",
		Long: `Tells for each replica, and for each provider that it could do it on, whether it may
and which permission says so. Exit code 0 when every replica may, 5 when one may not.

Of http it tells about the host as it is written. To which addresses a host leads
is found with each request, and private ones take a rule that names them.`,
		Example: `  wasmatrix can hello kv:read:orders/17
  wasmatrix can greeter http:domain:example.com:443
  wasmatrix can orders msg:publish:orders.stored
  wasmatrix can shop provider:billing:charge`,
		Args: cobra.ExactArgs(2),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			need, err := permission.ParseNeed(args[1])
			if err != nil {
				return &usageError{err: err, next: "wasmatrix docs permissions"}
			}
			instances, err := resolve(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			return a.can(cmd.Context(), c, instances, need, provider)
		}),
	}
	cmd.Flags().StringVar(&provider, "provider", "", "only on this provider (default: on any)")
	return cmd
}

func (a *app) can(ctx context.Context, c *client.Client, instances []*pb.Instance, need permission.Need, provider string) error {
	all := true
	for _, i := range instances {
		resp, err := c.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: i.GetId()})
		if err != nil {
			return err
		}
		verdicts, err := judge(resp.GetAssignments(), need, provider)
		if err != nil {
			return err
		}
		may := false
		for _, v := range verdicts {
			may = may || v.allowed
			if err := a.printVerdict(i.GetId(), v); err != nil {
				return err
			}
		}
		all = all && may
	}
	if !all {
		return ExitWith(exitDenied)
	}
	return nil
}

// ruling is what one assignment says about a need.
type ruling struct {
	allowed bool
	// provider is empty when no assignment is about the capability at all.
	provider string
	// rule is the permission that allows it.
	rule string
	text string
}

func (a *app) printVerdict(instance string, v ruling) error {
	if a.global.output == formName && !v.allowed {
		return nil
	}
	m, err := structpb.NewStruct(map[string]any{
		"instance": instance, "provider": v.provider, "allowed": v.allowed, "rule": v.rule, "reason": v.text,
	})
	if err != nil {
		return err
	}
	return a.printLine(m, instance, fmt.Sprintf("%s  %s", instance, v.text))
}

// judge decides as the serving side does, from the assignments of one instance:
// one verdict for each provider whose assignment is about the capability, else
// one that says that there is none.
func judge(assignments []*pb.CapabilityAssignment, need permission.Need, provider string) ([]ruling, error) {
	var out []ruling
	for _, g := range assignments {
		if provider != "" && g.GetProviderId() != provider {
			continue
		}
		set, err := permission.ParseSet(g.GetPermissions())
		if err != nil {
			return nil, fmt.Errorf("permissions on %s: %w", g.GetProviderId(), err)
		}
		rule, ok := set.Allows(need)
		v := ruling{allowed: ok, provider: g.GetProviderId(), text: set.Explain(need)}
		switch {
		case ok:
			v.rule = rule.String()
			v.text += " on " + v.provider
		case !concerns(set, need.Capability):
			continue
		}
		out = append(out, v)
	}
	if len(out) > 1 {
		for i := range out {
			if !out[i].allowed {
				out[i].text = strings.Replace(out[i].text, "denied: ", "denied on "+out[i].provider+": ", 1)
			}
		}
	}
	if len(out) == 0 {
		out = append(out, ruling{text: permission.Set{}.Explain(need)})
	}
	return out, nil
}

// concerns reports whether any permission of the set is about the capability.
func concerns(set permission.Set, capability string) bool {
	for _, text := range set.Strings() {
		if p, err := permission.Parse(text); err == nil && p.Capability() == capability {
			return true
		}
	}
	return false
}
