//go:build !linux

package raftfile

import "os"

// dropCache does nothing where the cache cannot be dropped.
func dropCache(*os.File) {}
