//go:build !planted

package plant

// On reports whether the bug is planted: never, in a build without the tag planted.
func On(Bug) bool { return false }
