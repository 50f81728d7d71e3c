package dispatch

import "time"

// Clock is what leases are measured with. It must not go back, and it may stand
// still while the machine is suspended: that only makes leases end later.
type Clock interface {
	// Now returns the present time.
	Now() time.Time
	// Timer returns a channel that gets one value after d, and a function that
	// releases the timer.
	Timer(d time.Duration) (fired <-chan time.Time, stop func())
}

// systemClock is the machine's monotonic clock.
type systemClock struct{}

// Now implements Clock.
func (systemClock) Now() time.Time { return time.Now() }

// Timer implements Clock.
func (systemClock) Timer(d time.Duration) (<-chan time.Time, func()) {
	timer := time.NewTimer(d)
	return timer.C, func() { timer.Stop() }
}
