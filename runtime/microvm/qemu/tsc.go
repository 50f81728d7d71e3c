//go:build linux && amd64

package qemu

import (
	"context"
	"time"
)

// timestamp reads the processor's time-stamp counter.
func timestamp() uint64

// calibration is how long the counter is watched to learn its frequency; the
// error is some ten microseconds in that.
const calibration = 200 * time.Millisecond

// counterKHz measures the frequency of the time-stamp counter. Emulated machines
// see the counter of the node, and a kernel that has to measure it itself on a
// busy node often measures nonsense and hangs.
func counterKHz(ctx context.Context) (uint64, error) {
	began, from := time.Now(), timestamp()
	select {
	case <-time.After(calibration):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	ticks := timestamp() - from
	return ticks * uint64(time.Millisecond) / uint64(time.Since(began)), nil
}
