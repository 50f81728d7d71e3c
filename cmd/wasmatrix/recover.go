package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// newRecoverCommand brings a cluster back that lost its quorum for good. It works
// on the files of one peer and talks to nobody.
func newRecoverCommand(env cli.Env) *cobra.Command {
	var configPath string
	var yes bool
	cmd := &cobra.Command{
		Use:   "recover --config FILE",
		Short: "after the loss of the quorum for good: make a stopped peer the only voter (files only)",
		Long: `Brings a cluster back when a majority of its peers is lost for good: the stopped
peer of this configuration becomes the only voter, and new peers join it.

It works on the peer's own files: run it on its machine. It says what is there
and asks before it changes anything, keeps a copy of what was there, and refuses
while the peer runs or when its files are damaged.`,
		Example: "  wasmatrix cluster recover --config /etc/wasmatrix/node.yaml",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if configPath == "" {
				return cli.Usage(errors.New("--config is missing: the configuration file of the peer"))
			}
			cfg, err := node.LoadConfig(configPath, env.Getenv)
			if err == nil {
				err = cfg.Complete()
			}
			if err != nil {
				return cli.Usage(err)
			}
			confirm := func(question string) error {
				if yes {
					return nil
				}
				return confirm(env, question)
			}
			if err := node.Recover(cfg, env.Stdout, node.NewLogger(env.Stderr, node.LogConfig{Level: "warn", Format: "text"}), confirm); err != nil {
				return cli.Usage(err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&configPath, "config", "", "configuration file of the peer (YAML)")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// confirm asks at the terminal.
func confirm(env cli.Env, question string) error {
	if f, ok := env.Stdin.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		return fmt.Errorf("%s Say so with --yes", question)
	}
	fmt.Fprintf(env.Stderr, "%s [y/N] ", question)
	answer, err := bufio.NewReader(env.Stdin).ReadString('\n')
	if err != nil || !strings.HasPrefix(strings.ToLower(strings.TrimSpace(answer)), "y") {
		return errors.New("nothing was done")
	}
	return nil
}
