package dev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// ErrInUse is returned when a development cluster runs in the directory already.
var ErrInUse = errors.New("a development cluster runs in this directory already")

// lockDir takes the lock of a cluster's directory and writes this process's id
// into it. The kernel releases it however the process ends; the nodes do not
// inherit it. The caller closes the file.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the cluster's directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the cluster's directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		raw := make([]byte, 32)
		n, _ := f.ReadAt(raw, 0)
		holder := strings.TrimSpace(string(raw[:n]))
		return nil, errors.Join(fmt.Errorf("%w: %s is held by pid %s; stop that one or choose another directory", ErrInUse, dir, holder), f.Close())
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock the cluster's directory: %w", err), f.Close())
	}
	return f, nil
}
