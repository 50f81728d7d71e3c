package agent

import (
	"time"

	"golang.org/x/sys/unix"
)

// bootClock returns a clock that never goes back and goes on while the machine
// sleeps: a lease must not look alive after a suspend.
func bootClock() func() time.Duration {
	return func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
			// CLOCK_BOOTTIME exists on every kernel that Go supports; without it
			// no lease can be trusted.
			panic("agent: reading CLOCK_BOOTTIME: " + err.Error())
		}
		return time.Duration(ts.Nano())
	}
}
