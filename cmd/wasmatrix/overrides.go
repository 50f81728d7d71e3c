package main

import (
	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// bindOverrides adds the flags of what wins over a node's configuration.
func bindOverrides(cmd *cobra.Command, o *node.Overrides) {
	cmd.Flags().StringVar(&o.Runtime, node.FlagRuntime, "", "runtime of workloads that name none: wasm or microvm (default: runtime.default, else wasm)")
	bindAccel(cmd, o)
}

func bindAccel(cmd *cobra.Command, o *node.Overrides) {
	cmd.Flags().StringVar(&o.Accel, node.FlagAccel, "", "what runs virtual machines: auto (KVM if it works), kvm, tcg (emulation), off (default: microvm.accel, else auto)")
}
