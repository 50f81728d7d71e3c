// Package modulestest builds small wasm binaries for tests. Only tests import it.
package modulestest

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// Reactor is a reactor with an invoke handler that imports the functions named,
// each as "module name".
func Reactor(imports ...string) []byte {
	return Wasm(imports, "wasmatrix_alloc", "wasmatrix_on_invoke")
}

// Command is a command that imports the functions named, each as "module name".
func Command(imports ...string) []byte { return Wasm(imports, "_start") }

// Wasm builds a module with one memory, the imported functions, and exported
// functions that do nothing and take and return nothing. It is for whoever reads
// a module's sections; an executor would refuse the handlers' types.
func Wasm(imports []string, exports ...string) []byte {
	var imported []byte
	for _, f := range imports {
		module, name, _ := strings.Cut(f, " ")
		imported = append(append(append(imported, Name(module)...), Name(name)...), 0, 0)
	}
	var functions, exported, code []byte
	exported = append(exported, append(Name("memory"), 2, 0)...)
	for i, name := range exports {
		functions = append(functions, 0)
		exported = append(append(exported, Name(name)...), 0)
		exported = append(exported, LEB(uint64(len(imports)+i))...)
		code = append(code, 2, 0, 0x0b)
	}
	out := []byte("\x00asm\x01\x00\x00\x00")
	out = append(out, Section(1, []byte{1, 0x60, 0, 0})...)
	if len(imports) > 0 {
		out = append(out, Section(2, vector(len(imports), imported))...)
	}
	out = append(out, Section(3, vector(len(exports), functions))...)
	out = append(out, Section(5, []byte{1, 0, 1})...)
	out = append(out, Section(7, vector(len(exports)+1, exported))...)
	return append(out, Section(10, vector(len(exports), code))...)
}

// Section frames a section's content.
func Section(id byte, content []byte) []byte {
	return append(append([]byte{id}, LEB(uint64(len(content)))...), content...)
}

// Name encodes a string with its length.
func Name(s string) []byte { return append(LEB(uint64(len(s))), s...) }

// LEB encodes an unsigned number as LEB128.
func LEB(n uint64) []byte {
	var out []byte
	for n >= 0x80 {
		out = append(out, byte(n)|0x80)
		n >>= 7
	}
	return append(out, byte(n))
}

// Digest returns the digest of a binary.
func Digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func vector(n int, items []byte) []byte { return append(LEB(uint64(n)), items...) }
