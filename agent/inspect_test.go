package agent

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// wasmModule assembles a module of an import and an export section.
func wasmModule(imports, exports []string) []byte {
	vec := func(entries [][]byte) []byte {
		out := []byte{byte(len(entries))}
		for _, e := range entries {
			out = append(out, e...)
		}
		return out
	}
	name := func(s string) []byte { return append([]byte{byte(len(s))}, s...) }
	section := func(id byte, body []byte) []byte {
		size := []byte{byte(len(body)&0x7f | 0x80), byte(len(body) >> 7)}
		return slices.Concat([]byte{id}, size, body)
	}
	var in, ex [][]byte
	for _, i := range imports {
		in = append(in, slices.Concat(name("env"), name(i), []byte{externFunc, 0}))
	}
	in = append(in, slices.Concat(name("env"), name("mem"), []byte{externMemory, 1, 1, 2}),
		slices.Concat(name("env"), name("tab"), []byte{externTable, 0x70, 0, 1}),
		slices.Concat(name("env"), name("glo"), []byte{externGlobal, 0x7f, 0}))
	for _, e := range exports {
		ex = append(ex, slices.Concat(name(e), []byte{externFunc, 0}))
	}
	ex = append(ex, slices.Concat(name("memory"), []byte{externMemory, 0}))
	return slices.Concat([]byte("\x00asm\x01\x00\x00\x00"),
		section(0, append(name("custom"), 1, 2, 3)), section(2, vec(in)), section(7, vec(ex)), section(10, []byte{0}))
}

func TestInspectTellsCommandsFromReactors(t *testing.T) {
	info, err := inspect(bytes.NewReader(wasmModule([]string{"b", "a"}, []string{"z", "_start"})))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(info.imports, []string{"env a", "env b"}) || !slices.Equal(info.exports, []string{"_start", "z"}) {
		t.Fatalf("got %+v", info)
	}
	if info.kind() != pb.ModuleKind_MODULE_KIND_COMMAND {
		t.Fatal("a module with _start is no command")
	}
	info, err = inspect(bytes.NewReader(wasmModule(nil, []string{"_initialize"})))
	if err != nil || info.kind() != pb.ModuleKind_MODULE_KIND_REACTOR {
		t.Fatalf("got %+v, %v; want a reactor", info, err)
	}
}

func TestInspectRefusesEveryPrefixOfAModule(t *testing.T) {
	whole := wasmModule([]string{"a"}, []string{"b"})
	ends := map[int]bool{8: true} // where a section ends, a shorter module is a module
	for n := range whole {
		_, err := inspect(bytes.NewReader(whole[:n]))
		if err == nil && !ends[n] && !endsAtSection(whole, n) {
			t.Errorf("the first %d of %d bytes were taken for a module", n, len(whole))
		}
		if err != nil && !errors.Is(err, errNotModule) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func endsAtSection(module []byte, n int) bool {
	at := 8
	for at < n {
		at += 3 + int(module[at+1]&0x7f) + int(module[at+2])<<7
	}
	return at == n
}

func TestInspectRefusesComponents(t *testing.T) {
	_, err := inspect(bytes.NewReader([]byte("\x00asm\x0d\x00\x01\x00")))
	if !errors.Is(err, errNotModule) || !bytes.Contains([]byte(err.Error()), []byte("component")) {
		t.Fatalf("got %v", err)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(wasmModule([]string{"a"}, []string{"b"}))
	f.Add([]byte("\x00asm\x01\x00\x00\x00\x02\xff\xff\xff\xff\x0f\xff\xff\xff\xff\x0f"))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := inspect(bytes.NewReader(data))
		if err == nil && len(info.imports)+len(info.exports) > len(data) {
			t.Fatalf("%d bytes hold %d names", len(data), len(info.imports)+len(info.exports))
		}
	})
}
