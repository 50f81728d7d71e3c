package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// newDoctorCommand says what this machine can do as a node.
func newDoctorCommand(env cli.Env) *cobra.Command {
	var configPath string
	var o node.Overrides
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "what this machine can do as a node: virtual machines, and why not",
		Long: `Finds out whether this machine can run instances in virtual machines, by running
one: kernel, init, QEMU and accelerator are looked for, a machine is booted, a
template made of it, and a guest run in a clone. What is missing is named with
the Debian package that brings it, and the next step is told.

Where microvm.accel is auto or kvm and KVM does not work, it says too whether
emulation would, which has to be asked for. It talks to no cluster and needs no
certificate; run it as the user that the node runs as. The exit code is 0 when
the runtime microvm works as configured, else 1.`,
		Example: "  wasmatrix doctor\n  wasmatrix doctor --microvm-accel tcg\n  wasmatrix doctor --config node.yaml -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := node.LoadConfig(configPath, env.Getenv)
			if err != nil {
				return cli.Usage(err)
			}
			o.Apply(&cfg)
			if err := cfg.MicroVM.Check(); err != nil {
				return cli.Usage(err)
			}
			form, err := cmd.Flags().GetString("output")
			if err != nil {
				return err
			}
			return diagnose(cmd, env.Stdout, cfg.MicroVM, form)
		},
	}
	cmd.Flags().StringVar(&configPath, "config", "", "configuration file of the node (YAML)")
	bindAccel(cmd, &o)
	return cmd
}

func diagnose(cmd *cobra.Command, out io.Writer, c node.MicroVMConfig, form string) error {
	tell := func(f node.Finding) { tellFinding(out, f) }
	switch form {
	case "json":
		tell = func(node.Finding) {}
	case "table":
	default:
		return cli.Usage(fmt.Errorf("--output %q: doctor knows table and json", form))
	}
	d := node.Diagnose(cmd.Context(), c, tell)
	if form == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(d); err != nil {
			return err
		}
	} else {
		summarise(out, d)
	}
	if err := cmd.Context().Err(); err != nil {
		return errors.Join(errors.New("the diagnosis was broken off"), err)
	}
	if !d.Works {
		return cli.ExitWith(1)
	}
	return nil
}

func tellFinding(out io.Writer, f node.Finding) {
	mark := "ok"
	if !f.OK {
		mark = "no"
	}
	_, _ = fmt.Fprintf(out, "%-3s %-9s %s\n", mark, f.Name, f.Detail) // there is nowhere to tell of it
}

func summarise(out io.Writer, d node.Diagnosis) {
	if d.Works {
		fmt.Fprintf(out, "this machine offers the runtime microvm with microvm.accel %s: isolation %s\n", d.Accel, d.Isolation)
		return
	}
	fmt.Fprintf(out, "this machine does not offer the runtime microvm with microvm.accel %s\n", d.Accel)
	for _, step := range d.Next {
		fmt.Fprintf(out, "  next: %s\n", step)
	}
}
