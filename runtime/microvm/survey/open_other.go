//go:build !linux || !amd64

package survey

import (
	"context"
	"errors"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// supported says that there is no driver for this platform.
func supported() error { return errors.New("virtual machines need Linux on x86-64") }

func (*Survey) look(Options) {}

func (*Survey) open(context.Context, Options, image) (vmm.Driver, error) {
	return nil, vmm.ErrUnavailable
}
