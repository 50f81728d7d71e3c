package survey

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
)

// static refuses a program that a machine without any library cannot run.
func static(program []byte) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("no Linux program: %w", err)
	}
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("built for %s, machines are x86-64", f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("it needs shared libraries; build it with CGO_ENABLED=0, as `make build` does")
		}
	}
	return nil
}
