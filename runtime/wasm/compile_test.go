package wasm_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/wasmatrix/wasmatrix/runtime"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// counts returns the values of the counters and the observations of histograms,
// by name and label values.
func counts(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "wasmatrix_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func metricsTo(g *prometheus.Registry) func(*wasm.Config) {
	return func(c *wasm.Config) { c.Registerer = g }
}

func echo(t *testing.T, r *wasm.Runtime, spec runtime.Spec) {
	t.Helper()
	i := rt.Started(t, r, spec, rt.NoHost(t))
	if out, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("hi")); err != nil || string(out) != "hi" {
		t.Fatalf("Invoke = %q, %v", out, err)
	}
	if err := i.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestAModuleIsCompiledOnceAndThenFound(t *testing.T) {
	dir, spec := t.TempDir(), rt.Spec(t, rt.Echo())
	first := prometheus.NewRegistry()
	r := open(t, onDisk(dir), metricsTo(first))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { echo(t, r, spec) })
	}
	wg.Wait()
	echo(t, r, spec)
	got := counts(t, first)
	if got["module_compile_duration_seconds"] != 1 || got["module_cache_lookups_total miss"] != 1 || got["module_cache_lookups_total memory"] != 8 {
		t.Fatalf("nine instances in one process: %v", got)
	}
	second := prometheus.NewRegistry()
	echo(t, open(t, onDisk(dir), metricsTo(second)), spec)
	if got := counts(t, second); got["module_compile_duration_seconds"] != 0 || got["module_cache_lookups_total disk"] != 1 {
		t.Fatalf("the next process: %v", got)
	}
}

func TestTheChildLeavesWhatTheParentLoads(t *testing.T) {
	g := prometheus.NewRegistry()
	r := open(t, inChild(t, time.Minute, 1<<30), metricsTo(g))
	echo(t, r, rt.Spec(t, rt.Echo()))
	if got := counts(t, g); got["module_compile_duration_seconds"] != 1 {
		t.Fatalf("metrics %v", got)
	}
	_, err := r.Prepare(t.Context(), rt.Spec(t, rt.Command(nil, rt.I64Const(0), rt.I32Eqz, rt.Drop)), rt.NoHost(t))
	if !errors.Is(err, runtime.ErrModuleInvalid) || !strings.Contains(err.Error(), "type mismatch") {
		t.Fatalf("a module with a type error: %v", err)
	}
}

// TestEveryDamageOfTheCacheIsNoticed flips a bit in each file of an entry and
// cuts each short: what is executed is compiled again, never what was damaged.
func TestEveryDamageOfTheCacheIsNoticed(t *testing.T) {
	dir, spec := t.TempDir(), rt.Spec(t, rt.Echo())
	echo(t, open(t, onDisk(dir)), spec)
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) != 3 {
		t.Fatalf("an entry of %d files, %v", len(files), err)
	}
	for _, path := range files {
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(good)
		flipped[len(flipped)/2] ^= 4
		early := bytes.Clone(good)
		early[min(20, len(early)-1)] ^= 0x80
		for what, content := range map[string][]byte{"bit flipped": flipped, "header flipped": early, "cut": good[:len(good)/2], "emptied": {}} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			g := prometheus.NewRegistry()
			echo(t, open(t, onDisk(dir), metricsTo(g)), spec)
			if got := counts(t, g); got["module_cache_corruptions_total"] != 1 || got["module_compile_duration_seconds"] != 1 {
				t.Fatalf("%s, %s: %v", filepath.Base(path), what, got)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		echo(t, open(t, onDisk(dir)), spec)
	}
}

func TestTheCacheStaysWithinItsSize(t *testing.T) {
	dir := t.TempDir()
	g := prometheus.NewRegistry()
	r := open(t, onDisk(dir), metricsTo(g), func(c *wasm.Config) { c.CacheBytes, c.IdleModules = 1, -1 })
	for _, binary := range [][]byte{rt.Echo(), rt.Counter(), rt.Trapper()} {
		rt.Prepared(t, r, rt.Spec(t, binary), rt.NoHost(t))
	}
	entries, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil || len(entries) != 1 {
		t.Fatalf("entries %v, %v; want the last one only", entries, err)
	}
}

func TestIdleModulesAreFreed(t *testing.T) {
	g := prometheus.NewRegistry()
	r := open(t, metricsTo(g), func(c *wasm.Config) { c.IdleModules = 2 })
	for _, binary := range [][]byte{rt.Echo(), rt.Counter(), rt.Trapper(), rt.Spinner()} {
		i := rt.Prepared(t, r, rt.Spec(t, binary), rt.NoHost(t))
		if err := i.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := counts(t, g)["modules_loaded"]; got != 2 {
		t.Fatalf("%v modules are loaded, want 2", got)
	}
	spec := rt.Spec(t, rt.Echo())
	a, b := rt.Prepared(t, r, spec, rt.NoHost(t)), rt.Prepared(t, r, spec, rt.NoHost(t))
	if err := a.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context()); err != nil {
		t.Fatalf("a module that is still in use was freed: %v", err)
	}
}

