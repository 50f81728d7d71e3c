// Package crew runs functions on goroutines that it uses again. It is a leaf.
package crew

import "time"

// idleTime is how long a goroutine of a crew waits for more to do.
const idleTime = 200 * time.Millisecond

// Crew runs functions on goroutines that it uses again. It is for work that needs
// far more stack than a new goroutine has: letting it grow can take longer than
// anything else. It is safe for concurrent use and needs no closing; goroutines
// without work end by themselves.
type Crew struct {
	work chan func()
}

// New returns a Crew without goroutines.
func New() *Crew { return &Crew{work: make(chan func())} }

// Run runs f on a goroutine, a waiting one if there is any. It does not wait for f.
func (c *Crew) Run(f func()) {
	select {
	case c.work <- f:
	default:
		go c.serve(f)
	}
}

func (c *Crew) serve(f func()) {
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	for {
		f()
		idle.Reset(idleTime)
		select {
		case f = <-c.work:
		case <-idle.C:
			return
		}
	}
}
