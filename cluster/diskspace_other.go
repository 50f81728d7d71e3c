//go:build !linux

package cluster

import "os"

func reserveSpace(*os.File, int64) error { return errNoAllocate }
