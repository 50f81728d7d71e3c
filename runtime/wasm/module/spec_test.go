package module_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// TestSpecificationHoldsWhenMetered runs the tests of the WebAssembly
// specification 2.0, as they come with wazero, with and without metering: every
// call must do the same, and what was invalid must stay refused.
func TestSpecificationHoldsWhenMetered(t *testing.T) {
	dir := specTests(t)
	scripts, err := filepath.Glob(filepath.Join(dir, "v2", "testdata", "*.json"))
	if err != nil || len(scripts) < 100 {
		t.Fatalf("found %d scripts, %v", len(scripts), err)
	}
	if raceEnabled {
		t.Skip("takes minutes with the race detector, and has one goroutine")
	}
	var total tally
	for _, script := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(script), ".json"), func(t *testing.T) {
			runScript(t, dir, script, &total)
		})
	}
	t.Logf("%d modules, %d calls compared, %d invalid modules refused", total.modules, total.calls, total.invalid)
	if total.modules < 1000 || total.calls < 40_000 || total.invalid < 2000 {
		t.Fatalf("too little was compared: %+v", total)
	}
}

type tally struct{ modules, calls, invalid int }

// specTests finds the tests in the module cache.
func specTests(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tetratelabs/wazero").Output()
	dir := filepath.Join(strings.TrimSpace(string(out)), "internal", "integration_test", "spectest")
	if err == nil {
		_, err = os.Stat(dir)
	}
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("the specification's tests are not there: %v", err)
		}
		t.Skipf("the specification's tests are not there: %v", err)
	}
	return dir
}

type value struct {
	Type     string          `json:"type"`
	LaneType string          `json:"lane_type"`
	Value    json.RawMessage `json:"value"`
}

type action struct {
	Type, Module, Field string
	Args                []value
}

type command struct {
	Type, Name, As, Filename string
	Line                     int
	Action                   action
}

// side is one of the two engines with the modules of a script.
type side struct {
	engine  wazero.Runtime
	named   map[string]api.Module
	current api.Module
}

// load instantiates a module, rewritten when meter is true.
func (s *side) load(binary []byte, meter bool) (api.Module, error) {
	ctx := context.Background()
	if meter {
		rewritten, err := metered(binary)
		if err != nil {
			return nil, err
		}
		binary = rewritten
	}
	compiled, err := s.engine.CompileModule(ctx, binary)
	if err != nil {
		return nil, err
	}
	return s.engine.InstantiateModule(ctx, compiled, wazero.NewModuleConfig().WithName("").WithStartFunctions())
}

func newSide(t *testing.T, dir string) *side {
	s := &side{engine: newEngine(t, 1000), named: map[string]api.Module{}}
	shared, err := os.ReadFile(filepath.Join(dir, "testdata", "spectest.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.engine.InstantiateWithConfig(context.Background(), shared, wazero.NewModuleConfig().WithName("spectest")); err != nil {
		t.Fatal(err)
	}
	return s
}

func runScript(t *testing.T, dir, script string, total *tally) {
	content, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	var parsed struct{ Commands []command }
	if err := json.Unmarshal(content, &parsed); err != nil {
		t.Fatal(err)
	}
	// A module that others import by a name is instantiated under it; wazero has
	// no way to name one afterwards.
	plain, rewritten := newSide(t, dir), newSide(t, dir)
	for n, c := range parsed.Commands {
		switch {
		case c.Filename != "" && !strings.HasSuffix(c.Filename, ".wasm"):
		case c.Type == "module":
			total.modules++
			as := ""
			if n+1 < len(parsed.Commands) && parsed.Commands[n+1].Type == "register" {
				as = parsed.Commands[n+1].As
			}
			loadBoth(t, script, c, as, plain, rewritten)
		case c.Type == "assert_invalid", c.Type == "assert_malformed":
			binary := read(t, script, c.Filename)
			_, plainErr := plain.load(binary, false)
			_, err := rewritten.load(binary, true)
			if plainErr != nil && err == nil {
				t.Errorf("line %d: %s is invalid and passes when metered; plainly: %v", c.Line, c.Filename, plainErr)
			}
			total.invalid++
		case c.Type == "assert_uninstantiable", c.Type == "assert_unlinkable":
			binary := read(t, script, c.Filename)
			_, plainErr := plain.load(binary, false)
			_, err := rewritten.load(binary, true)
			if (plainErr == nil) != (err == nil) {
				t.Errorf("line %d: %s: plainly %v, metered %v", c.Line, c.Filename, plainErr, err)
			}
		case c.Action.Type == "invoke":
			total.calls++
			compareCall(t, c, plain, rewritten)
		}
	}
}

func read(t *testing.T, script, name string) []byte {
	t.Helper()
	binary, err := os.ReadFile(filepath.Join(filepath.Dir(script), name))
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

func loadBoth(t *testing.T, script string, c command, as string, plain, rewritten *side) {
	binary := read(t, script, c.Filename)
	load := func(s *side, meter bool) error {
		var err error
		if as != "" {
			if meter {
				if binary, err = metered(binary); err != nil {
					return err
				}
			}
			s.current, err = s.engine.InstantiateWithConfig(context.Background(), binary, wazero.NewModuleConfig().WithName(as).WithStartFunctions())
		} else {
			s.current, err = s.load(binary, meter)
		}
		if err == nil && c.Name != "" {
			s.named[c.Name] = s.current
		}
		return err
	}
	if err := load(plain, false); err != nil {
		t.Fatalf("line %d: %s plainly: %v", c.Line, c.Filename, err)
	}
	if err := load(rewritten, true); err != nil {
		if errors.Is(err, module.ErrLimit) || errors.Is(err, module.ErrUnsupported) {
			t.Skipf("line %d: %s: %v", c.Line, c.Filename, err)
		}
		t.Fatalf("line %d: %s metered: %v", c.Line, c.Filename, err)
	}
}

func compareCall(t *testing.T, c command, plain, rewritten *side) {
	call := func(s *side) string {
		m := s.current
		if c.Action.Module != "" {
			m = s.named[c.Action.Module]
		}
		if m == nil {
			return "no such module"
		}
		return outcome(m.ExportedFunction(c.Action.Field), params(t, c.Action.Args))
	}
	if want, got := call(plain), call(rewritten); got != want {
		t.Errorf("line %d: %s: plainly %s, metered %s", c.Line, c.Action.Field, want, got)
	}
}

// params encodes arguments as wazero takes them.
func params(t *testing.T, args []value) []uint64 {
	t.Helper()
	var out []uint64
	for _, a := range args {
		if a.Type == "v128" {
			var lanes []string
			if err := json.Unmarshal(a.Value, &lanes); err != nil {
				t.Fatal(err)
			}
			out = append(out, vector(lanes)...)
			continue
		}
		var text string
		if err := json.Unmarshal(a.Value, &text); err != nil {
			t.Fatal(err)
		}
		out = append(out, number(text))
	}
	return out
}

func number(text string) uint64 {
	switch text {
	case "null":
		return 0
	case "nan:canonical", "nan:arithmetic":
		return 0x7fc00000
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		signed, _ := strconv.ParseInt(text, 10, 64)
		return uint64(signed)
	}
	return v
}

func vector(lanes []string) []uint64 {
	out := make([]uint64, 2)
	width := 128 / len(lanes)
	for i, lane := range lanes {
		v := number(lane)
		if width < 64 {
			v &= 1<<width - 1
		}
		out[i*width/64] |= v << (i * width % 64)
	}
	return out
}
