package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newInstance() *cobra.Command {
	cmd := &cobra.Command{Use: "instance", Aliases: []string{"instances", "i"}, Short: "list, look at and change instances"}
	cmd.AddCommand(a.newInstanceList("list"), a.newInstanceGet(), a.newInstanceStop(), a.newInstanceRestart(), a.newInstanceRemove(),
		a.newLogs(), a.newInstanceEvents(), a.newInstanceWait(), a.newInvoke())
	return cmd
}

func (a *app) newPS() *cobra.Command {
	cmd := a.newInstanceList("ps")
	cmd.Aliases = nil
	cmd.Short = "list instances (instance list)"
	return cmd
}

func (a *app) newInstanceList(use string) *cobra.Command {
	var node string
	var states []string
	var stale, watch bool
	cmd := &cobra.Command{
		Use: use + " [NAME]", Aliases: []string{"ls", "ps"}, Short: "list instances, all or those of a workload",
		Args: cobra.MaximumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			wanted, err := parseStates(states)
			if err != nil {
				return err
			}
			show := func(ctx context.Context) error {
				req := &pb.ListInstancesRequest{NodeId: node, States: wanted, Read: &pb.ReadOptions{Stale: stale}}
				if len(args) == 1 {
					req.Name = args[0]
				}
				resp, err := listInstances(ctx, c, req)
				if err != nil {
					return err
				}
				return a.print(result{message: resp, names: idsOf(resp.GetInstances()), table: a.instanceTable(resp.GetInstances())})
			}
			if watch {
				return a.watch(cmd.Context(), c, show)
			}
			return show(cmd.Context())
		}),
	}
	f := cmd.Flags()
	f.StringVar(&node, "node", "", "only those placed on this node")
	f.StringSliceVar(&states, "state", nil, "only those in this state, as in RUNNING (repeatable)")
	f.BoolVar(&stale, "stale", false, "read what the answering peer has, without asking the leader")
	f.BoolVarP(&watch, "watch", "w", false, "show again whenever something happens, until Ctrl-C")
	return cmd
}

func parseStates(names []string) ([]pb.InstanceState, error) {
	var out []pb.InstanceState
	for _, name := range names {
		n, ok := pb.InstanceState_value["INSTANCE_STATE_"+strings.ToUpper(name)]
		if !ok || n == 0 {
			return nil, usagef("unknown state %q: want %s", name, strings.Join(stateNames(), ", "))
		}
		out = append(out, pb.InstanceState(n))
	}
	return out, nil
}

func stateNames() []string {
	var out []string
	values := pb.InstanceState(0).Descriptor().Values()
	for i := 1; i < values.Len(); i++ {
		out = append(out, shortName(string(values.Get(i).Name()), "INSTANCE_STATE_"))
	}
	return out
}

func (a *app) newInstanceGet() *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use: "get NAME", Aliases: []string{"describe", "show"}, Short: "tell everything about one instance",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.QueryInstance(cmd.Context(), &pb.QueryInstanceRequest{Target: args[0], Read: &pb.ReadOptions{Stale: stale}})
			if err != nil {
				return err
			}
			return a.print(result{
				message: resp, names: []string{resp.GetInstance().GetId()},
				table: func(w io.Writer) { a.describeInstance(w, resp) },
			})
		}),
	}
	cmd.Flags().BoolVar(&stale, "stale", false, "read what the answering peer has, without asking the leader")
	return cmd
}

