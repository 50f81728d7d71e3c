//go:build linux && amd64

package microvm_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm"
	rt "github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// patience bounds every wait for a machine.
const patience = 2 * time.Minute

// clones is how many clones there shall be at once: WASMATRIX_CLONES=100 means as
// many, instead of what is usual.
func clones(usual int) int {
	n, err := strconv.Atoi(os.Getenv("WASMATRIX_CLONES"))
	if err != nil {
		return usual
	}
	return n
}

// witness is a reactor that draws 16 random bytes when it is initialised, counts
// that, and answers a call with 16 other random bytes, the time of day in
// nanoseconds, how often its memory was called, how often it was initialised, and
// what was drawn then; and then it writes all over its memory.
func witness() []byte {
	var m rt.Module
	random := m.Import("wasi_snapshot_preview1", "random_get", []byte{rt.I32, rt.I32}, []byte{rt.I32})
	now := m.Import("wasi_snapshot_preview1", "clock_time_get", []byte{rt.I32, rt.I64, rt.I32}, []byte{rt.I32})
	count := func(at int32) []byte {
		return rt.Cat(rt.I32Const(at), rt.I32Const(at), rt.I32Load, rt.I32Const(1), rt.I32Add, rt.I32Store)
	}
	m.Memory(16)
	m.Func("wasmatrix_alloc", []byte{rt.I32}, []byte{rt.I32}, nil, rt.I32Const(4096))
	m.Func("_initialize", nil, nil, nil, count(92), rt.I32Const(96), rt.I32Const(16), rt.Call(random), rt.Drop)
	m.Func("wasmatrix_on_invoke", []byte{rt.I32, rt.I32}, []byte{rt.I64}, nil,
		rt.I32Const(64), rt.I32Const(16), rt.Call(random), rt.Drop,
		rt.I32Const(0), rt.I64Const(0), rt.I32Const(80), rt.Call(now), rt.Drop,
		rt.I32Const(88), rt.I32Const(32), rt.I32Load, rt.I32Store,
		count(32),
		rt.I32Const(8192), rt.I32Const(0xee), rt.I32Const(15<<16), rt.MemoryFill,
		rt.Packed(rt.I32Const(64), rt.I32Const(48)))
	return m.Bytes()
}

// TestClonesShareNothing compares clones of one template that run at once, among
// them some that have gone through a rehearsal.
func TestClonesShareNothing(t *testing.T) {
	metrics := prometheus.NewRegistry()
	r := onQEMU(t, func(c *microvm.Config) { c.Spares, c.Registerer = 1, metrics })
	spec := rt.Spec(t, witness())
	seen := map[string]int{}
	draw := func(n int, random []byte) {
		if other, same := seen[string(random)]; same {
			t.Fatalf("clones %d and %d have the same random numbers", other, n)
		}
		seen[string(random)] = n
	}
	count := clones(12)
	for n := range count {
		if n > 0 && n < 4 {
			r.Settle() // until there is a spare one
		}
		i := rt.Started(t, r, spec, rt.NoHost(t))
		for call := range 2 {
			before := time.Now()
			answer, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil)
			if err != nil || len(answer) != 48 {
				t.Fatalf("clone %d answered %x, %v", n, answer, err)
			}
			draw(n, answer[:16])
			if call == 0 {
				draw(n, answer[32:])
			}
			at := time.Unix(0, int64(binary.LittleEndian.Uint64(answer[16:])))
			const slack = 50 * time.Millisecond
			if at.Before(before.Add(-slack)) || at.After(time.Now().Add(slack)) {
				t.Fatalf("the clock of clone %d says %v, it is %v to %v", n, at, before, time.Now())
			}
			if calls := binary.LittleEndian.Uint32(answer[24:]); calls != uint32(call) {
				t.Fatalf("call %d of clone %d finds %d calls in its memory", call, n, calls)
			}
			if times := binary.LittleEndian.Uint32(answer[28:]); times != 1 {
				t.Fatalf("clone %d was initialised %d times", n, times)
			}
		}
	}
	r.Settle()
	values := gathered(t, metrics)
	for name, least := range map[string]float64{
		`wasmatrix_microvm_pool_takes_total{result="hit"}`: 3,
		`wasmatrix_microvm_machines{use="taken"}`:          float64(count),
		`wasmatrix_microvm_machines{use="spare"}`:          1,
		`wasmatrix_microvm_memory_bytes{use="taken"}`:      float64(count) * (1 << 20),
		`wasmatrix_microvm_templates`:                      2,
		`wasmatrix_microvm_template_bytes`:                 1 << 20,
	} {
		if values[name] < least {
			t.Errorf("%s is %v, want at least %v", name, values[name], least)
		}
	}
}

