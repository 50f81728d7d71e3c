package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// providerTypes says which type of provider serves a capability.
func providerTypes() map[string]string {
	return map[string]string{
		permission.KV: "kv", permission.HTTP: "http", permission.Messaging: "messaging", permission.Provider: "external",
	}
}

// chooseProviders says for each permission which provider it is about: the one
// that it names itself, one of those named, else the only one of the type that
// serves it. The result has the permissions of each provider, in the order of the
// permissions.
func chooseProviders(replicas []*pb.Provider, permissions, named []string) ([]*pb.CapabilityGrant, error) {
	known := distinct(replicas)
	for _, name := range named {
		if !slices.ContainsFunc(known, func(p *pb.Provider) bool { return p.GetId() == name }) {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", name).
				With("providers", joined(known)).Next("wasmatrix provider list")
		}
	}
	var out []*pb.CapabilityGrant
	used := map[string]bool{}
	for _, text := range permissions {
		p, err := permission.Parse(text)
		if err != nil {
			return nil, &usageError{err: err, next: "wasmatrix docs permissions"}
		}
		provider, err := chooseProvider(known, p, named)
		if err != nil {
			return nil, err
		}
		used[provider] = true
		i := slices.IndexFunc(out, func(g *pb.CapabilityGrant) bool { return g.GetProvider() == provider })
		if i < 0 {
			i = len(out)
			out = append(out, &pb.CapabilityGrant{Provider: provider})
		}
		out[i].Permissions = append(out[i].Permissions, text)
	}
	for _, name := range named {
		if !used[name] {
			return nil, usagef("--provider %s serves none of the permissions %s", name, strings.Join(permissions, ", "))
		}
	}
	return out, nil
}

func chooseProvider(known []*pb.Provider, p permission.Permission, named []string) (string, error) {
	kind := providerTypes()[p.Capability()]
	if id := externalProvider(p); id != "" {
		return id, checkExternal(known, p, id)
	}
	var fitting, chosen []*pb.Provider
	for _, provider := range known {
		if provider.GetSpec().GetType() != kind {
			continue
		}
		fitting = append(fitting, provider)
		if slices.Contains(named, provider.GetId()) {
			chosen = append(chosen, provider)
		}
	}
	if len(chosen) == 0 {
		chosen = fitting
	}
	switch len(chosen) {
	case 1:
		return chosen[0].GetId(), nil
	case 0:
		return "", apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "%s is served by a provider of type %s, and there is none", p, kind).
			Next("wasmatrix provider register NAME --type %s", kind)
	default:
		return "", usagef("%s could be meant for any of the providers %s: choose with --provider", p, joined(chosen))
	}
}

// externalProvider returns the id of the provider that a permission names, as in
// provider:billing:charge; no other capability's do.
func externalProvider(p permission.Permission) string {
	rest, ok := strings.CutPrefix(p.String(), permission.Provider+":")
	if !ok {
		return ""
	}
	id, _, _ := strings.Cut(rest, ":")
	return id
}

func checkExternal(known []*pb.Provider, p permission.Permission, id string) error {
	for _, provider := range known {
		if provider.GetId() != id {
			continue
		}
		if kind := provider.GetSpec().GetType(); kind != "external" {
			return &usageError{
				err:  fmt.Errorf("%s is about an external provider, and %s is of type %s", p, id, kind),
				next: "wasmatrix docs permissions",
			}
		}
		return nil
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "%s is about provider %s, and there is none", p, id).
		With("providers", joined(known)).Next("wasmatrix provider register %s --type external --set address=HOST:PORT", id)
}

func joined(providers []*pb.Provider) string {
	ids := make([]string, len(providers))
	for i, p := range providers {
		ids[i] = p.GetId()
	}
	return orDash(strings.Join(ids, ", "))
}

// grantFlags choose the providers of permissions.
type grantFlags struct {
	providers []string
	bucket    string
}

func (g *grantFlags) bind(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&g.providers, "provider", nil, "provider that the permissions are about (repeatable, one of each type; default: the only one of its type)")
}

