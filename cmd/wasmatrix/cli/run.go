package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxStdin is the most standard input that a spec carries.
const maxStdin = 1 << 20

// runFlags are the flags of run; each overrides the manifest when it is set.
type runFlags struct {
	name, runtime, node, stdin string
	replicas, concurrency      uint32
	allow, env, args, labels   []string
	subscribe                  []string
	restart                    string
	maxRetries                 int32
	memory                     string
	timeout                    time.Duration
	grants                     grantFlags
	wait                       bool
	waiting                    waitFlags
}

func (a *app) newRun() *cobra.Command {
	var rf runFlags
	cmd := &cobra.Command{
		Use:   "run FILE.wasm|DIGEST|MANIFEST.yaml [-- ARG...]",
		Short: "run a workload and wait until it runs",
		Long: `Stores the module, starts the workload and waits until all its instances run. Of
a command (a module with _start) the output is followed until it has completed;
the exit code is 8 when it failed.

--allow grants a permission on the provider that --provider names, or on the
only provider of the type that serves the permission. --provider may be given
once for each type.`,
		Example: `  wasmatrix run hello.wasm --replicas 2 --allow kv:read --allow kv:write:greetings/
  echo "some words" | wasmatrix run wordcount.wasm --stdin - -- -top 3
  wasmatrix run greeter.wasm --allow http:request --allow http:domain:example.com
  wasmatrix run orders.wasm --subscribe orders.created --allow msg:subscribe:orders.created --allow kv:write
  wasmatrix run hello.yaml --replicas 3`,
		Args: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); len(args) == 0 || n == 0 || n < 0 && len(args) > 1 || n > 1 {
				return fmt.Errorf("want one module or manifest, and the guest's own arguments after --")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			// A mistake in the command line is told without a cluster.
			rf.args = append(rf.args, args[1:]...)
			spec, err := a.specOf(cmd, &rf, args[0])
			if err != nil {
				return err
			}
			if isFile(spec.GetModule()) {
				f, _, err := openModule(spec.GetModule())
				if err != nil {
					return err
				}
				_ = f.Close()
			}
			rf.waiting.no = rf.waiting.no || !rf.wait
			return a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
				return a.start(cmd.Context(), c, spec, &rf)
			})(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&rf.name, "name", "", "the workload's name (default: that of the file)")
	f.Uint32Var(&rf.replicas, "replicas", 1, "how many instances")
	f.StringArrayVar(&rf.allow, "allow", nil, "grant a permission, as in kv:read:orders/ (repeatable)")
	f.StringArrayVar(&rf.subscribe, "subscribe", nil, "subject whose messages its message handler gets; it takes --allow msg:subscribe too (repeatable)")
	rf.grants.bind(cmd)
	f.StringVar(&rf.grants.bucket, "bucket", "", "key-value bucket the instances see (default: the one named after the workload)")
	f.StringArrayVar(&rf.env, "env", nil, "environment variable of the guest, KEY=VALUE (repeatable)")
	f.StringArrayVar(&rf.args, "arg", nil, "argument of the guest (repeatable; those after -- follow)")
	f.StringVar(&rf.stdin, "stdin", "", "standard input of a command: TEXT, @FILE or - for that of this command")
	f.StringVar(&rf.restart, "restart", "", "after a crash: never, always or on-failure (default on-failure)")
	f.Int32Var(&rf.maxRetries, "max-retries", 0, "most restarts in a row, -1 without limit (default 5)")
	f.StringVar(&rf.memory, "memory", "", "most memory of an instance, as in 32MiB (default 64MiB)")
	f.DurationVar(&rf.timeout, "timeout", 0, "longest time of one call into the guest, or of a command's whole run")
	f.Uint32Var(&rf.concurrency, "concurrency", 0, "calls that one instance handles at once (default 1)")
	f.StringVar(&rf.node, "node", "", "the one node it may run on")
	f.StringArrayVar(&rf.labels, "label", nil, "label that a node must have, KEY=VALUE (repeatable)")
	f.StringVar(&rf.runtime, "runtime", "", "wasm or microvm (default: the node's)")
	f.BoolVar(&rf.wait, "wait", true, "wait until it runs, or has completed")
	rf.waiting.bind(cmd)
	return cmd
}

