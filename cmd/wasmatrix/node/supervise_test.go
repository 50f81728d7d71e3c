package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// agentVariable makes the test binary behave as an agent: it takes the lock of
// the named data directory and holds it until it is told to end.
const agentVariable = "WASMATRIX_TEST_AGENT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(agentVariable); dir != "" {
		if _, err := lockAgent(dir); err != nil {
			os.Exit(1)
		}
		select {} // SIGTERM ends it, and with it the lock
	}
	os.Exit(m.Run())
}

func TestTheAgentLockHoldsOffASecondOne(t *testing.T) {
	dir := t.TempDir()
	if _, running := AgentPID(dir); running {
		t.Fatal("an agent runs on an empty directory")
	}
	lock, err := lockAgent(dir)
	if err != nil {
		t.Fatal(err)
	}
	if pid, running := AgentPID(dir); !running || pid != os.Getpid() {
		t.Fatalf("AgentPID = %d, %v, want this process", pid, running)
	}
	if _, err := lockAgent(dir); !errors.Is(err, ErrAgentRuns) {
		t.Fatalf("a second lock: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if err := WaitAgentGone(dir); err != nil {
		t.Fatal(err)
	}
	if _, running := AgentPID(dir); running {
		t.Fatal("a released lock counts as an agent")
	}
}

// TestASupervisorKeepsItsAgentRunning kills the agent: another is started.
func TestASupervisorKeepsItsAgentRunning(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(agentVariable, dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &agentSupervisor{dataDir: dir, argv: []string{self}, log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	pid := waitAgent(t, dir, 0)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitAgent(t, dir, pid)
	cancel()
	<-done
	if pid, running := AgentPID(dir); running {
		t.Fatalf("agent %d outlived its supervisor", pid)
	}
}

// TestAnAgentIsAdopted starts a supervisor beside an agent of another parent, as
// the peer after a killed one does: it starts none, and ends that one.
func TestAnAgentIsAdopted(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(self)
	agent.Env = append(os.Environ(), agentVariable+"="+dir)
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	waitAgent(t, dir, 0)
	said := make(chan string, 16)
	s := &agentSupervisor{dataDir: dir, argv: []string{"/nonexistent"}, log: slog.New(slog.NewTextHandler(lines(said), nil))}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	if line := <-said; !strings.Contains(line, "adopted") {
		t.Fatalf("the supervisor says %q", line)
	}
	cancel()
	err = agent.Wait()
	<-done
	if status, ok := agent.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGTERM {
		t.Fatalf("the adopted agent ended with %v, want SIGTERM", err)
	}
}

// lines sends each write to a channel.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// waitAgent waits for an agent with another process id than not.
func waitAgent(t *testing.T, dir string, not int) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if pid, running := AgentPID(dir); running && pid != not {
			return pid
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no agent on %s other than %d", dir, not)
		}
	}
}
