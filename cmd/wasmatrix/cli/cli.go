package cli

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wasmatrix/wasmatrix/correlation"
)

// Version is the version of the binary; the build sets it.
var Version = "unknown"

// Env is what a command line has around it. Tests set every part.
type Env struct {
	// Stdin, Stdout and Stderr are the standard streams.
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Getenv reads an environment variable.
	Getenv func(string) string
	// Now reads the clock, for ages and durations; nil means time.Now.
	Now func() time.Time
}

// OSEnv returns the environment of this process.
func OSEnv() Env {
	return Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now}
}

// app is the state of one command line.
type app struct {
	env    Env
	global globalFlags
	began  time.Time
}

// globalFlags are the flags that every command has.
type globalFlags struct {
	addresses     []string
	context       string
	timeout       time.Duration
	output        string
	correlationID string
	verbose       bool
}

// The groups of the root command's help.
const (
	groupWorkloads = "workloads"
	groupCluster   = "cluster"
	groupMore      = "more"
)

// New returns the root command with all commands of this package. The caller
// may add further ones before it hands the root to Execute.
func New(env Env) *cobra.Command {
	if env.Now == nil {
		env.Now = time.Now
	}
	a := &app{env: env}
	root := &cobra.Command{
		Use:   "wasmatrix",
		Short: "a fault-tolerant cluster for untrusted WebAssembly workloads",
		Long: `wasmatrix runs untrusted WebAssembly workloads on a cluster of machines.

Try it:  wasmatrix dev --nodes 3     and in a second terminal
         wasmatrix run hello.wasm --allow kv:read

Exit codes: 0 ok · 1 internal · 2 usage or invalid request · 3 not found or
ambiguous · 4 conflict · 5 denied · 6 no leader or unreachable · 7 timeout or
degraded · 8 workload failed · 9 not placeable`,
		Version:           Version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	f := root.PersistentFlags()
	f.StringSliceVar(&a.global.addresses, "address", nil, "API address of a peer, host:port (repeatable; default: those of the context)")
	f.StringVar(&a.global.context, "context", "", "context file, or the name of a context (default: $WASMATRIX_CONTEXT, then \"default\")")
	f.DurationVar(&a.global.timeout, "timeout", 0, "longest time of one call, retries included (default 15s)")
	f.StringVarP(&a.global.output, "output", "o", "table", "form of the output: table, json, yaml, name")
	f.StringVar(&a.global.correlationID, "correlation-id", "", "id that marks everything this command causes (default: a new one)")
	f.BoolVarP(&a.global.verbose, "verbose", "v", false, "tell on standard error what is tried")
	root.AddGroup(
		&cobra.Group{ID: groupWorkloads, Title: "Workloads:"},
		&cobra.Group{ID: groupCluster, Title: "The cluster:"},
		&cobra.Group{ID: groupMore, Title: "More:"},
	)
	add(root, groupWorkloads, a.newRun(), a.newApply(), a.newValidate(), a.newDelete(), a.newPS(), a.newInstance(), a.newInvoke(),
		a.newLogs(), a.newWait(), a.newExplain(), a.newGrant(), a.newRevoke(), a.newCan(), a.newModule())
	add(root, groupCluster, a.newStatus(), a.newNode(), a.newProvider(), a.newKV(), a.newMsg(), a.newEvents(), a.newCluster(), a.newChaos())
	add(root, groupMore, a.newContext(), a.newDocs(), a.newVersion())
	root.SetHelpCommandGroupID(groupMore)
	root.SetCompletionCommandGroupID(groupMore)
	return root
}

func add(parent *cobra.Command, group string, cmds ...*cobra.Command) {
	for _, c := range cmds {
		c.GroupID = group
		parent.AddCommand(c)
	}
}

// Execute runs the command line that the process was started with, or that
// cmd.SetArgs gave, prints its failure, and returns the exit code.
func Execute(ctx context.Context, cmd *cobra.Command, env Env) int {
	cmd.SetIn(env.Stdin)
	cmd.SetOut(env.Stdout)
	cmd.SetErr(env.Stderr)
	harden(cmd)
	// The id is made here, so that also an error without a server's answer has it.
	ctx, _ = correlation.Ensure(ctx)
	ran, err := cmd.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	form := ""
	if f := ran.Flags().Lookup("output"); f != nil {
		form = f.Value.String()
	}
	return report(ran.Context(), env, form, err)
}

// elapsed is how long the command has run.
func (a *app) elapsed() time.Duration { return a.env.Now().Sub(a.began) }

// prepare checks the global flags and puts the correlation id into the
// command's context.
func (a *app) prepare(cmd *cobra.Command) error {
	a.began = a.env.Now()
	switch a.global.output {
	case formTable, formJSON, formYAML, formName:
	default:
		return usagef("unknown output form %q: want table, json, yaml or name", a.global.output)
	}
	if id := a.global.correlationID; id != "" {
		if !correlation.Valid(id) {
			return usagef("--correlation-id %q: want 1 to 128 printable characters without spaces", id)
		}
		cmd.SetContext(correlation.With(cmd.Context(), id))
	}
	if a.global.timeout < 0 {
		return usagef("--timeout %s is negative", a.global.timeout)
	}
	return nil
}

// terminal reports whether a stream is a terminal.
func terminal(stream any) bool {
	f, ok := stream.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(f.Fd()))
}
