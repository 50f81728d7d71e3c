package wasm

import (
	"fmt"
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// capabilities are the import modules "wasmatrix:<name>/v1" and their functions.
var capabilities = guestabi.Capabilities()

var (
	typeCapability = module.FuncType{
		Params:  []module.ValueType{module.I32, module.I32, module.I32, module.I32},
		Results: []module.ValueType{module.I64},
	}
	typeRead    = module.FuncType{Params: []module.ValueType{module.I32, module.I32}, Results: []module.ValueType{module.I32}}
	typeHandler = module.FuncType{Params: []module.ValueType{module.I32, module.I32}, Results: []module.ValueType{module.I64}}
	typeAlloc   = module.FuncType{Params: []module.ValueType{module.I32}, Results: []module.ValueType{module.I32}}
	typeDrain   = module.FuncType{Results: []module.ValueType{module.I32}}
	typeNothing = module.FuncType{}
)

// handlers are the exports that make a module a reactor.
var handlers = []runtime.Handler{runtime.HandlerInvoke, runtime.HandlerHTTP, runtime.HandlerMessage}

// shape is what a module is after the guest interface.
type shape struct {
	// command is true for a module that runs once, false for a reactor.
	command    bool
	handlers   []runtime.Handler
	initialize bool
	drain      bool
	// start is true for a module with a start function, which runs when it is instantiated.
	start bool
	// memory is the size in bytes that its memory starts with.
	memory uint64
}

// inspect checks a module against the guest interface. wasi holds the types of
// the functions of WASI preview 1 that exist.
func inspect(m *module.Module, wasi map[string]module.FuncType) (shape, error) {
	if err := checkImports(m.Imports(), wasi); err != nil {
		return shape{}, err
	}
	s := shape{memory: m.MemoryBytes(), start: m.HasStart()}
	for _, h := range handlers {
		if e, ok := m.Export(string(h), module.Function); ok {
			if err := wantType(e, typeHandler); err != nil {
				return shape{}, err
			}
			s.handlers = append(s.handlers, h)
		}
	}
	start, isCommand := m.Export(guestabi.Start, module.Function)
	_, hasMemory := m.Export(guestabi.Memory, module.Memory)
	switch {
	case isCommand && len(s.handlers) > 0:
		return shape{}, fmt.Errorf("the module exports both %s and %s; a command exports the first, a reactor the second", guestabi.Start, s.handlers[0])
	case isCommand:
		s.command = true
		if len(m.Imports()) > 0 && !hasMemory {
			return shape{}, fmt.Errorf("the module does not export its memory as %q", guestabi.Memory)
		}
		return s, wantType(start, typeNothing)
	case len(s.handlers) == 0:
		return shape{}, fmt.Errorf("the module exports neither %s nor a handler (%s); build it as a command or with a wasmatrix guest SDK", guestabi.Start, joined(handlers))
	case !hasMemory:
		return shape{}, fmt.Errorf("the module does not export its memory as %q", guestabi.Memory)
	}
	return s, s.reactor(m)
}

// reactor checks the exports that only reactors have.
func (s *shape) reactor(m *module.Module) error {
	alloc, ok := m.Export(guestabi.Alloc, module.Function)
	if !ok {
		return fmt.Errorf("the module exports %s but not %s, which hands out room for the input", s.handlers[0], guestabi.Alloc)
	}
	if err := wantType(alloc, typeAlloc); err != nil {
		return err
	}
	if e, ok := m.Export(guestabi.Drain, module.Function); ok {
		s.drain = true
		if err := wantType(e, typeDrain); err != nil {
			return err
		}
	}
	if e, ok := m.Export(guestabi.Initialize, module.Function); ok {
		s.initialize = true
		return wantType(e, typeNothing)
	}
	return nil
}

func joined(names []runtime.Handler) string {
	parts := make([]string, len(names))
	for i, n := range names {
		parts[i] = string(n)
	}
	return strings.Join(parts, ", ")
}

func wantType(e module.Export, want module.FuncType) error {
	if e.Type.Equal(want) {
		return nil
	}
	return fmt.Errorf("the module exports %s with type %s, it must be %s", e.Name, e.Type, want)
}

func checkImports(imports []module.Import, wasi map[string]module.FuncType) error {
	for _, i := range imports {
		want, err := importType(i, wasi)
		if err != nil {
			return err
		}
		if i.Kind != module.Function {
			return fmt.Errorf("the module imports the %s %q %q; guests may import functions only", i.Kind, i.Module, i.Name)
		}
		if !i.Type.Equal(want) {
			return fmt.Errorf("the module imports %q %q with type %s, it is %s", i.Module, i.Name, i.Type, want)
		}
	}
	return nil
}

// importType finds the type of an imported function, or says what is wrong with
// its name and what to do.
func importType(i module.Import, wasi map[string]module.FuncType) (module.FuncType, error) {
	if i.Module == guestabi.WASI {
		if t, ok := wasi[i.Name]; ok {
			return t, nil
		}
		return module.FuncType{}, fmt.Errorf("the module imports %q %q, which is no function of WASI preview 1", i.Module, i.Name)
	}
	rest, ours := strings.CutPrefix(i.Module, guestabi.Prefix)
	if !ours {
		return module.FuncType{}, fmt.Errorf("the module imports %q %q; %s", i.Module, i.Name, foreign(i.Module))
	}
	name, version, _ := strings.Cut(rest, "/")
	functions, known := capabilities[name]
	switch {
	case i.Module == guestabi.Result && i.Name == "read":
		return typeRead, nil
	case i.Module == guestabi.Result || known && version == guestabi.Version && !slices.Contains(functions, i.Name):
		return module.FuncType{}, fmt.Errorf("the module imports %q %q; there is no such function, build it with a guest SDK of this version of wasmatrix", i.Module, i.Name)
	case version != guestabi.Version && (known || name == "result"):
		return module.FuncType{}, fmt.Errorf("the module imports %q, this node serves version %s of the guest interface; build it with a matching guest SDK or upgrade the node", i.Module, guestabi.Version)
	case !known:
		return module.FuncType{}, fmt.Errorf("the module imports %q %q; there is no such capability", i.Module, i.Name)
	}
	return typeCapability, nil
}

func foreign(name string) string {
	switch {
	case name == "wasi_unstable":
		return "that is an old WASI; build it for WASI preview 1 (wasm32-wasip1)"
	case strings.HasPrefix(name, "wasi:"):
		return "that is WASI preview 2; build it for WASI preview 1 (wasm32-wasip1)"
	case name == "gojs" || name == "go":
		return "that is Go for browsers; build it with GOOS=wasip1 GOARCH=wasm"
	case name == "env":
		return "link it for WASI without undefined symbols"
	default:
		return fmt.Sprintf("guests may import %s and %s*/%s only", guestabi.WASI, guestabi.Prefix, guestabi.Version)
	}
}
