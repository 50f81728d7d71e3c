package wasm

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// exportStrings replaces WASI's functions for arguments and environment:
// wazero's are bound when a module is instantiated, and a spare slot is
// instantiated before it is known for which instance.
func exportStrings(b wazero.HostModuleBuilder) {
	i32 := api.ValueTypeI32
	export := func(name string, f func(s *slot, mem api.Memory, first, second uint32) bool) {
		b.NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(func(ctx context.Context, mod api.Module, stack []uint64) {
				done := f(slotOf(ctx), mod.Memory(), uint32(stack[0]), uint32(stack[1]))
				if stack[0] = errnoSuccess; !done {
					stack[0] = errnoFault
				}
			}), []api.ValueType{i32, i32}, []api.ValueType{i32}).
			Export(name)
	}
	export("args_get", func(s *slot, mem api.Memory, at, text uint32) bool { return s.instance.args.write(mem, at, text) })
	export("args_sizes_get", func(s *slot, mem api.Memory, n, size uint32) bool { return s.instance.args.sizes(mem, n, size) })
	export("environ_get", func(s *slot, mem api.Memory, at, text uint32) bool { return s.instance.env.write(mem, at, text) })
	export("environ_sizes_get", func(s *slot, mem api.Memory, n, size uint32) bool { return s.instance.env.sizes(mem, n, size) })
}

// wasiStrings are strings as WASI hands them out: one after the other, each with
// a NUL at its end, and a table of where they begin.
type wasiStrings struct {
	text   []byte
	begins []uint32
}

func packStrings(all []string) wasiStrings {
	var out wasiStrings
	for _, s := range all {
		out.begins = append(out.begins, uint32(len(out.text)))
		out.text = append(append(out.text, s...), 0)
	}
	return out
}

// sizes writes the number of strings and the size of their text.
func (w wasiStrings) sizes(mem api.Memory, n, size uint32) bool {
	return mem.WriteUint32Le(n, uint32(len(w.begins))) && mem.WriteUint32Le(size, uint32(len(w.text)))
}

// write writes the text, and the table of the addresses in it.
func (w wasiStrings) write(mem api.Memory, at, text uint32) bool {
	table := make([]byte, 0, 4*len(w.begins))
	for _, begin := range w.begins {
		table = binary.LittleEndian.AppendUint32(table, text+begin)
	}
	return mem.Write(at, table) && mem.Write(text, w.text)
}

// stringsOf packs an instance's arguments and environment. It fails for what
// WASI cannot carry.
func stringsOf(spec runtime.Spec) (args, env wasiStrings, err error) {
	for i, arg := range spec.Args {
		if strings.Contains(arg, "\x00") {
			return args, env, fmt.Errorf("argument %d holds a NUL byte, which WASI cannot carry", i+1)
		}
	}
	var pairs []string
	for _, key := range slices.Sorted(maps.Keys(spec.Env)) {
		if key == "" || strings.ContainsAny(key, "=\x00") || strings.Contains(spec.Env[key], "\x00") {
			return args, env, fmt.Errorf("environment variable %q: a name must not be empty or hold '=', and neither name nor value a NUL byte", key)
		}
		pairs = append(pairs, key+"="+spec.Env[key])
	}
	return packStrings(append([]string{spec.Name}, spec.Args...)), packStrings(pairs), nil
}
