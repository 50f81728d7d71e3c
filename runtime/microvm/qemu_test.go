//go:build linux && amd64

package microvm_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/survey"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// builtInit builds the init once for all tests.
var builtInit = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "microvm-init-")
	if err != nil {
		return "", err
	}
	leftovers = append(leftovers, dir)
	out := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the init: %w\n%s", err, text)
	}
	return out, nil
})

// identities is the first of the ids that machines get.
const identities = 1_900_000_000

// onQEMU makes a runtime on real virtual machines under TCG. Its bounds on time
// suit a machine that is busy with much else.
func onQEMU(t testing.TB, change ...func(*microvm.Config)) *microvm.Runtime {
	t.Helper()
	return onDriver(t, func(d vmm.Driver) vmm.Driver { return d }, change...)
}

// onDriver is onQEMU with another driver around the real one.
func onDriver(t testing.TB, wrap func(vmm.Driver) vmm.Driver, change ...func(*microvm.Config)) *microvm.Runtime {
	t.Helper()
	init, err := builtInit()
	if err != nil {
		t.Fatal(err)
	}
	var s survey.Survey
	options := survey.Options{Accelerator: survey.TCG, Init: init}
	if os.Geteuid() == 0 {
		options.Identities = identities
	}
	driver, err := s.Open(t.Context(), options)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	slow := func(c *microvm.Config) {
		c.BootTimeout, c.CloneTimeout, c.CompileTimeout, c.Overtime = time.Minute, time.Minute, 3*time.Minute, time.Minute
		c.Starting = 2
	}
	return open(t, wrap(driver), append([]func(*microvm.Config){slow}, change...)...)
}

// TestConformance runs the suite on real virtual machines.
func TestConformance(t *testing.T) {
	r := onQEMU(t)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if err := r.Warm(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("base template after %v", time.Since(began))
	runtimetest.Run(t, func(*testing.T) runtime.Runtime { return r })
}
