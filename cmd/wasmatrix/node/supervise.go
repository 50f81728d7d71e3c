package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// agentGrace is how long an agent may take to end its instances; then it is killed.
const agentGrace = 20 * time.Second

// agentSupervisor keeps one agent process running beside a peer. It adopts an
// agent that an earlier peer left behind, so that the death of a peer stops no
// instance.
type agentSupervisor struct {
	dataDir  string
	argv     []string
	lifeline *os.File
	log      *slog.Logger
}

// Run keeps the agent running until ctx ends, then ends it and waits for it.
func (s *agentSupervisor) Run(ctx context.Context) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 200*time.Millisecond, 10*time.Second
	for ctx.Err() == nil {
		began := time.Now()
		err := s.runOne(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > time.Minute {
			wait.Reset()
		}
		pause := wait.NextBackOff()
		s.log.Error("agent process ended", "error", err, "restart_in", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// runOne runs or adopts one agent process and returns when it has ended.
func (s *agentSupervisor) runOne(ctx context.Context) error {
	if pid, running := AgentPID(s.dataDir); running {
		s.log.Info("adopted the agent that runs already", "pid", pid)
		return s.watch(ctx, pid, func() error { return WaitAgentGone(s.dataDir) })
	}
	cmd := exec.Command(s.argv[0], s.argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// A process group of its own: a Ctrl-C at the terminal must reach the peer
	// only, which then ends the agent in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if s.lifeline != nil {
		cmd.ExtraFiles = []*os.File{s.lifeline}
		cmd.Env = append(os.Environ(), LifelineEnv(3))
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	s.log.Info("agent process started", "pid", cmd.Process.Pid)
	return s.watch(ctx, cmd.Process.Pid, cmd.Wait)
}

// watch waits for the process to end; once ctx ends it asks it to, and after
// the grace period makes it.
func (s *agentSupervisor) watch(ctx context.Context, pid int, wait func() error) error {
	gone := make(chan error, 1)
	go func() { gone <- wait() }()
	select {
	case err := <-gone:
		return err
	case <-ctx.Done():
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		s.log.Warn("ask the agent to end", "pid", pid, "error", err)
	}
	select {
	case err := <-gone:
		return err
	case <-time.After(agentGrace):
		s.log.Warn("agent did not end in time: killed", "pid", pid, "grace", agentGrace)
		_ = syscall.Kill(pid, syscall.SIGKILL)
		return <-gone
	}
}
