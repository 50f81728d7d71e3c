package node

import (
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// without is the configuration of a node on which QEMU is not where it is looked for.
func without(t *testing.T, accel, runtime string) Config {
	t.Helper()
	cfg := Default()
	cfg.DataDir = t.TempDir()
	cfg.MicroVM = MicroVMConfig{Accel: accel, QEMU: filepath.Join(cfg.DataDir, "none")}
	cfg.Runtime.Default = runtime
	return cfg
}

func open(t *testing.T, cfg Config) (*runtimes, error) {
	t.Helper()
	r, err := openRuntimes(t.Context(), cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err == nil {
		t.Cleanup(func() {
			if err := r.close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	return r, err
}

// A node that only may run virtual machines goes on without them.
func TestANodeOffersWhatItCan(t *testing.T) {
	for _, accel := range []string{"auto", "off"} {
		cfg := without(t, accel, runtimeWasm)
		if err := CheckMicroVM(t.Context(), cfg); err != nil {
			t.Errorf("%s: %v", accel, err)
		}
		r, err := open(t, cfg)
		if err != nil {
			t.Fatalf("%s: %v", accel, err)
		}
		infos := r.infos()
		if !slices.Equal(r.names(), []string{"wasm"}) || len(infos) != 1 || infos[0].GetName() != "wasm" || infos[0].GetIsolation() != "sandbox" {
			t.Errorf("%s: it offers %v, %v", accel, r.names(), infos)
		}
	}
}

// A node that was asked for virtual machines does not start without, and says why.
func TestANodeThatWasAskedForVirtualMachinesNeedsThem(t *testing.T) {
	for name, cfg := range map[string]Config{
		"emulation":                without(t, "tcg", runtimeWasm),
		"the processor's":          without(t, "kvm", runtimeWasm),
		"the default runtime":      without(t, "auto", runtimeMicroVM),
		"another kernel, emulated": func() Config { c := without(t, "tcg", runtimeWasm); c.MicroVM.Kernel = c.DataDir; return c }(),
	} {
		_, opened := open(t, cfg)
		for _, err := range []error{CheckMicroVM(t.Context(), cfg), opened} {
			if !errors.Is(err, ErrMicroVM) || !strings.Contains(err.Error(), "wasmatrix doctor") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// Flags win over the environment and the file, and reach the agent process.
func TestOverrides(t *testing.T) {
	cfg, err := load(t, "node: {name: n1}\ndata_dir: /d\njoin: {bootstrap_expect: 1}\nmicrovm: {accel: kvm}\n",
		map[string]string{EnvRuntime: "wazero", EnvAccel: "tcg"})
	if err != nil {
		t.Fatal(err)
	}
	Overrides{}.Apply(&cfg)
	if cfg.Runtime.Default != "wazero" || cfg.MicroVM.Accel != "tcg" {
		t.Errorf("the environment gave %q and %q", cfg.Runtime.Default, cfg.MicroVM.Accel)
	}
	o := Overrides{Runtime: "micro-kvm", Accel: "auto"}
	o.Apply(&cfg)
	if err := cfg.Complete(); err != nil || cfg.Runtime.Default != runtimeMicroVM || cfg.MicroVM.Accel != "auto" {
		t.Errorf("flags gave %q and %q: %v", cfg.Runtime.Default, cfg.MicroVM.Accel, err)
	}
	if got, want := strings.Join(o.args(), " "), "--runtime micro-kvm --microvm-accel auto"; got != want {
		t.Errorf("the agent gets %q, want %q", got, want)
	}
	if got := (Overrides{}).args(); got != nil {
		t.Errorf("without flags the agent gets %q", got)
	}
}

// The steps that a diagnosis tells follow from what was found.
func TestTheNextStepFollowsFromTheFindings(t *testing.T) {
	var told []Finding
	cfg := without(t, "tcg", runtimeWasm)
	cfg.MicroVM.Kernel = filepath.Join(cfg.DataDir, "none")
	d := Diagnose(t.Context(), cfg.MicroVM, func(f Finding) { told = append(told, f) })
	if d.Works || d.Isolation != "" || !slices.Equal(told, d.Findings) {
		t.Errorf("%+v, told %+v", d, told)
	}
	if len(d.Next) != 1 || !strings.HasSuffix(d.Next[0], " linux-image-cloud-amd64 qemu-system-x86") {
		t.Errorf("next: %q, want one step that installs both", d.Next)
	}
	if d := Diagnose(t.Context(), MicroVMConfig{Accel: accelOff}, func(Finding) {}); d.Works || len(d.Next) != 1 || !strings.Contains(d.Next[0], "microvm.accel") {
		t.Errorf("off: %+v", d)
	}
}
