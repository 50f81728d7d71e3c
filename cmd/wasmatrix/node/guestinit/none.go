//go:build !(guestinit && linux && amd64)

package guestinit

// Program returns the init, nil when this binary holds none.
func Program() ([]byte, error) { return nil, nil }