// specOf makes the spec from what was named and the flags.
func (a *app) specOf(cmd *cobra.Command, rf *runFlags, what string) (*pb.WorkloadSpec, error) {
	spec := &pb.WorkloadSpec{Module: what}
	switch ext := strings.ToLower(filepath.Ext(what)); {
	case ext == ".yaml" || ext == ".yml" || what == "-":
		var err error
		if spec, err = a.readManifest(what); err != nil {
			return nil, err
		}
	case isFile(what):
		spec.Name = nameFrom(what)
	case rf.name == "":
		return nil, usagef("a digest has no name of its own: give one with --name")
	}
	if err := rf.apply(cmd, spec); err != nil {
		return nil, err
	}
	if rf.stdin != "" {
		raw, err := a.dataFlag("--stdin", rf.stdin, maxStdin)
		if err != nil {
			return nil, err
		}
		spec.Stdin = raw
	}
	if err := checkRules(spec); err != nil {
		return nil, err
	}
	if err := checkMeaning(spec); err != nil {
		return nil, Usage(err)
	}
	if _, err := permission.ParseSet(rf.allow); err != nil {
		return nil, &usageError{err: fmt.Errorf("--allow: %w", err), next: "wasmatrix docs permissions"}
	}
	return spec, nil
}

// apply writes the flags that were set over the spec.
func (rf *runFlags) apply(cmd *cobra.Command, spec *pb.WorkloadSpec) error {
	set := cmd.Flags().Changed
	if rf.name != "" {
		spec.Name = rf.name
	}
	if set("replicas") {
		spec.Replicas = rf.replicas
	}
	if rf.runtime != "" {
		spec.Runtime = rf.runtime
	}
	for _, subject := range rf.subscribe {
		spec.Triggers = append(spec.Triggers, &pb.Trigger{Trigger: &pb.Trigger_Subscribe{Subscribe: subject}})
	}
	spec.Args = append(spec.GetArgs(), rf.args...)
	env, err := pairs("--env", rf.env)
	if err != nil {
		return err
	}
	labels, err := pairs("--label", rf.labels)
	if err != nil {
		return err
	}
	spec.Env = merged(spec.GetEnv(), env)
	if rf.node != "" || len(labels) > 0 {
		if spec.Placement == nil {
			spec.Placement = &pb.PlacementRules{}
		}
		spec.Placement.Labels = merged(spec.GetPlacement().GetLabels(), labels)
		if rf.node != "" {
			spec.Placement.Node = rf.node
		}
	}
	if rf.restart != "" || set("max-retries") {
		if spec.Restart == nil {
			spec.Restart = &pb.RestartPolicy{}
		}
		if rf.restart != "" {
			spec.Restart.Policy = rf.restart
		}
		if set("max-retries") {
			spec.Restart.MaxRetries = rf.maxRetries
		}
	}
	if rf.memory != "" || rf.timeout != 0 || rf.concurrency != 0 {
		if spec.Limits == nil {
			spec.Limits = &pb.InstanceLimits{}
		}
		if rf.memory != "" {
			spec.Limits.Memory = rf.memory
		}
		if rf.timeout != 0 {
			spec.Limits.Timeout = durationpb.New(rf.timeout)
		}
		if rf.concurrency != 0 {
			spec.Limits.Concurrency = rf.concurrency
		}
	}
	return nil
}

