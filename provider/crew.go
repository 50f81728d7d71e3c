package provider

import "time"

// crewIdle is how long a goroutine of a crew waits for more to do.
const crewIdle = 200 * time.Millisecond

// crew runs functions on goroutines that it uses again. What a call to another
// node needs of stack is far more than a new goroutine has, and letting it grow
// takes longer than anything else that is done for the call here.
type crew struct {
	work chan func()
}

func newCrew() *crew { return &crew{work: make(chan func())} }

// run runs f on a goroutine, a waiting one if there is any.
func (c *crew) run(f func()) {
	select {
	case c.work <- f:
	default:
		go c.serve(f)
	}
}

func (c *crew) serve(f func()) {
	idle := time.NewTimer(crewIdle)
	defer idle.Stop()
	for {
		f()
		idle.Reset(crewIdle)
		select {
		case f = <-c.work:
		case <-idle.C:
			return
		}
	}
}
