package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// providerFlags describe a provider on the command line.
type providerFlags struct {
	file, kind, driver, node string
	config, unset, labels    []string
	replicas                 uint32
}

func (p *providerFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&p.file, "file", "f", "", "ProviderSpec as YAML, or - for standard input; flags win over it")
	f.StringVar(&p.driver, "driver", "", "driver: kv has bbolt, memory, redis, nats; messaging embedded, nats; http direct; external grpc (default: the type's first)")
	f.StringArrayVar(&p.config, "set", nil, "setting of the driver, KEY=VALUE (repeatable)")
	f.Uint32Var(&p.replicas, "replicas", 0, "how many nodes run it; more than 1 only for drivers that keep no state on their node (default 1)")
	f.StringVar(&p.node, "node", "", "the one node it may run on")
	f.StringArrayVar(&p.labels, "label", nil, "label that its node must have, KEY=VALUE (repeatable)")
	// It is what a manifest calls the settings.
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "config" {
			name = "set"
		}
		return pflag.NormalizedName(name)
	})
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
	config, err := pairs("--set", p.config)
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
	for _, key := range p.unset {
		if _, ok := spec.GetConfig()[key]; !ok {
			return usagef("--unset %s: there is no such setting", key)
		}
		delete(spec.Config, key)
	}
	spec.Config = merged(spec.GetConfig(), config)
	if p.replicas > 0 {
		spec.Replicas = p.replicas
	}
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
		Example: `  wasmatrix provider register cache --type kv --driver redis --set url=redis://10.0.0.5:6379
  wasmatrix provider register bus --type messaging
  wasmatrix provider register web --type http --replicas 3`,
		Args: cobra.MaximumNArgs(1),
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
				return usagef("a provider needs a name and a --type: kv, http, messaging or external")
			}
			resp, err := c.RegisterProvider(cmd.Context(), &pb.RegisterProviderRequest{Spec: spec})
			if err != nil {
				return err
			}
			return a.settleProvider(cmd.Context(), c, settle{answer: resp, provider: resp.GetProvider(), waiting: wf, running: true})
		}),
	}
	pf.bind(cmd)
	cmd.Flags().StringVar(&pf.kind, "type", "", "what it serves: kv, http, messaging or external")
	wf.bind(cmd)
	return cmd
}

func (a *app) newProviderUpdate() *cobra.Command {
	var pf providerFlags
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "update NAME", Short: "give a provider another driver, configuration or number of replicas",
		Long: `Changes what the flags name and leaves the rest. Calls wait while a replica changes
over; no call fails for it. It waits until every replica serves by the new
specification, and tells why one does not.`,
		Example: "  wasmatrix provider update kv --set max_bytes=4GiB\n  wasmatrix provider update cache --driver memory --unset url",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			before, resp, err := a.updateProvider(cmd.Context(), c, args[0], &pf)
			if err != nil {
				return err
			}
			return a.settleProvider(cmd.Context(), c, settle{
				answer: resp, provider: resp.GetProvider(), before: before, waiting: wf, running: resp.GetProvider().GetDesiredRunning(),
			})
		}),
	}
	pf.bind(cmd)
	cmd.Flags().StringArrayVar(&pf.unset, "unset", nil, "setting of the driver to take away (repeatable)")
	wf.bind(cmd)
	return cmd
}

// updateProvider changes what the flags name. It never undoes what somebody else
// changes at the same moment; a status that changes meanwhile does not matter.
// It returns the replicas as they were before.
func (a *app) updateProvider(ctx context.Context, c *client.Client, id string, pf *providerFlags) ([]*pb.Provider, *pb.UpdateProviderResponse, error) {
	for {
		now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
		if err != nil {
			return nil, nil, err
		}
		spec, ok := proto.Clone(now.GetProvider().GetSpec()).(*pb.ProviderSpec)
		if !ok {
			return nil, nil, fmt.Errorf("provider %s has no specification", id)
		}
		if err := pf.apply(a, id, spec); err != nil {
			return nil, nil, err
		}
		resp, err := c.UpdateProvider(ctx, &pb.UpdateProviderRequest{
			Spec: spec, Write: &pb.WriteOptions{IfIndex: now.GetProvider().GetModifiedIndex()},
		})
		if err == nil || apierror.From(err).Detail("precondition") == "" || ctx.Err() != nil {
			return replicasOf(now), resp, err
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
			return a.settleProvider(cmd.Context(), c, settle{
				answer: resp, provider: resp.GetProvider(), before: []*pb.Provider{resp.GetProvider()}, waiting: wf, running: true,
			})
		}),
	}
	wf.bind(cmd)
	return cmd
}