// gathered returns the values of counters and gauges by name and labels.
func gathered(t *testing.T, metrics prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += fmt.Sprintf("{%s=%q}", l.GetName(), l.GetValue())
			}
			values[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return values
}

// children returns the processes of QEMU that a process has started.
func children(t testing.TB, parent int) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has just ended
		}
		head, rest, _ := strings.Cut(string(text), " (")
		name, rest, _ := strings.Cut(rest, ") ")
		fields := strings.Fields(rest)
		if strings.HasPrefix(name, "qemu") && fields[0] != "Z" && fields[1] == strconv.Itoa(parent) {
			pid, err := strconv.Atoi(head)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// gone reports whether a process does nothing any more.
func gone(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(text), ") Z ")
}

// TestMachineKilled kills QEMU under a running call.
func TestMachineKilled(t *testing.T) {
	r := onQEMU(t)
	i := rt.Started(t, r, rt.Spec(t, rt.Spinner()), rt.NoHost(t))
	failed := make(chan error, 1)
	go func() {
		_, err := i.Invoke(t.Context(), runtime.HandlerInvoke, []byte("x"))
		failed <- err
	}()
	pids := children(t, os.Getpid())
	if len(pids) != 1 {
		t.Fatalf("processes %v, want one", pids)
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		if err == nil {
			t.Fatal("the call succeeded")
		}
	case <-time.After(patience):
		t.Fatal("the call goes on")
	}
	exit, err := i.Wait(t.Context())
	if err != nil || exit.Reason != runtime.Internal || !strings.Contains(exit.Message, "signal 9") {
		t.Fatalf("exit %+v, %v", exit, err)
	}
	if got, err := rt.Started(t, r, rt.Spec(t, rt.Echo()), rt.NoHost(t)).Invoke(t.Context(), runtime.HandlerInvoke, []byte("well")); err != nil || string(got) != "well" {
		t.Fatalf("another instance: %q, %v", got, err)
	}
}

// agentMode makes the test binary an agent that starts an instance and waits.
const agentMode = "WASMATRIX_TEST_AGENT"

// TestAgentForKilling is not a test: it is the process that the next one kills.
func TestAgentForKilling(t *testing.T) {
	if os.Getenv(agentMode) == "" {
		t.Skip("it is started by TestAgentKilled")
	}
	i := rt.Started(t, onQEMU(t), rt.Spec(t, rt.SpinCommand()), rt.NoHost(t))
	fmt.Println("running")
	if _, err := i.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestAgentKilled kills a process with a running machine, in a way that it cannot
// notice: its machine ends too.
func TestAgentKilled(t *testing.T) {
	onQEMU(t) // to skip where there is none
	agent := exec.Command(os.Args[0], "-test.run", "^TestAgentForKilling$", "-test.count=1")
	agent.Env = append(os.Environ(), agentMode+"=1")
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	defer func() {
		if !killed {
			_ = agent.Process.Kill()
			_ = agent.Wait()
		}
	}()
	timer := time.AfterFunc(patience, func() { _ = agent.Process.Kill() })
	defer timer.Stop()
	var said []byte
	for b := make([]byte, 256); !slices.Contains(strings.Split(string(said), "\n"), "running"); {
		n, err := out.Read(b)
		if err != nil {
			t.Fatalf("the agent has not come up: %q, %v", said, err)
		}
		said = append(said, b[:n]...)
	}
	machines := children(t, agent.Process.Pid)
	if len(machines) == 0 {
		t.Fatal("the agent has no machine")
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed = true
	_ = agent.Wait() // it was killed
	deadline := time.Now().Add(patience)
	for _, pid := range machines {
		for !gone(pid) {
			if time.Now().After(deadline) {
				t.Fatalf("machine %d outlives its agent", pid)
			}
		}
	}
}

// TestTry runs what `wasmatrix doctor` runs.
func TestTry(t *testing.T) {
	if err := onQEMU(t).Try(t.Context()); err != nil {
		t.Fatal(err)
	}
}