func (a *app) describeInstance(w io.Writer, resp *pb.QueryInstanceResponse) {
	i := resp.GetInstance()
	st, spec := i.GetStatus(), i.GetSpec()
	line := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%-12s %s\n", key, fmt.Sprintf(format, args...))
	}
	line("instance", "%s", i.GetId())
	state := stateOf(i)
	if paint := a.painter(); paint != nil {
		state = paint("STATE", state)
	}
	if m := oneLine(st.GetMessage()); m != "" {
		state += " " + cleanLine(m)
	}
	line("state", "%s", state)
	if i.GetPlacement().GetNodeId() != "" {
		line("node", "%s, generation %d", i.GetPlacement().GetNodeId(), i.GetPlacement().GetGeneration())
	}
	if st.GetRuntime() != "" {
		line("runtime", "%s", runtimeText(st))
	}
	line("module", "%s", spec.GetModule())
	line("created", "%s ago", a.age(i.GetCreatedAt()))
	if st.GetStartedAt() != nil {
		line("started", "%s ago, attempt %d", a.age(st.GetStartedAt()), st.GetAttempt())
	}
	switch reason := st.GetReason(); {
	case st.GetCrashCount() == 0:
	case reason == pb.ExitReason_EXIT_REASON_UNSPECIFIED: // it runs again
		line("crashes", "%d, why: wasmatrix instance events %s", st.GetCrashCount(), i.GetId())
	default:
		line("crashes", "%d, last: %s", st.GetCrashCount(), shortName(reason.String(), "EXIT_REASON_"))
	}
	if st.GetNextRetryAt() != nil {
		line("next retry", "in %s", humanDuration(st.GetNextRetryAt().AsTime().Sub(a.env.Now())))
	}
	if u := st.GetUsage(); u != nil {
		line("uses", "%s of memory, %d invocations, %d capability calls", size(u.GetMemoryBytes()), u.GetInvocations(), u.GetCapabilityCalls())
	}
	for _, g := range resp.GetAssignments() {
		line("may use", "%s: %s (bucket %s)", g.GetProviderId(), strings.Join(g.GetPermissions(), " "), g.GetBucket())
	}
	if !i.GetDesiredRunning() {
		line("asked to", "stop")
	}
	line("caused by", "%s", orDash(i.GetCorrelationId()))
}

// waitFlags are those of commands that wait for what they asked for.
type waitFlags struct {
	no    bool
	limit time.Duration
}

func (w *waitFlags) bind(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&w.no, "no-wait", false, "return as soon as the request is accepted")
	cmd.Flags().DurationVar(&w.limit, "wait-timeout", defaultWait, "how long to wait")
}

// conditionFlags make a change depend on what the caller has seen.
type conditionFlags struct{ index uint64 }

func (f *conditionFlags) bind(cmd *cobra.Command) {
	cmd.Flags().Uint64Var(&f.index, "if-index", 0, "only if its modifiedIndex (get -o json) is this, else CONFLICT")
}

func (f *conditionFlags) options() *pb.WriteOptions {
	if f.index == 0 {
		return nil
	}
	return &pb.WriteOptions{IfIndex: f.index}
}

func (a *app) newInstanceStop() *cobra.Command {
	var wf waitFlags
	var cf conditionFlags
	cmd := &cobra.Command{
		Use: "stop NAME...", Short: "stop instances and wait until they have stopped",
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			for _, target := range args {
				resp, err := c.StopInstance(cmd.Context(), &pb.StopInstanceRequest{Target: target, Write: cf.options()})
				if err != nil {
					return err
				}
				if err := a.settle(cmd.Context(), c, target, resp.GetInstances(), wf, "stopped", over); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	wf.bind(cmd)
	cf.bind(cmd)
	return cmd
}

func (a *app) newInstanceRestart() *cobra.Command {
	var wf waitFlags
	var cf conditionFlags
	cmd := &cobra.Command{
		Use: "restart NAME...", Aliases: []string{"start"}, Short: "start instances again, also stopped and failed ones",
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			for _, target := range args {
				resp, err := c.RestartInstance(cmd.Context(), &pb.RestartInstanceRequest{Target: target, Write: cf.options()})
				if err != nil {
					return err
				}
				before := map[string]*pb.InstanceStatus{}
				for _, i := range resp.GetInstances() {
					before[i.GetId()] = i.GetStatus()
				}
				err = a.settle(cmd.Context(), c, target, resp.GetInstances(), wf, "running", func(i *pb.Instance) bool {
					return restarted(before[i.GetId()], i)
				})
				if err != nil {
					return err
				}
			}
			return nil
		}),
	}
	wf.bind(cmd)
	cf.bind(cmd)
	return cmd
}

// restarted reports whether an instance started, or ended, after it was seen with status before.
func restarted(before *pb.InstanceStatus, i *pb.Instance) bool {
	st := i.GetStatus()
	if st.GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING && !over(i) {
		return false
	}
	return st.GetGeneration() != before.GetGeneration() || st.GetAttempt() != before.GetAttempt() ||
		st.GetStartedAt().AsTime().After(before.GetStartedAt().AsTime())
}

