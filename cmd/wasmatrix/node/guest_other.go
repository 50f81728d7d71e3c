//go:build !linux

package node

// BecomeInit does nothing: virtual machines run Linux.
func BecomeInit([]string) {}
