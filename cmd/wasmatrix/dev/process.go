package dev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// stopGrace is how long a node may take to shut down; then it is killed.
const stopGrace = 30 * time.Second

// ErrNotRunning is returned for a node that has no process.
var ErrNotRunning = errors.New("node is not running")

// Node is one node of a development cluster: a peer process and its agent.
type Node struct {
	// Config is the node's configuration.
	Config node.Config
	// LogPath is the file that takes the output of the node's processes.
	LogPath string

	argv     []string // what runs the peer
	env      []string // entries of its environment
	lifeline *os.File
	ended    chan<- *Node // told when the peer process ends by itself

	mu      sync.Mutex
	cmd     *exec.Cmd
	exited  chan struct{} // closed when cmd has been reaped; then its state is set
	planned bool          // the process is ended on purpose
}

// Name returns the node's id.
func (n *Node) Name() string { return n.Config.Node.Name }

// Start starts the node's peer process, which starts or adopts its agent.
func (n *Node) Start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running() {
		return fmt.Errorf("start %s: it runs already, pid %d", n.Name(), n.cmd.Process.Pid)
	}
	if err := os.MkdirAll(filepath.Dir(n.LogPath), 0o700); err != nil {
		return fmt.Errorf("start %s: %w", n.Name(), err)
	}
	log, err := os.OpenFile(n.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", n.Name(), err)
	}
	defer log.Close()
	cmd := exec.Command(n.argv[0], n.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.ExtraFiles = []*os.File{n.lifeline}
	cmd.Env = append(append(nodeEnv(os.Environ()), node.LifelineEnv(3)), n.env...)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.Name(), err)
	}
	n.cmd, n.exited, n.planned = cmd, make(chan struct{}), false
	go func(exited chan struct{}) {
		_ = cmd.Wait() // its state says the same
		close(exited)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.cmd == cmd && !n.planned {
			select {
			case n.ended <- n:
			default: // nobody listens
			}
		}
	}(n.exited)
	return nil
}

// killPlanned ends the node with end; that is not told as an end by itself.
func (n *Node) killPlanned(end func() error) error {
	n.mu.Lock()
	n.planned = true
	n.mu.Unlock()
	return end()
}

// nodeEnv leaves out of an environment what would win over a node's
// configuration file: those variables are the user's own, for another node or
// for the client.
func nodeEnv(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return strings.HasPrefix(name, "WASMATRIX_") || name == "METRICS_ADDR" || name == "WASM_RUNTIME_BACKEND"
	})
}

// running reports whether the peer process lives. The caller holds n.mu.
func (n *Node) running() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// Exited returns a channel that is closed when the present peer process has
// ended, and nil when none was started.
func (n *Node) Exited() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.exited
}

// PID returns the id of the peer process, or ErrNotRunning.
func (n *Node) PID() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running() {
		return 0, fmt.Errorf("%s: %w", n.Name(), ErrNotRunning)
	}
	return n.cmd.Process.Pid, nil
}

// AgentPID returns the id of the agent process, or ErrNotRunning.
func (n *Node) AgentPID() (int, error) {
	pid, ok := node.AgentPID(n.Config.DataDir)
	if !ok {
		return 0, fmt.Errorf("agent of %s: %w", n.Name(), ErrNotRunning)
	}
	return pid, nil
}

// SignalPeer sends a signal to the peer process only; its agent goes on.
func (n *Node) SignalPeer(sig syscall.Signal) error {
	pid, err := n.PID()
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

// SignalAgent sends a signal to the agent process only.
func (n *Node) SignalAgent(sig syscall.Signal) error {
	pid, err := n.AgentPID()
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

// KillPeer ends the peer process with SIGKILL and waits until it is gone.
func (n *Node) KillPeer() error {
	if err := n.SignalPeer(syscall.SIGKILL); err != nil {
		return err
	}
	<-n.Exited()
	return nil
}

// Kill ends the peer and the agent with SIGKILL, as a power cut would.
func (n *Node) Kill() error {
	return errors.Join(ignoreNotRunning(n.KillPeer()), n.killAgent(syscall.SIGKILL))
}

// Stop asks the node to shut down and waits; what does not end in time is
// killed. An agent that a killed peer left behind is ended too: the cluster holds
// its directory, so that it is nobody else's.
func (n *Node) Stop(ctx context.Context) error {
	err := ignoreNotRunning(n.SignalPeer(syscall.SIGTERM))
	if exited := n.Exited(); exited != nil {
		timer := time.NewTimer(stopGrace)
		defer timer.Stop()
		select {
		case <-exited:
		case <-ctx.Done():
			err = errors.Join(err, ctx.Err(), n.KillPeer())
		case <-timer.C:
			err = errors.Join(err, fmt.Errorf("%s did not shut down within %s and was killed", n.Name(), stopGrace), n.KillPeer())
		}
	}
	return errors.Join(err, n.killAgent(syscall.SIGTERM))
}

// killAgent ends an agent without a peer and waits until it is gone.
func (n *Node) killAgent(sig syscall.Signal) error {
	err := ignoreNotRunning(n.SignalAgent(sig))
	timer := time.AfterFunc(stopGrace, func() { _ = n.SignalAgent(syscall.SIGKILL) })
	defer timer.Stop()
	return errors.Join(err, node.WaitAgentGone(n.Config.DataDir))
}

func ignoreNotRunning(err error) error {
	if errors.Is(err, ErrNotRunning) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}
