package cluster

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

func reserveSpace(f *os.File, size int64) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return errNoAllocate
	}
	return err
}
