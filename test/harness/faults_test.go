//go:build linux

package harness

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// syncerVariable makes the test binary a process that syncs the named file for
// ever and keeps the last outcome beside it.
const syncerVariable = "WASMATRIX_TEST_SYNCER"

func TestMain(m *testing.M) {
	if path := os.Getenv(syncerVariable); path != "" {
		syncForEver(path)
	}
	os.Exit(m.Run())
}

func syncForEver(path string) {
	f, err := os.Create(path)
	if err != nil {
		panic(err)
	}
	for n := 0; ; n++ {
		began := time.Now()
		err := f.Sync()
		text := strconv.Itoa(n) + " " + strconv.FormatBool(err == nil) + " " + strconv.FormatInt(time.Since(began).Milliseconds(), 10)
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			panic(err)
		}
		if err := os.Rename(path+".new", path+".last"); err != nil {
			panic(err)
		}
		time.Sleep(time.Millisecond) // paces the process under test, nothing waits for it
	}
}

// syncer runs a process that syncs for ever and returns its id and how to wait
// for an outcome of a sync.
func syncer(t *testing.T) (pid int, wait func(what string, want func(ok bool, took time.Duration) bool)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), syncerVariable+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	wait = func(what string, want func(ok bool, took time.Duration) bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err := Until(ctx, what, func(context.Context) error {
			raw, err := os.ReadFile(path + ".last")
			if err != nil {
				return err
			}
			fields := strings.Fields(string(raw))
			ms, err := strconv.Atoi(fields[2])
			if err != nil {
				return err
			}
			if !want(fields[1] == "true", time.Duration(ms)*time.Millisecond) {
				return errors.New("the last sync was " + string(raw))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	wait("a sync", func(ok bool, _ time.Duration) bool { return ok })
	return cmd.Process.Pid, wait
}

func TestSyncsFailAndAreSlowWhileTheyShall(t *testing.T) {
	pid, wait := syncer(t)
	well := func(ok bool, took time.Duration) bool { return ok && took < 250*time.Millisecond }
	stop := FailSync(t, pid)
	wait("a sync to fail", func(ok bool, _ time.Duration) bool { return !ok })
	stop()
	wait("a sync to work again", well)
	stop = SlowSync(t, pid, 300*time.Millisecond)
	wait("a slow sync", func(ok bool, took time.Duration) bool { return ok && took >= 300*time.Millisecond })
	stop()
	wait("a sync at its old pace", well)
}

func TestAPausedProcessStands(t *testing.T) {
	pid, _ := syncer(t)
	Pause(t, pid)
	if err := stands(pid); err != nil {
		t.Errorf("it was paused: %v", err)
	}
	Resume(t, pid)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := Until(ctx, "the process to go on", func(context.Context) error {
		if stands(pid) == nil {
			return errors.New("it stands")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestATmpfsGetsFull(t *testing.T) {
	dir := Tmpfs(t, 1<<20)
	if err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 512<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b"), make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write more than it holds: %v, want ENOSPC", err)
	}
}
