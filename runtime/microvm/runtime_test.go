package microvm_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.Cleanup(cleanUp)) }

func quietLog() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// open makes a runtime on a driver that is closed with the test.
func open(t testing.TB, driver vmm.Driver, change ...func(*microvm.Config)) *microvm.Runtime {
	t.Helper()
	config := microvm.Config{Driver: driver, Isolation: vmm.Emulated, Logger: quietLog(), Spares: -1}
	for _, c := range change {
		c(&config)
	}
	r, err := microvm.New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Errorf("closing the runtime: %v", err)
		}
	})
	return r
}

// TestConformanceOfTheConversation runs the suite with everything of this package
// but the virtual machine.
func TestConformanceOfTheConversation(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtime.Runtime { return open(t, newFakeDriver(t)) })
}

// cleanUp removes what tests have built for all of them.
func cleanUp(code int) {
	for _, dir := range leftovers {
		if err := os.RemoveAll(dir); err != nil {
			code = 1
		}
	}
	os.Exit(code)
}

// leftovers are directories that outlast a test.
var leftovers []string