// expensive takes the compiler a time that grows with the square of its size.
func expensive() []byte {
	one := rt.Cat(rt.I32Const(0), rt.I32Const(0), rt.LocalGet(0), rt.MemoryCopy)
	return rt.Command([]byte{rt.I32}, rt.Repeat(100_000, one))
}

func TestACompilationIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		timeout time.Duration
		memory  uint64
		message string
	}{
		"in time":   {2 * time.Second, 4 << 30, "more than 2s"},
		"in memory": {time.Minute, 64 << 20, "more than 64 MiB of memory"},
	} {
		t.Run(name, func(t *testing.T) {
			g := prometheus.NewRegistry()
			r := open(t, inChild(t, c.timeout, c.memory), metricsTo(g))
			spec := rt.Spec(t, expensive())
			for range 2 {
				_, err := r.Prepare(t.Context(), spec, rt.NoHost(t))
				if !errors.Is(err, runtime.ErrModuleInvalid) || !strings.Contains(err.Error(), c.message) {
					t.Fatalf("Prepare: %v", err)
				}
			}
			if got := counts(t, g)["module_refusals_total expensive"]; got != 1 {
				t.Fatalf("it was tried %v times, want once", got)
			}
			echo(t, r, rt.Spec(t, rt.Echo()))
		})
	}
}

func TestPrepareGivesUpWithItsContextAndTheWorkGoesOn(t *testing.T) {
	g := prometheus.NewRegistry()
	r := open(t, onDisk(t.TempDir()), metricsTo(g))
	spec := rt.Spec(t, rt.Echo())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if i, err := r.Prepare(ctx, spec, rt.NoHost(t)); err == nil {
		// It was quick enough after all.
		_ = i.Close(t.Context())
	} else if !errors.Is(err, context.Canceled) {
		t.Fatalf("Prepare: %v", err)
	}
	echo(t, r, spec)
	if got := counts(t, g)["module_compile_duration_seconds"]; got != 1 {
		t.Fatalf("compiled %v times", got)
	}
}

func TestAModuleFileThatIsNotThereIsNotTheModulesFault(t *testing.T) {
	spec := rt.Spec(t, rt.Echo())
	spec.ModulePath += ".gone"
	if _, err := open(t).Prepare(t.Context(), spec, rt.NoHost(t)); err == nil || errors.Is(err, runtime.ErrModuleInvalid) {
		t.Fatalf("Prepare: %v", err)
	}
}

func TestADigestCannotLeaveTheCache(t *testing.T) {
	r := open(t, onDisk(t.TempDir()))
	for _, digest := range []string{"", "sha256:", "sha256:../../../../../../../../../../etc/passwd", "sha256:" + strings.Repeat("/", 64)} {
		spec := rt.Spec(t, rt.Echo())
		spec.Digest = digest
		if _, err := r.Prepare(t.Context(), spec, rt.NoHost(t)); err == nil || !strings.Contains(err.Error(), "digest") {
			t.Fatalf("digest %q: %v", digest, err)
		}
	}
}

func TestMetricsPassTheLinter(t *testing.T) {
	g := prometheus.NewRegistry()
	echo(t, open(t, metricsTo(g)), rt.Spec(t, rt.Echo()))
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Fatalf("%v, %v", problems, err)
	}
	if got := counts(t, g); got["guest_exits_total stopped"] != 1 || got["guest_memory_bytes"] != 0 {
		t.Fatalf("metrics %v", got)
	}
}

// TestASpareSlotIsKeptAndTaken looks at the memory that is kept ready: the first
// start leaves a slot behind, the next one takes it and leaves another, and one
// with another limit makes its own.
func TestASpareSlotIsKeptAndTaken(t *testing.T) {
	g := prometheus.NewRegistry()
	r := open(t, metricsTo(g))
	spec := rt.Spec(t, rt.Echo())
	spare := func(want float64) {
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for counts(t, g)["guest_spare_memory_bytes"] != want {
			if time.Now().After(deadline) {
				t.Fatalf("spare memory is %v bytes, want %v", counts(t, g)["guest_spare_memory_bytes"], want)
			}
			goruntime.Gosched()
		}
	}
	const one = 128 << 10 // what the guest starts with
	echo(t, r, spec)
	spare(one)
	echo(t, r, spec)
	spare(one)
	spec.MemoryBytes *= 2
	echo(t, r, spec)
	spare(one)
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := counts(t, g); got["guest_spare_memory_bytes"] != 0 || got["guest_memory_bytes"] != 0 {
		t.Errorf("after the end of the runtime: %v", got)
	}
}

func TestWhatWASICannotCarryIsRefused(t *testing.T) {
	r := open(t)
	for name, change := range map[string]func(*runtime.Spec){
		"an argument with NUL":      func(s *runtime.Spec) { s.Args = []string{"a\x00b"} },
		"a variable without a name": func(s *runtime.Spec) { s.Env = map[string]string{"": "x"} },
		"a name with '='":           func(s *runtime.Spec) { s.Env = map[string]string{"A=B": "x"} },
		"a value with NUL":          func(s *runtime.Spec) { s.Env = map[string]string{"A": "x\x00"} },
	} {
		spec := rt.Spec(t, rt.Echo())
		change(&spec)
		if _, err := r.Prepare(t.Context(), spec, rt.NoHost(t)); !errors.Is(err, runtime.ErrModuleInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
