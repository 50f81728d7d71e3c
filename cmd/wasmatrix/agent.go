package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

func newAgentCommand(env cli.Env) *cobra.Command {
	var configPath string
	var standalone bool
	var o node.Overrides
	cmd := &cobra.Command{
		Use:   "agent --config FILE",
		Short: "run this machine's node: a control-plane peer, a worker, or both",
		Long: `Runs this machine's node until it is told to stop (SIGTERM or Ctrl-C).

The configuration file says what the node is: node.role "server" is a
control-plane peer, "worker" an agent that runs instances, "both" is a peer with
an agent as a process of its own beside it. With --standalone it is an agent
without any control plane: instances are started through the agent's own API.

docs/configuration.md lists every key; the environment variables WASMATRIX_*,
METRICS_ADDR and WASM_RUNTIME_BACKEND win over the file, and flags over both.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := node.LoadConfig(configPath, env.Getenv)
			if err != nil {
				return cli.Usage(err)
			}
			if standalone {
				cfg.Node.Role = node.RoleStandalone
			}
			o.Apply(&cfg)
			if err := cfg.Complete(); err != nil {
				return cli.Usage(fmt.Errorf("the configuration is not usable:\n%w", err))
			}
			err = node.Run(cmd.Context(), cfg, node.Options{ConfigPath: configPath, Overrides: o, Log: node.NewLogger(env.Stderr, cfg.Telemetry.Log)})
			if errors.Is(err, node.ErrCertificate) || errors.Is(err, node.ErrAgentRuns) || errors.Is(err, node.ErrPort) || errors.Is(err, node.ErrMicroVM) {
				return cli.Usage(err)
			}
			switch {
			case errors.Is(err, cluster.ErrCorrupt), errors.Is(err, cluster.ErrDiverged), errors.Is(err, cluster.ErrOtherCluster):
				return cli.Stopped(cli.ExitDamaged, err)
			case cluster.IsDiskFailure(err):
				return cli.Stopped(cli.ExitDisk, err)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&configPath, "config", "", "configuration file (YAML)")
	cmd.Flags().BoolVar(&standalone, "standalone", false, "run an agent without a control plane")
	bindOverrides(cmd, &o)
	return cmd
}