// settle is a provider that was told to run as its specification says.
type settle struct {
	// answer is that of the call that told it so, provider what it said of the first replica.
	answer   proto.Message
	provider *pb.Provider
	// before are the replicas as they were seen before, to tell a new failure from an old one.
	before  []*pb.Provider
	waiting waitFlags
	// running is false for a provider that stays stopped.
	running bool
	// waited is how long the wait has lasted.
	waited time.Duration
}

// sameAgain is how long a replica may say of the new specification what it said of
// the one before until that counts: the same mistake twice looks like the first one.
const sameAgain = 5 * time.Second

// settleProvider waits until every replica of a provider serves by the
// specification that was committed, and prints it.
func (a *app) settleProvider(ctx context.Context, c *client.Client, st settle) error {
	id := st.provider.GetId()
	if st.waiting.no || !st.running {
		return a.print(result{message: st.answer, names: []string{id}, table: a.providerTable([]*pb.Provider{st.provider})})
	}
	s := a.steps()
	began := a.env.Now()
	latest := &pb.GetProviderResponse{Provider: st.provider}
	err := a.waitFor(ctx, c, s, wait{
		what: fmt.Sprintf("provider %s to be RUNNING", id), subject: id, limit: st.waiting.limit,
		look: func(ctx context.Context) (bool, string, error) {
			now, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
			if err != nil {
				return false, "", err
			}
			latest, st.waited = now, a.env.Now().Sub(began)
			return st.look(replicasOf(now))
		},
	})
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return apierror.From(err).Next("wasmatrix events --for provider/%s", id)
	}
	if err != nil {
		s.end(0)
		return err
	}
	s.done("%s running on %s", id, nodesOf(replicasOf(latest)))
	s.end(a.elapsed())
	return a.print(result{message: latest, names: []string{id}, table: func(io.Writer) {}})
}

// look reports whether all replicas serve by the new specification.
func (st *settle) look(replicas []*pb.Provider) (done bool, found string, err error) {
	done = len(replicas) >= int(max(1, replicas[0].GetSpec().GetReplicas()))
	var states []string
	for _, p := range replicas {
		fresh := p.GetSpecVersion() >= st.provider.GetSpecVersion()
		if fresh {
			before := sameReplica(st.before, p)
			if err := failedProvider(before, p); err != nil {
				return false, "", err
			}
			if err := st.refused(before, p); err != nil {
				return false, "", err
			}
		}
		serves := p.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_RUNNING && p.GetStatus().GetSpecVersion() >= st.provider.GetSpecVersion()
		done = done && fresh && serves
		state := providerState(p)
		if !serves && state == "RUNNING" {
			state = "RUNNING by the specification before"
		}
		if len(replicas) > 1 {
			state = replicaName(p) + " " + state
		}
		states = append(states, strings.TrimSpace(state+" "+oneLine(p.GetStatus().GetMessage())))
	}
	return done, strings.Join(states, ", "), nil
}

// refused returns an error when a replica could not take up the new specification
// and goes on by the one before: waiting does not help then.
func (st *settle) refused(before, now *pb.Provider) error {
	status := now.GetStatus()
	running := status.GetState() == pb.ProviderState_PROVIDER_STATE_RUNNING
	if !running || status.GetSpecVersion() >= st.provider.GetSpecVersion() || status.GetMessage() == "" {
		return nil
	}
	if proto.Equal(before.GetStatus(), status) && st.waited < sameAgain {
		return nil
	}
	return fail(exitFailed, verdict("provider %s could not be updated: %s", replicaName(now), oneLine(status.GetMessage())).
		With("node", orDash(now.GetPlacement().GetNodeId())).
		Next("wasmatrix provider update %s with another --driver or --set; calls go on as before", now.GetId()))
}

func sameReplica(list []*pb.Provider, p *pb.Provider) *pb.Provider {
	for _, known := range list {
		if known.GetReplica() == p.GetReplica() {
			return known
		}
	}
	return nil
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
	return fail(exitFailed, verdict("provider %s failed: %s", replicaName(now), message).
		With("node", orDash(now.GetPlacement().GetNodeId())).
		Next("wasmatrix provider update %s with another --driver or --set; wasmatrix events --for provider/%s", now.GetId(), now.GetId()))
}
