package module_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// features are those that guests may use.
const features = api.CoreFeaturesV2

// newEngine returns a wazero runtime; modules that are metered find a checkpoint
// in it that never ends them and hands out the budget.
func newEngine(tb testing.TB, budget uint64) wazero.Runtime {
	tb.Helper()
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithCoreFeatures(features).WithDebugInfoEnabled(false))
	tb.Cleanup(func() { _ = r.Close(ctx) })
	_, err := r.NewHostModuleBuilder(module.CheckpointModule).NewFunctionBuilder().
		WithGoFunction(api.GoFunc(func(_ context.Context, stack []uint64) { stack[0] = budget }), nil, []api.ValueType{api.ValueTypeI64}).
		Export(module.CheckpointName).Instantiate(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// metered decodes and rewrites a module.
func metered(binary []byte) ([]byte, error) {
	m, err := module.Decode(binary, module.Limits{})
	if err != nil {
		return nil, err
	}
	return m.Meter()
}

// outcome is what a call did, in a form to compare: the results, or the trap
// without its stack.
func outcome(f api.Function, params []uint64) string {
	if f == nil {
		return "no such function"
	}
	results, err := f.Call(context.Background(), params...)
	if err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		return first
	}
	return fmt.Sprint(comparable(f.Definition().ResultTypes(), results))
}

// comparable makes results of two engines equal where the specification leaves
// them open: references are addresses.
func comparable(types []api.ValueType, results []uint64) []string {
	var out []string
	at := 0
	for _, t := range types {
		v := results[at]
		at++
		switch module.ValueType(t) {
		case module.FuncRef:
			out = append(out, fmt.Sprint("funcref, null: ", v == 0))
		case module.V128:
			out = append(out, fmt.Sprintf("%x:%x", v, results[at]))
			at++
		case module.F32:
			out = append(out, fmt.Sprint(uint32(v), " ", math.Float32frombits(uint32(v))))
		default:
			out = append(out, fmt.Sprint(v))
		}
	}
	return out
}
