//go:build !linux

package agent

import "time"

// bootClock returns a clock that never goes back. Outside Linux it may stand
// still while the machine sleeps, so that a lease looks longer than it is by
// that time.
func bootClock() func() time.Duration {
	began := time.Now()
	return func() time.Duration { return time.Since(began) }
}
