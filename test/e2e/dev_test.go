package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestDevCommand starts `wasmatrix dev`, uses it, starts a second one on the
// same ports, and ends the first one in two ways: nothing of it is left.
func TestDevCommand(t *testing.T) {
	binary, guests := harness.Binary(t)
	base := harness.FreePortBase(2)
	for _, end := range []struct {
		name   string
		signal syscall.Signal
	}{{"Ctrl-C", syscall.SIGINT}, {"kill -9", syscall.SIGKILL}} {
		t.Run(end.name, func(t *testing.T) {
			dir := t.TempDir()
			contextPath := filepath.Join(dir, "context.yaml")
			args := []string{"dev", "--nodes", "2", "--port-base", fmt.Sprint(base), "--metrics-port", "0", "--write-context", contextPath}
			env := append(os.Environ(), "TMPDIR="+dir, "WASMATRIX_CONTEXT="+contextPath)
			dev := exec.Command(binary, args...)
			dev.Env = env
			stderr := harness.StartDev(t, dev)
			second := exec.Command(binary, args...)
			second.Env = append(slices.Clone(env), "TMPDIR="+t.TempDir())
			said, err := second.CombinedOutput()
			if err == nil || !strings.Contains(string(said), "is taken") {
				t.Errorf("a second cluster on the same ports: %v\n%s", err, said)
			}
			run := exec.Command(binary, "run", filepath.Join(guests, "hello.wasm"), "--allow", "kv:read", "--allow", "kv:write")
			run.Env = env
			if said, err := run.CombinedOutput(); err != nil {
				t.Errorf("run: %v\n%s", err, said)
			}
			if err := dev.Process.Signal(end.signal); err != nil {
				t.Fatal(err)
			}
			err = dev.Wait()
			if end.signal == syscall.SIGINT && err != nil {
				t.Errorf("the end of dev: %v\n%s", err, stderr.String())
			}
			portsReleased(t, base)
			if end.signal == syscall.SIGINT {
				left, _ := filepath.Glob(filepath.Join(dir, "*"))
				if len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			}
		})
	}
}

// portsReleased waits until nothing listens on the ports of two nodes: the sign
// that all processes have ended.
func portsReleased(t *testing.T, base int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	for _, port := range []int{base, base + 4, base + 100, base + 104} {
		err := harness.Until(ctx, fmt.Sprintf("port %d to be free", port), func(context.Context) error {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				return err
			}
			return l.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
