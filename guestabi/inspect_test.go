package guestabi_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const header = "\x00asm\x01\x00\x00\x00"

func TestInspectTellsKindImportsAndExports(t *testing.T) {
	tests := []struct {
		name             string
		wasm             []byte
		kind             pb.ModuleKind
		imports, exports []string
	}{
		{
			name: "reactor with imports of two capabilities",
			wasm: modulestest.Wasm(
				[]string{"wasmatrix:kv/v1 set", "wasi_snapshot_preview1 fd_write", "wasmatrix:kv/v1 get"},
				"wasmatrix_on_invoke", "_initialize", "wasmatrix_alloc"),
			kind:    pb.ModuleKind_MODULE_KIND_REACTOR,
			imports: []string{"wasi_snapshot_preview1 fd_write", "wasmatrix:kv/v1 get", "wasmatrix:kv/v1 set"},
			exports: []string{"_initialize", "wasmatrix_alloc", "wasmatrix_on_invoke"},
		},
		{
			name:    "reactor that only takes messages",
			wasm:    modulestest.Wasm(nil, "wasmatrix_on_message", "wasmatrix_alloc"),
			kind:    pb.ModuleKind_MODULE_KIND_REACTOR,
			exports: []string{"wasmatrix_alloc", "wasmatrix_on_message"},
		},
		{
			name:    "command",
			wasm:    modulestest.Command("wasi_snapshot_preview1 proc_exit"),
			kind:    pb.ModuleKind_MODULE_KIND_COMMAND,
			imports: []string{"wasi_snapshot_preview1 proc_exit"},
			exports: []string{"_start"},
		},
		{
			name:    "the same import twice",
			wasm:    modulestest.Command("wasi_snapshot_preview1 fd_write", "wasi_snapshot_preview1 fd_write"),
			kind:    pb.ModuleKind_MODULE_KIND_COMMAND,
			imports: []string{"wasi_snapshot_preview1 fd_write"},
			exports: []string{"_start"},
		},
		{
			name: "custom sections between the others",
			wasm: slices.Concat(
				modulestest.Command()[:8],
				modulestest.Section(0, append(modulestest.Name("producers"), make([]byte, 3<<20)...)),
				modulestest.Command()[8:],
				modulestest.Section(0, modulestest.Name("name"))),
			kind:    pb.ModuleKind_MODULE_KIND_COMMAND,
			exports: []string{"_start"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for name, r := range map[string]io.Reader{
				"whole": bytes.NewReader(test.wasm), "in pieces": iotest.HalfReader(bytes.NewReader(test.wasm)),
			} {
				m, err := guestabi.Inspect(r)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if m.GetKind() != test.kind {
					t.Errorf("%s: kind is %v, want %v", name, m.GetKind(), test.kind)
				}
				if diff := cmp.Diff(test.imports, m.GetImports()); diff != "" {
					t.Errorf("%s: imports (-want +got)\n%s", name, diff)
				}
				if diff := cmp.Diff(test.exports, m.GetExports()); diff != "" {
					t.Errorf("%s: exports (-want +got)\n%s", name, diff)
				}
			}
		})
	}
}

func TestInspectRefusesWhatIsNoGuestAndSaysWhatToDo(t *testing.T) {
	tests := []struct {
		name string
		wasm []byte
		says string // in the message
		next string // in the next step
	}{
		{"nothing", nil, "0 bytes", "build"},
		{"text", []byte("(module)"), "not a wasm binary", "wat2wasm"},
		{"a few bytes", []byte("\x00as"), "not a wasm binary", "wasm"},
		{"component", []byte("\x00asm\x0d\x00\x01\x00"), "component", "preview 1"},
		{"later version", []byte("\x00asm\x02\x00\x00\x00"), "version 2", "core module"},
		{"unknown module", modulestest.Command("weird f"), "weird f", wasi},
		{"unknown function of a capability", modulestest.Reactor("wasmatrix:kv/v1 truncate"), "truncate", "wasmatrix:kv/v1"},
		{"unknown function of WASI", modulestest.Command(wasi + " fd_teleport"), "fd_teleport", wasi},
		{"later interface version", modulestest.Reactor("wasmatrix:kv/v2 get"), "wasmatrix:kv/v2", "wasmatrix:kv/v1"},
		{"other WASI", modulestest.Command("wasi_unstable fd_write"), "wasi_unstable", "wasip1"},
		{"WASI preview 2", modulestest.Command("wasi:cli/run@0.2.0 run"), "wasi:cli", "wasip1"},
		{"unresolved symbol", modulestest.Command("env printf"), "env printf", "link"},
		{"browser Go", modulestest.Command("gojs runtime.wasmExit"), "gojs", "GOOS=wasip1"},
		{"no way in", modulestest.Wasm(nil, "add"), "neither a handler nor _start", "handler"},
		{"both ways in", modulestest.Wasm(nil, "_start", "wasmatrix_on_http", "wasmatrix_alloc"), "both", "c-shared"},
		{"reactor without alloc", modulestest.Wasm(nil, "wasmatrix_on_http"), "wasmatrix_alloc", "SDK"},
		{"reactor without memory", withoutMemory(), "memory", "export"},
		{"command with imports and without memory", commandWithoutMemory(), "memory", "export"},
		{"imported memory", importedMemory(), "memory env mem", "--import-memory"},
		{"too many imports", manyImports(1001), "1001 imports", "once"},
		{"too many exports", []byte(header + "\x07\x05\xff\xff\xff\xff\x0f"), "exports", "--export-all"},
		{"endless name", []byte(header + "\x07\x0b\x01\xff\xff\xff\xff\x0f"), "longer than", "--export-all"},
		{"names that fill the registry", modulestest.Wasm(nil, longNames()...), "longer than", "--export-all"},
		{"cut off", modulestest.Command()[:20], "middle of a section", "again"},
		{"section out of order", append(modulestest.Command(), modulestest.Section(1, []byte{0})...), "out of order", "again"},
		{"section twice", []byte(header + "\x01\x01\x00\x01\x01\x00"), "repeated", "again"},
		{"unknown section", []byte(header + "\x20\x00"), "section 32", "again"},
		{"section size without end", []byte(header + "\x01\x80\x80\x80\x80\x80\x80"), "32 bits", "again"},
		{"section size too large", []byte(header + "\x01\xff\xff\xff\xff\x1f"), "32 bits", "again"},
		{"section longer than its content", []byte(header + "\x07\x02\x00\x00"), "too many", "again"},
		{"section shorter than its content", []byte(header + "\x07\x01\x05"), "ends early", "again"},
		{"export twice", modulestest.Wasm(nil, "_start", "_start"), "twice", "again"},
		{"name that is no text", modulestest.Wasm(nil, "_start", "\xff\xfe"), "UTF-8", "again"},
		{"unknown kind of export", []byte(header + "\x07\x04\x01\x00\x09\x00"), "kind 9", "again"},
		{"custom section without a name", []byte(header + "\x00\x00"), "ends early", "again"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m, err := guestabi.Inspect(bytes.NewReader(test.wasm))
			var refused *apierror.Error
			if !errors.As(err, &refused) || m != nil {
				t.Fatalf("Inspect returned %v, %v; want a refusal", m, err)
			}
			if refused.Code() != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
				t.Errorf("code is %v, want INVALID_REQUEST", refused.Code())
			}
			if !strings.Contains(refused.Error(), test.says) {
				t.Errorf("message %q does not say %q", refused, test.says)
			}
			if next := refused.Proto(t.Context()).GetNextStep(); !strings.Contains(next, test.next) {
				t.Errorf("next step %q does not say %q", next, test.next)
			}
		})
	}
}

