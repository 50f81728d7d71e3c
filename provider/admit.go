package provider

import (
	"strconv"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/plant"
)

// Clock reads a clock in nanoseconds from some moment on. It never goes back and
// goes on while the machine sleeps.
type Clock func() time.Duration

// monotonic is the Clock of those who give none.
func monotonic() Clock {
	start := time.Now()
	return func() time.Duration { return time.Since(start) }
}

// Tenure is for how long an instance may have effects.
type Tenure interface {
	// Ends returns when it ends, on the node's clock; held is false once it has.
	Ends() (at time.Duration, held bool)
}

// Mark says how new a placement of an instance is. Created is the Raft index at
// which the instance was accepted, 0 where that is not known: ids of removed
// instances may be used again.
type Mark struct {
	Created, Generation uint64
}

// Before reports whether m is older than other.
func (m Mark) Before(other Mark) bool {
	if m.Created != other.Created && m.Created != 0 && other.Created != 0 {
		return m.Created < other.Created
	}
	if plant.On(plant.FencingOffByOne) {
		return m.Generation+1 < other.Generation
	}
	return m.Generation < other.Generation && !plant.On(plant.ServesAnyGeneration)
}

// admission is what was known when a call was allowed, and until when that holds.
// That of a user's call is zero.
type admission struct {
	router *Router
	// seen is the directory's count of changes to instances at that moment.
	seen uint64
	// node is the caller's.
	node string
	// port is the caller's, on this node; nil for a call from another.
	port *Port
	// notAfter limits a call from another node; 0 is no limit.
	notAfter time.Duration
}

// Admit reports whether the call may still have its effect. Time passes between
// the decision to allow a call and its effect, all the more where a process is
// stopped for a while: a newer generation may have come, or the caller's time may
// be up. So a provider calls Admit where nothing can come in between: under the
// lock, or in the transaction, in which the effect happens. It costs a few
// nanoseconds. Its errors are ErrDenied for a generation that was superseded or
// an instance that may not call any more, and ErrConflict for a call whose time
// is up; then the call must have no effect.
func (c *Call) Admit() error {
	a := &c.admission
	if a.router == nil {
		return nil
	}
	if a.port != nil {
		if err := a.port.alive(); err != nil {
			return err
		}
	}
	if a.notAfter != 0 && a.router.clock() > a.notAfter && !plant.On(plant.LateCalls) {
		return Errorf(ErrConflict, "the call of instance %s came too late: its time was up", c.Instance).
			With("instance", c.Instance)
	}
	if a.router.directory.turns.Load() == a.seen {
		return nil
	}
	return a.router.directory.still(c)
}

// Left returns for how long the call may still have its effect; limited is false
// when that is as long as its context lives. It is for a provider whose effect
// happens elsewhere, where Admit cannot be asked.
func (c *Call) Left() (left time.Duration, limited bool) {
	a := &c.admission
	switch {
	case a.router == nil:
		return 0, false
	case a.notAfter != 0:
		return a.notAfter - a.router.clock(), true
	case a.port != nil && a.port.tenure != nil:
		at, held := a.port.tenure.Ends()
		if !held {
			return 0, true
		}
		return at - a.router.clock(), true
	default:
		return 0, false
	}
}

// Mark returns how new the caller's placement is; the zero Mark for a user.
func (c *Call) Mark() Mark { return Mark{Created: c.Created, Generation: c.Generation} }

func tenureEnded(instance string) *Error {
	return Errorf(ErrConflict, "the lease of the node has ended and instance %s is tied to it", instance).
		With("instance", instance).With("on_disconnect", "stop")
}

// Superseded refuses a call of an older placement than the newest one seen.
func Superseded(instance string, have, newest Mark) *Error {
	return Errorf(ErrDenied, "generation %d of instance %s was superseded by generation %d", have.Generation, instance, newest.Generation).
		With("instance", instance).With("generation", strconv.FormatUint(have.Generation, 10)).
		With("current_generation", strconv.FormatUint(newest.Generation, 10)).
		NextStep("wasmatrix instance get %s", instance)
}

// still looks again at what allowed a call.
func (d *Directory) still(c *Call) error {
	d.mu.RLock()
	rec, fence := d.instances[c.Instance], d.fence(c.Instance)
	d.mu.RUnlock()
	switch {
	case c.Mark().Before(fence):
		return Superseded(c.Instance, c.Mark(), fence)
	case rec == nil || rec.Node != c.admission.node:
		return Errorf(ErrDenied, "instance %s may not call any more", c.Instance).With("instance", c.Instance)
	default:
		return nil
	}
}

// Fence keeps the newest placement seen of each instance, for a provider that
// keeps its data in memory. It belongs under the provider's own lock; the zero
// Fence is ready. It forgets those that have not called for a long time, once
// there are very many.
type Fence struct {
	recent, older map[string]Mark
}

// Seen returns the newest placement seen of an instance.
func (f *Fence) Seen(instance string) Mark {
	if m, ok := f.recent[instance]; ok {
		return m
	}
	return f.older[instance]
}

// Raise records a placement unless a newer one was seen.
func (f *Fence) Raise(instance string, m Mark) {
	if f.recent == nil || len(f.recent) >= maxFences {
		f.older, f.recent = f.recent, make(map[string]Mark)
	}
	if !m.Before(f.Seen(instance)) {
		f.recent[instance] = m
	}
}
