package sim

import (
	"sync"
	"time"
)

// Clock is the clock of one machine. It runs a little too fast or too slow, and
// its time of day may be wrong and jump.
type Clock struct {
	began time.Time
	rate  float64

	mu     sync.Mutex
	offset time.Duration
}

// newClock returns a clock that gains drift seconds in a second and is off by offset.
func newClock(drift float64, offset time.Duration) *Clock {
	return &Clock{began: time.Now(), rate: 1 + drift, offset: offset}
}

// Elapsed is the machine's monotonic clock: what leases are measured with.
func (c *Clock) Elapsed() time.Duration {
	return time.Hour + time.Duration(float64(time.Since(c.began))*c.rate)
}

// Until returns when, in the time of the simulation, Elapsed will show at.
func (c *Clock) Until(at time.Duration) time.Time {
	return c.began.Add(time.Duration(float64(at-time.Hour) / c.rate))
}

// Wall is the machine's time of day.
func (c *Clock) Wall() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.began.Add(c.Elapsed() - time.Hour + c.offset)
}

// jump moves the time of day.
func (c *Clock) jump(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset += by
}

// Now implements dispatch.Clock with the monotonic clock.
func (c *Clock) Now() time.Time { return c.began.Add(c.Elapsed()) }

// Timer implements dispatch.Clock. It fires when the clock shows that d is over,
// never a nanosecond before: simulated time does not pass by itself meanwhile.
func (c *Clock) Timer(d time.Duration) (<-chan time.Time, func()) {
	timer := time.NewTimer(time.Duration(float64(d)/c.rate) + time.Microsecond)
	return timer.C, func() { timer.Stop() }
}
