//go:build linux && amd64

package microvm_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

func silent() runtime.Host {
	return rt.HostFunc(func(context.Context, string, string, []byte) ([]byte, error) { return nil, nil })
}

// inProcess is the other runtime, to compare with.
func inProcess(b *testing.B) runtime.Runtime {
	b.Helper()
	r, err := wasm.New(b.Context(), wasm.Config{Logger: quietLog()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return r
}

// firstAnswer measures an instance from Prepare to its first answer. It returns the
// processor time of the machines that there are then.
func firstAnswer(b *testing.B, r runtime.Runtime, spec runtime.Spec) (busy time.Duration) {
	b.Helper()
	i, err := r.Prepare(b.Context(), spec, silent())
	if err != nil {
		b.Fatal(err)
	}
	if err := i.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	if _, err := i.Invoke(b.Context(), runtime.HandlerInvoke, []byte("x")); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	for _, pid := range children(b, os.Getpid()) {
		busy += processorTime(b, pid)
	}
	if err := i.Close(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
	return busy
}

// modules are those whose starts are measured: a small one, and one that the Go
// compiler made where `make guests` has built it.
func modules(b *testing.B) map[string][]byte {
	all := map[string][]byte{"small": rt.Echo()}
	if content, err := os.ReadFile(filepath.Join("..", "..", "build", "guests", "hello.wasm")); err == nil {
		all["go"] = content
	} else {
		b.Logf("without the Go guest: %v", err)
	}
	return all
}

// BenchmarkStart measures starts to the first answer by where the machine comes from.
func BenchmarkStart(b *testing.B) {
	for name, module := range modules(b) {
		spec := rt.Spec(b, module)
		spec.MemoryBytes, spec.Timeout = 64<<20, time.Minute
		b.Run(name+"/in process", func(b *testing.B) {
			r := inProcess(b)
			firstAnswer(b, r, spec)
			for b.Loop() {
				firstAnswer(b, r, spec)
			}
		})
		b.Run(name+"/cold boot", func(b *testing.B) {
			r := microvm.Booting{Runtime: onQEMU(b)}
			var busy time.Duration
			for b.Loop() {
				busy += firstAnswer(b, r, spec)
			}
			b.ReportMetric(busy.Seconds()*1000/float64(b.N), "cpu-ms/op")
		})
		b.Run(name+"/first of the module", func(b *testing.B) {
			r := onQEMU(b)
			if err := r.Warm(b.Context()); err != nil {
				b.Fatal(err)
			}
			for n := 0; b.Loop(); n++ {
				// A custom section makes it another module.
				firstAnswer(b, r, func() runtime.Spec {
					b.StopTimer()
					defer b.StartTimer()
					s := rt.Spec(b, append(append([]byte{}, module...), 0, 3, 1, 'n', byte(n)))
					s.MemoryBytes, s.Timeout = spec.MemoryBytes, spec.Timeout
					return s
				}())
			}
		})
		b.Run(name+"/clone of the module", func(b *testing.B) {
			r := onQEMU(b)
			firstAnswer(b, r, spec)
			var busy time.Duration
			for b.Loop() {
				busy += firstAnswer(b, r, spec)
			}
			b.ReportMetric(busy.Seconds()*1000/float64(b.N), "cpu-ms/op")
		})
		b.Run(name+"/spare clone", func(b *testing.B) {
			r := onQEMU(b, func(c *microvm.Config) { c.Spares = 1 })
			firstAnswer(b, r, spec)
			for b.Loop() {
				b.StopTimer()
				r.Settle()
				b.StartTimer()
				firstAnswer(b, r, spec)
			}
		})
	}
}

// BenchmarkCall measures a call of a running instance.
func BenchmarkCall(b *testing.B) {
	for name, module := range map[string][]byte{"plain": rt.Echo(), "with one capability call": rt.Caller("wasmatrix:kv/v1", "get")} {
		for executor, open := range map[string]func(*testing.B) runtime.Runtime{
			"in process": inProcess, "machine": func(b *testing.B) runtime.Runtime { return onQEMU(b) },
		} {
			b.Run(name+"/"+executor, func(b *testing.B) {
				i := rt.Started(b, open(b), rt.Spec(b, module), silent())
				call := func() {
					if _, err := i.Invoke(b.Context(), runtime.HandlerInvoke, []byte("x")); err != nil {
						b.Fatal(err)
					}
				}
				for range 100 {
					call()
				}
				for b.Loop() {
					call()
				}
			})
		}
	}
}

// fleetSize is how many machines BenchmarkFleet starts; WASMATRIX_CLONES changes it.
const fleetSize = 20

// BenchmarkFleet measures what a machine that has answered takes while it does
// nothing: memory of the node, memory of its own, and processor time.
func BenchmarkFleet(b *testing.B) {
	const watched = 5 * time.Second
	count := clones(fleetSize)
	spec := rt.Spec(b, rt.Echo())
	for b.Loop() {
		r := onQEMU(b)
		firstAnswer(b, r, spec)
		free := available(b)
		before := children(b, os.Getpid())
		for range count {
			i := rt.Started(b, r, spec, silent())
			if _, err := i.Invoke(b.Context(), runtime.HandlerInvoke, []byte("x")); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric((float64(free)-float64(available(b)))/float64(count)/(1<<20), "MiB/machine")
		pids := children(b, os.Getpid())[len(before):]
		var own uint64
		var busy time.Duration
		for _, pid := range pids {
			own += rollup(b, pid, "Anonymous:")
			busy -= processorTime(b, pid)
		}
		time.Sleep(watched)
		for _, pid := range pids {
			busy += processorTime(b, pid)
		}
		b.ReportMetric(float64(own)/float64(count)/(1<<20), "own-MiB/machine")
		b.ReportMetric(100*busy.Seconds()/watched.Seconds()/float64(count), "%core/machine")
		b.ReportMetric(float64(len(pids)), "machines")
	}
}

// available returns the memory that programs of this node can still get.
func available(t testing.TB) uint64 { return field(t, "/proc/meminfo", "MemAvailable:") }

// rollup returns one sum over the mappings of a process.
func rollup(t testing.TB, pid int, name string) uint64 {
	return field(t, fmt.Sprintf("/proc/%d/smaps_rollup", pid), name)
}

// field returns a field, in bytes, of a file whose lines are a name, kilobytes and kB.
func field(t testing.TB, path, name string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 1 && fields[0] == name {
			kilobytes, err := strconv.ParseUint(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kilobytes << 10
		}
	}
	t.Fatalf("%s has no %s", path, name)
	return 0
}

// processorTime returns what the threads of a process have run.
func processorTime(t testing.TB, pid int) (sum time.Duration) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // that thread has just ended
		}
		first, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(n)
	}
	return sum
}