// settle waits until all instances are done and prints them.
func (a *app) settle(ctx context.Context, c *client.Client, target string, instances []*pb.Instance, wf waitFlags, word string, done func(*pb.Instance) bool) error {
	latest := map[string]*pb.Instance{}
	s := a.steps()
	if !wf.no {
		told := map[string]bool{}
		err := a.waitFor(ctx, c, s, wait{
			what: fmt.Sprintf("%s to be %s", target, word), subject: subjectOf(instances), limit: wf.limit,
			look: func(ctx context.Context) (bool, string, error) {
				return lookAt(ctx, c, instances, latest, func(i *pb.Instance) bool {
					if !done(i) {
						return false
					}
					if !told[i.GetId()] {
						told[i.GetId()] = true
						s.done("%s %s", i.GetId(), strings.ToLower(stateOf(i)))
					}
					return true
				})
			},
		})
		s.end(a.elapsed())
		if err != nil {
			return err
		}
	}
	out := &pb.ListInstancesResponse{}
	var failed []*pb.Instance
	for _, i := range instances {
		if now, ok := latest[i.GetId()]; ok {
			i = now
			if i.GetDesiredRunning() && i.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_FAILED {
				failed = append(failed, i)
			}
		}
		out.Instances = append(out.Instances, i)
	}
	if len(failed) > 0 {
		return workloadFailed(target, failed)
	}
	return a.print(result{message: out, names: idsOf(out.GetInstances()), table: func(w io.Writer) {
		if wf.no {
			a.instanceTable(out.GetInstances())(w)
		}
	}})
}

// subjectOf returns whose events concern the instances: their workload, or the one itself.
func subjectOf(instances []*pb.Instance) string {
	if len(instances) == 1 {
		return instances[0].GetId()
	}
	name := ""
	for _, i := range instances {
		if name != "" && i.GetName() != name {
			return ""
		}
		name = i.GetName()
	}
	return name
}

// lookAt reads the instances anew into latest and reports whether all are done.
func lookAt(ctx context.Context, c *client.Client, instances []*pb.Instance, latest map[string]*pb.Instance, done func(*pb.Instance) bool) (bool, string, error) {
	now, err := reread(ctx, c, instances)
	if err != nil {
		return false, "", err
	}
	all := true
	found := map[string]int{}
	for _, i := range now {
		latest[i.GetId()] = i
		all = done(i) && all
		found[stateOf(i)]++
	}
	return all, tally(found), nil
}

// reread returns the present records of the instances; one that was removed
// meanwhile is INSTANCE_NOT_FOUND.
func reread(ctx context.Context, c *client.Client, instances []*pb.Instance) ([]*pb.Instance, error) {
	byID := map[string]*pb.Instance{}
	if len(instances) > 1 && instances[0].GetName() == instances[len(instances)-1].GetName() {
		list, err := listInstances(ctx, c, &pb.ListInstancesRequest{Name: instances[0].GetName()})
		if err != nil {
			return nil, err
		}
		for _, i := range list.GetInstances() {
			byID[i.GetId()] = i
		}
	}
	out := make([]*pb.Instance, len(instances))
	for n, i := range instances {
		if out[n] = byID[i.GetId()]; out[n] != nil {
			continue
		}
		resp, err := c.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: i.GetId()})
		if err != nil {
			return nil, err
		}
		out[n] = resp.GetInstance()
	}
	return out, nil
}

// tally tells how many instances are in which state.
func tally(counts map[string]int) string { return tallyOf(counts, stateNames()) }

func tallyOf(counts map[string]int, order []string) string {
	var parts []string
	for _, state := range order {
		if n := counts[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	return strings.Join(parts, ", ")
}

func (a *app) newInstanceRemove() *cobra.Command {
	var force bool
	var cf conditionFlags
	cmd := &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"remove"}, Short: "forget ended instances; with --force also running ones, which are stopped",
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			for _, target := range args {
				resp, err := c.RemoveInstance(cmd.Context(), &pb.RemoveInstanceRequest{Target: target, Force: force, Write: cf.options()})
				if err != nil {
					return err
				}
				err = a.print(result{message: resp, names: resp.GetInstanceIds(), table: func(w io.Writer) {
					for _, id := range resp.GetInstanceIds() {
						fmt.Fprintf(w, "%s removed\n", id)
					}
				}})
				if err != nil {
					return err
				}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove running instances too")
	cf.bind(cmd)
	return cmd
}