// grants turns permissions into grants on providers of the cluster.
func (g *grantFlags) grants(ctx context.Context, c *client.Client, permissions []string) ([]*pb.CapabilityGrant, error) {
	if len(permissions) == 0 {
		if len(g.providers) > 0 {
			return nil, usagef("--provider says nothing without a permission")
		}
		return nil, nil
	}
	list, err := c.ListProviders(ctx, &pb.ListProvidersRequest{})
	if err != nil {
		return nil, err
	}
	out, err := chooseProviders(list.GetProviders(), permissions, g.providers)
	if err != nil {
		return nil, err
	}
	for _, grant := range out {
		if strings.HasPrefix(grant.GetPermissions()[0], "kv:") {
			grant.Bucket = g.bucket
		}
	}
	return out, nil
}

func (a *app) newGrant() *cobra.Command {
	var g grantFlags
	cmd := &cobra.Command{
		Use: "grant NAME PERMISSION...", Short: "let instances use a provider; takes effect at once",
		Example: "  wasmatrix grant hello kv:read kv:write:greetings/",
		Args:    cobra.MinimumNArgs(2),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			grants, err := g.grants(cmd.Context(), c, args[1:])
			if err != nil {
				return err
			}
			out := &pb.AssignCapabilityResponse{}
			for _, grant := range grants {
				resp, err := c.AssignCapability(cmd.Context(), &pb.AssignCapabilityRequest{Target: args[0], Grant: grant})
				if err != nil {
					return err
				}
				out.Assignments = append(out.Assignments, resp.GetAssignments()...)
				out.Index = resp.GetIndex()
			}
			return a.print(result{message: out, names: assigned(out.GetAssignments()), table: assignmentTable(out.GetAssignments())})
		}),
	}
	g.bind(cmd)
	cmd.Flags().StringVar(&g.bucket, "bucket", "", "key-value bucket the instances see (default: the one named after the workload)")
	return cmd
}

func (a *app) newRevoke() *cobra.Command {
	var g grantFlags
	var all bool
	cmd := &cobra.Command{
		Use: "revoke NAME PERMISSION...", Short: "take permissions away; takes effect at once",
		Example: "  wasmatrix revoke hello kv:write:greetings/\n  wasmatrix revoke hello --all --provider kv",
		Args:    cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			var takes []*pb.CapabilityGrant
			var err error
			switch {
			case all && len(args) == 1 && len(g.providers) > 0:
				for _, p := range g.providers {
					takes = append(takes, &pb.CapabilityGrant{Provider: p})
				}
			case all || len(args) == 1:
				return usagef("name the permissions to take, or --all and --provider")
			default:
				takes, err = g.grants(cmd.Context(), c, args[1:])
			}
			if err != nil {
				return err
			}
			out := &pb.RevokeCapabilityResponse{}
			for _, take := range takes {
				resp, err := c.RevokeCapability(cmd.Context(), &pb.RevokeCapabilityRequest{
					Target: args[0], ProviderId: take.GetProvider(), Permissions: take.GetPermissions(),
				})
				if err != nil {
					return err
				}
				out.Assignments = append(out.Assignments, resp.GetAssignments()...)
				out.Index = resp.GetIndex()
			}
			return a.print(result{message: out, names: assigned(out.GetAssignments()), table: assignmentTable(out.GetAssignments())})
		}),
	}
	g.bind(cmd)
	cmd.Flags().BoolVar(&all, "all", false, "take everything granted on the providers of --provider")
	return cmd
}

func assigned(list []*pb.CapabilityAssignment) []string {
	var out []string
	for _, g := range list {
		out = append(out, g.GetInstanceId()+"/"+g.GetProviderId())
	}
	return out
}

func assignmentTable(list []*pb.CapabilityAssignment) func(io.Writer) {
	return func(w io.Writer) {
		if len(list) == 0 {
			fmt.Fprintln(w, "nothing is granted any more")
			return
		}
		t := table{head: []string{"INSTANCE", "PROVIDER", "BUCKET", "PERMISSIONS"}}
		subscribed := slices.ContainsFunc(list, func(g *pb.CapabilityAssignment) bool { return len(g.GetSubscriptions()) > 0 })
		if subscribed {
			t.head = append(t.head, "SUBSCRIPTIONS")
		}
		for _, g := range list {
			cells := []string{g.GetInstanceId(), g.GetProviderId(), g.GetBucket(), strings.Join(g.GetPermissions(), " ")}
			if subscribed {
				cells = append(cells, strings.Join(g.GetSubscriptions(), " "))
			}
			t.row(cells...)
		}
		t.write(w)
	}
}
