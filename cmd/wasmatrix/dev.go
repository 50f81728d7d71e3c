package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// readyWithin bounds the start of a development cluster.
const readyWithin = 60 * time.Second

// logLines is how much is shown of the log of a node that ended by itself.
const logLines = 15

func newDevCommand(env cli.Env) *cobra.Command {
	// Each node needs a loopback address of its own, which only Linux has without set-up.
	o := dev.Options{Breakable: runtime.GOOS == "linux"}
	var contextPath string
	// The variables that make sense for a whole cluster; the others of a node's do not.
	chosen := node.Overrides{Runtime: env.Getenv(node.EnvRuntime), Accel: env.Getenv(node.EnvAccel)}
	var flags node.Overrides
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "run a whole cluster on this machine: real processes, loopback only, throw-away CA",
		Long: `Starts a cluster of real processes on loopback under a CA of its own, writes a
client context so that every other command finds it, and runs until Ctrl-C.
Providers are there from the start: "kv" for key-value, "bus" for messages, "web"
for outbound HTTP. "wasmatrix chaos" breaks the cluster on purpose while it runs.

WASM_RUNTIME_BACKEND and WASMATRIX_MICROVM_ACCEL hold for its nodes, as --runtime
and --microvm-accel do. Without --persist everything is gone afterwards.`,
		Example: "  wasmatrix dev --nodes 3\n  wasmatrix dev --nodes 3 --persist ./cluster --port-base 8400",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Adjust = func(_ int, cfg *node.Config) {
				chosen.Apply(cfg)
				flags.Apply(cfg)
			}
			return runDev(cmd.Context(), env, o, contextPath)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Nodes, "nodes", 1, "how many nodes, 1 to 9")
	f.StringVar(&o.Dir, "persist", "", "keep the cluster in this directory and go on from it next time")
	f.IntVar(&o.PortBase, "port-base", 7400, "port base of the first node; the others follow 100 apart")
	f.IntVar(&o.MetricsPort, "metrics-port", 9100, "port of the first node's /metrics; 0 turns them off")
	f.StringVar(&o.LogLevel, "node-log-level", "info", "log level of the nodes: debug, info, warn, error")
	f.StringVar(&contextPath, "write-context", "", "where to write the client context (default: where the CLI looks)")
	bindOverrides(cmd, &flags)
	return cmd
}

func runDev(ctx context.Context, env cli.Env, o dev.Options, contextPath string) (err error) {
	began := time.Now()
	if o.Binary, err = os.Executable(); err != nil {
		return err
	}
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "wasmatrix-dev-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	} else if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	if contextPath == "" {
		if contextPath, err = client.DefaultContextPath(env.Getenv); err != nil {
			return cli.Usage(fmt.Errorf("no place for the client context (%w): name a file with --write-context", err))
		}
	}
	c, err := dev.Create(o)
	if err != nil {
		return cli.Usage(err)
	}
	// Once, for all nodes are alike.
	if err := node.CheckMicroVM(ctx, c.Nodes()[0].Config); err != nil {
		return errors.Join(cli.Usage(err), c.Close())
	}
	if err := c.CheckPorts(); err != nil {
		return errors.Join(cli.Usage(err), c.Close())
	}
	if err := c.SaveContext(contextPath); err != nil {
		return errors.Join(cli.Usage(fmt.Errorf("%w; choose another file with --write-context", err)), c.Close())
	}
	defer func() {
		fmt.Fprintln(env.Stderr, "shutting down")
		err = errors.Join(err, c.Close(), c.RemoveContext(contextPath))
	}()
	if err := c.Start(); err != nil {
		return err
	}
	cl, err := c.Client()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cl.Close()) }()
	fmt.Fprintf(env.Stdout, "wasmatrix %s · dev cluster, %s, loopback only, throw-away CA · not for production\n", cli.Version, nodes(o.Nodes))
	readyCtx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	status, err := c.WaitReady(readyCtx, cl)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	fmt.Fprintf(env.Stdout, "  api %s · health %s · leader %s · ready in %.1fs\n",
		strings.Join(c.Addresses(), " "), "http://"+c.Nodes()[0].Config.HTTPAddress()+"/readyz?verbose", status.LeaderId, time.Since(began).Seconds())
	fmt.Fprintf(env.Stdout, "  context %s · data %s\n", contextPath, o.Dir)
	return watchNodes(ctx, env, c)
}

// watchNodes serves requests to break the cluster and waits for Ctrl-C; it tells
// of nodes that end by themselves, and gives up when that leaves none.
func watchNodes(ctx context.Context, env cli.Env, c *dev.Cluster) error {
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- c.ServeControl(ctx) }()
	err := func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case err := <-served:
				served <- nil
				return err
			case n := <-c.Ended():
				fmt.Fprintf(env.Stderr, "%s ended; the end of its log %s:\n%s", n.Name(), n.LogPath, dev.Tail(n.LogPath, logLines))
				if !anyRuns(c) {
					return errors.New("all nodes have ended")
				}
			}
		}
	}()
	cancel()
	return errors.Join(err, <-served)
}

func anyRuns(c *dev.Cluster) bool {
	return slices.ContainsFunc(c.Nodes(), func(n *dev.Node) bool {
		_, err := n.PID()
		return err == nil
	})
}

func nodes(n int) string {
	if n == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", n)
}

func newInternalCommand(env cli.Env) *cobra.Command {
	cmd := &cobra.Command{Use: "internal", Short: "processes that wasmatrix starts itself", Hidden: true}
	var configPath string
	var o node.Overrides
	agent := &cobra.Command{
		Use: "agent", Short: "the agent process beside a peer", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := node.LoadConfig(configPath, env.Getenv)
			if err == nil {
				o.Apply(&cfg)
				err = cfg.Complete()
			}
			if err != nil {
				return cli.Usage(err)
			}
			return node.RunAgent(cmd.Context(), cfg, node.Options{ConfigPath: configPath, Log: node.NewLogger(env.Stderr, cfg.Telemetry.Log)})
		},
	}
	agent.Flags().StringVar(&configPath, "config", "", "configuration file")
	bindOverrides(agent, &o)
	compile := &cobra.Command{
		Use: "compile", Short: "compile a module into the cache", DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if code := node.CompileMain(args, env.Stdin, env.Stderr); code != 0 {
				return cli.ExitWith(code)
			}
			return nil
		},
	}
	cmd.AddCommand(agent, compile)
	return cmd
}