func TestInspectPassesOnTheFailureOfItsReader(t *testing.T) {
	broken := errors.New("connection broke")
	wasm := modulestest.Command()
	for n := range len(wasm) {
		r := io.MultiReader(bytes.NewReader(wasm[:n]), iotest.ErrReader(broken))
		if _, err := guestabi.Inspect(r); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: error is %v, want the reader's", n, err)
		}
	}
}

func TestInspectNeedsLittleMemoryForLargeClaims(t *testing.T) {
	// An import section that claims 4 GiB of content, all of it one name, and 60 MiB that follow.
	claims := append([]byte(header+"\x02\xff\xff\xff\xff\x0f\x01\xff\xff\xff\x1f"), make([]byte, 1<<20)...)
	// A custom section of 60 MiB, which is legal.
	large := append([]byte(header), modulestest.Section(0, append(modulestest.Name("x"), make([]byte, 60<<20)...))...)
	for name, wasm := range map[string][]byte{"claims": claims, "large": large} {
		var before, after goruntime.MemStats
		goruntime.ReadMemStats(&before)
		_, _ = guestabi.Inspect(bytes.NewReader(wasm))
		goruntime.ReadMemStats(&after)
		allocated := after.TotalAlloc - before.TotalAlloc
		if allocated > 1<<20 {
			t.Errorf("%s: Inspect allocated %d bytes, want less than 1 MiB", name, allocated)
		}
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(modulestest.Command("wasi_snapshot_preview1 fd_write"))
	f.Add(modulestest.Reactor("wasmatrix:kv/v1 get", "wasmatrix:http/v1 request"))
	f.Add([]byte("\x00asm\x0d\x00\x01\x00"))
	f.Add(importedMemory())
	f.Add([]byte(header + "\x07\x0b\x01\xff\xff\xff\xff\x0f"))
	f.Fuzz(func(t *testing.T, wasm []byte) {
		m, err := guestabi.Inspect(bytes.NewReader(wasm))
		if err == nil {
			if m.GetKind() == pb.ModuleKind_MODULE_KIND_UNSPECIFIED || !slices.IsSorted(m.GetImports()) ||
				!slices.IsSorted(m.GetExports()) || len(m.GetImports()) > 1000 || len(m.GetExports()) > 10000 {
				t.Errorf("accepted as %v", m)
			}
			return
		}
		var refused *apierror.Error
		if !errors.As(err, &refused) || refused.Proto(t.Context()).GetNextStep() == "" {
			t.Errorf("error without a next step: %v", err)
		}
	})
}

const wasi = "wasi_snapshot_preview1"

func withoutMemory() []byte {
	exports := []byte{2}
	for i, name := range []string{"wasmatrix_alloc", "wasmatrix_on_invoke"} {
		exports = append(append(exports, modulestest.Name(name)...), 0, byte(i))
	}
	return append([]byte(header), modulestest.Section(7, exports)...)
}

func commandWithoutMemory() []byte {
	imports := slices.Concat([]byte{1}, modulestest.Name(wasi), modulestest.Name("fd_write"), []byte{0, 0})
	exports := slices.Concat([]byte{1}, modulestest.Name("_start"), []byte{0, 1})
	return slices.Concat([]byte(header), modulestest.Section(2, imports), modulestest.Section(7, exports))
}

func importedMemory() []byte {
	content := slices.Concat([]byte{1}, modulestest.Name("env"), modulestest.Name("mem"), []byte{2, 0, 1})
	return append([]byte(header), modulestest.Section(2, content)...)
}

func manyImports(n int) []byte {
	return modulestest.Command(slices.Repeat([]string{wasi + " fd_write"}, n)...)
}

func longNames() []string {
	names := []string{"_start"}
	for i := range 300 {
		names = append(names, fmt.Sprintf("%d%s", i, strings.Repeat("x", 1000)))
	}
	return names
}
