//go:build linux && amd64

package qemu

import (
	"errors"
	"os"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

var errNone = errors.New("none of this driver's")

// MemoryOf returns the memory of a template.
func MemoryOf(v vmm.Template) (*os.File, error) {
	t, ok := v.(*template)
	if !ok {
		return nil, errNone
	}
	return t.memory, nil
}

// Damaged returns the template without the end of its device state.
func Damaged(v vmm.Template) (vmm.Template, error) {
	t, ok := v.(*template)
	if !ok {
		return nil, errNone
	}
	damaged := *t
	damaged.state = t.state[:len(t.state)/2]
	return &damaged, nil
}