// start stores the module of spec, starts it, and waits as rf says.
func (a *app) start(ctx context.Context, c *client.Client, spec *pb.WorkloadSpec, rf *runFlags) error {
	s := a.steps()
	grants, err := rf.grants.grants(ctx, c, rf.allow)
	if err != nil {
		return err
	}
	spec.Capabilities = append(spec.GetCapabilities(), grants...)
	module, err := a.storeModule(ctx, c, spec, s)
	if err != nil {
		return err
	}
	started, err := c.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
	if err != nil {
		s.end(0)
		return err
	}
	if rf.waiting.no {
		s.end(a.elapsed())
		return a.print(result{message: started, names: idsOf(started.GetInstances()), table: a.instanceTable(started.GetInstances())})
	}
	l := &launch{app: a, client: c, steps: s, name: spec.GetName(), limit: rf.waiting.limit, instances: started.GetInstances()}
	err = l.wait(ctx, module.GetKind() == pb.ModuleKind_MODULE_KIND_COMMAND)
	if ctx.Err() != nil {
		s.say("%s stays in the cluster; wasmatrix instance stop %s", spec.GetName(), spec.GetName())
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	started.Instances = l.instances
	return a.print(result{message: started, names: idsOf(started.GetInstances()), table: func(io.Writer) {}})
}

// storeModule uploads the module's file, unless the spec names a digest, and
// puts the digest into the spec. It returns nil for a digest that the cluster
// does not know, which StartInstance then refuses.
func (a *app) storeModule(ctx context.Context, c *client.Client, spec *pb.WorkloadSpec, s *steps) (*pb.Module, error) {
	if !isFile(spec.GetModule()) {
		list, err := c.ListModules(ctx, &pb.ListModulesRequest{})
		if err != nil {
			return nil, err
		}
		for _, m := range list.GetModules() {
			if m.GetDigest() == spec.GetModule() {
				return m, nil
			}
		}
		return nil, nil //nolint:nilnil // the comment above says what it means
	}
	path := spec.GetModule()
	f, n, err := openModule(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	began := a.env.Now()
	m, err := c.UploadModule(ctx, filepath.Base(path), f, n)
	if err != nil {
		return nil, err
	}
	spec.Module = m.GetDigest()
	line := fmt.Sprintf("%s %s %s", filepath.Base(path), shortDigest(m.GetDigest()), size(m.GetSizeBytes()))
	if imports := grantedImports(m, spec); len(imports) > 0 {
		line += " · imports " + strings.Join(imports, ", ")
	}
	s.say("%s", line)
	s.done("stored %s", took(a.env.Now().Sub(began)))
	return m, nil
}

// capabilityImports returns the imports that need a permission.
func capabilityImports(m *pb.Module) []string {
	var out []string
	for _, imported := range m.GetImports() {
		if _, needs := needOf(imported); needs {
			out = append(out, imported)
		}
	}
	return out
}

// grantedImports tells with each import whether the spec grants what it needs.
func grantedImports(m *pb.Module, spec *pb.WorkloadSpec) []string {
	var texts []string
	for _, g := range spec.GetCapabilities() {
		texts = append(texts, g.GetPermissions()...)
	}
	set, err := permission.ParseSet(texts)
	out := capabilityImports(m)
	for i, imported := range out {
		need, _ := needOf(imported)
		verdict := "not granted"
		if err == nil && set.MayEver(need) {
			verdict = "granted"
		}
		out[i] = fmt.Sprintf("%s (%s %s)", imported, need, verdict)
	}
	return out
}

// needOf returns what an import as "wasmatrix:kv/v1 get" needs at least.
func needOf(imported string) (permission.Need, bool) {
	module, function, _ := strings.Cut(imported, " ")
	capability, ours := strings.CutPrefix(module, "wasmatrix:")
	if !ours {
		return permission.Need{}, false
	}
	capability, _, _ = strings.Cut(capability, "/")
	return permission.ForImport(capability, function)
}

// notInName is what a workload's name cannot have.
var notInName = regexp.MustCompile(`[^a-z0-9]+`)

// maxNameBytes is the longest name of a workload.
const maxNameBytes = 53

// nameFrom makes a workload's name from the path of its module.
func nameFrom(path string) string {
	base := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	name := strings.Trim(notInName.ReplaceAllString(strings.ToLower(base), "-"), "-")
	return strings.Trim(name[:min(len(name), maxNameBytes)], "-")
}

// pairs reads KEY=VALUE flags.
func pairs(flag string, texts []string) (map[string]string, error) {
	out := map[string]string{}
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return nil, usagef("%s %q: want KEY=VALUE", flag, text)
		}
		out[key] = value
	}
	return out, nil
}

// merged returns over written over base; nil when both are empty.
func merged(base, over map[string]string) map[string]string {
	if len(over) == 0 {
		return base
	}
	out := map[string]string{}
	maps.Copy(out, base)
	maps.Copy(out, over)
	return out
}

// dataFlag reads TEXT, @FILE or - (standard input).
func (a *app) dataFlag(flag, value string, limit int64) ([]byte, error) {
	path, isPath := strings.CutPrefix(value, "@")
	if value == "-" {
		path, isPath = "-", true
	}
	if !isPath {
		if int64(len(value)) > limit {
			return nil, usagef("%s is larger than %s", flag, size(uint64(limit)))
		}
		return []byte(value), nil
	}
	return a.readInput(path, limit)
}
