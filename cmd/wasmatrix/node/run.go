package node

import (
	"context"
	"log/slog"
	"os"
)

// Version is the version of the binary; the linker sets it.
var Version = "unknown"

// Options are what a node needs besides its configuration.
type Options struct {
	// ConfigPath is the file the configuration came from; the agent process of a
	// node with both roles reads it again.
	ConfigPath string
	// Overrides were applied to the configuration; the agent process needs them too.
	Overrides Overrides
	// Log takes the node's log.
	Log *slog.Logger
}

// Run runs the node until ctx ends or something it cannot do without fails. It
// returns nil after an orderly stop.
func Run(ctx context.Context, cfg Config, o Options) error {
	if cfg.Node.Role == RoleWorker || cfg.Node.Role == RoleStandalone {
		return RunAgent(ctx, cfg, o)
	}
	ctx, lifeline, err := Lifeline(ctx)
	if err != nil {
		return err
	}
	if cfg.Node.Role == RoleBoth {
		// The agent is another process, whose failures only the log tells.
		if err := CheckMicroVM(ctx, cfg); err != nil {
			return err
		}
	}
	p, err := newPeerProcess(cfg, o.Log)
	if err != nil {
		return err
	}
	if cfg.Node.Role == RoleServer {
		return p.Run(ctx, func() {})
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := append([]string{self, "internal", "agent"}, o.Overrides.args()...)
	if o.ConfigPath != "" {
		argv = append(argv, "--config", o.ConfigPath)
	}
	return runBoth(ctx, p, &agentSupervisor{dataDir: cfg.DataDir, argv: argv, lifeline: lifeline, log: p.log})
}

// runBoth runs a peer with an agent process beside it. The agent starts once the
// peer has its ports and files, so that a second node on the same data touches
// nothing. At a planned stop the agent ends first, while its last reports still
// reach a peer; when the peer fails, the agent goes on and the next peer adopts it.
func runBoth(ctx context.Context, p *peerProcess, s *agentSupervisor) error {
	peerCtx, stopPeer := context.WithCancel(context.WithoutCancel(ctx))
	defer stopPeer()
	opened, peerDone := make(chan struct{}), make(chan error, 1)
	go func() { peerDone <- p.Run(peerCtx, func() { close(opened) }) }()
	select {
	case err := <-peerDone:
		return err
	case <-opened:
	}
	agentDone := make(chan struct{})
	go func() {
		defer close(agentDone)
		s.Run(ctx)
	}()
	select {
	case err := <-peerDone:
		return err
	case <-agentDone:
		stopPeer()
		return <-peerDone
	}
}

// RunAgent runs this process as the node's agent.
func RunAgent(ctx context.Context, cfg Config, o Options) error {
	ctx, _, err := Lifeline(ctx)
	if err != nil {
		return err
	}
	a, err := newAgentProcess(ctx, cfg, o.Log)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
