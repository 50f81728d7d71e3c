package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// ErrAgentRuns is returned when another agent process holds the data directory.
var ErrAgentRuns = errors.New("an agent already runs on this data directory")

func agentLockPath(dataDir string) string { return filepath.Join(dataDir, "agent", "agent.lock") }

// lockAgent takes the agent's lock and writes this process's id into it. The
// kernel releases it however the process ends. The caller closes the file.
func lockAgent(dataDir string) (*os.File, error) {
	path := agentLockPath(dataDir)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lock the agent: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the agent: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := AgentPID(dataDir)
		return nil, errors.Join(fmt.Errorf("%w (pid %d, %s)", ErrAgentRuns, pid, path), f.Close())
	}
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		if err == nil {
			return f, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("lock the agent: write %s", path), f.Close())
}

// AgentPID returns the process id of the agent that runs on dataDir. It reports
// false when none does.
func AgentPID(dataDir string) (int, bool) {
	f, err := os.Open(agentLockPath(dataDir))
	if err != nil {
		return 0, false
	}
	defer f.Close()
	if syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil {
		return 0, false
	}
	raw := make([]byte, 32)
	n, _ := f.ReadAt(raw, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw[:n])))
	return pid, err == nil && pid > 1
}

// WaitAgentGone blocks until no agent runs on dataDir: the lock is its sign of
// life, so that also an agent of another parent can be waited for.
func WaitAgentGone(dataDir string) error {
	f, err := os.Open(agentLockPath(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("wait for the agent: %w", err)
	}
	defer f.Close()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
