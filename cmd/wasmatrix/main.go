// Command wasmatrix is the whole product: control-plane peer, agent and client
// in one binary.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

func main() { os.Exit(run()) }

func run() int {
	node.BecomeInit(os.Args[1:])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	env := cli.OSEnv()
	cli.Version = node.Version
	root := cli.New(env)
	for _, c := range root.Commands() {
		if c.Name() == "cluster" {
			c.AddCommand(newCACommand(env), newRecoverCommand(env))
		}
	}
	root.AddCommand(newDevCommand(env), newAgentCommand(env), newDoctorCommand(env), newInternalCommand(env))
	return cli.Execute(ctx, root, env)
}
