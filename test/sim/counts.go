package sim

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"
)

// Counts is what happened in one or more simulated worlds.
type Counts struct {
	// Virtual is simulated time, in nanoseconds.
	Virtual atomic.Int64
	// Worlds counts the seeds that ran to their end.
	Worlds atomic.Int64
	// Messages are those of Raft; Lost, Late and Twice what became of some.
	Messages, Lost, Late, Twice atomic.Int64
	// DiskWrites are those that were acknowledged; WritesFailed failed, and of
	// UnsyncedLost a crash left less than all.
	DiskWrites, WritesFailed, UnsyncedLost atomic.Int64
	// Commands are committed; Acked writes have an answer, Unknown ones none.
	Commands, Acked, Unknown atomic.Int64
	// Reads are linearizable ones, Stale the others.
	Reads, Stale atomic.Int64
	// Effects were accepted by providers, Refused calls of guests were not or had no answer. Starts are those of guests.
	Effects, Refused, Starts atomic.Int64
	// Expiries counts ends of leases, Replaced the instances whose replacement was timed (I6).
	Expiries, Replaced atomic.Int64
	// Checked counts operations that were found linearizable.
	Checked atomic.Int64

	mu     sync.Mutex
	faults map[string]int
}

// fields names the counts, for sums and for what a child tells its parent.
func (c *Counts) fields() map[string]*atomic.Int64 {
	return map[string]*atomic.Int64{
		"virtual": &c.Virtual, "worlds": &c.Worlds, "messages": &c.Messages, "lost": &c.Lost, "late": &c.Late, "twice": &c.Twice,
		"diskWrites": &c.DiskWrites, "writesFailed": &c.WritesFailed, "unsyncedLost": &c.UnsyncedLost, "commands": &c.Commands,
		"acked": &c.Acked, "unknown": &c.Unknown, "reads": &c.Reads, "stale": &c.Stale, "effects": &c.Effects, "refused": &c.Refused,
		"starts": &c.Starts, "expiries": &c.Expiries, "replaced": &c.Replaced, "checked": &c.Checked,
	}
}

func (c *Counts) numbers() map[string]int64 {
	out := map[string]int64{}
	for name, n := range c.fields() {
		out[name] = n.Load()
	}
	return out
}

// Add adds what another process counted.
func (c *Counts) Add(o Outcome) {
	for name, n := range c.fields() {
		n.Add(o.Counts[name])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.faults == nil {
		c.faults = map[string]int{}
	}
	for kind, n := range o.Faults {
		c.faults[kind] += n
	}
}

// fault counts one fault of a kind.
func (c *Counts) fault(kind string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.faults == nil {
		c.faults = map[string]int{}
	}
	c.faults[kind]++
}

// Faults returns how many faults there were of each kind, and in total.
func (c *Counts) Faults() (byKind map[string]int, total int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	byKind = maps.Clone(c.faults)
	for _, n := range byKind {
		total += n
	}
	return byKind, total
}

// String is one line for people.
func (c *Counts) String() string {
	_, faults := c.Faults()
	return fmt.Sprintf("%d worlds, %s virtual, %d faults, %d commands, %d writes acknowledged (%d unknown), %d reads (and %d stale), "+
		"%d effects (%d calls refused), %d guest starts, %d leases expired (%d replacements timed), "+
		"%d messages of Raft (%d lost, %d late, %d twice), %d disk writes (%d failed, %d lost unsynced), %d operations linearizable",
		c.Worlds.Load(), time.Duration(c.Virtual.Load()).Round(time.Second), faults, c.Commands.Load(), c.Acked.Load(), c.Unknown.Load(),
		c.Reads.Load(), c.Stale.Load(), c.Effects.Load(), c.Refused.Load(), c.Starts.Load(), c.Expiries.Load(), c.Replaced.Load(),
		c.Messages.Load(), c.Lost.Load(), c.Late.Load(), c.Twice.Load(),
		c.DiskWrites.Load(), c.WritesFailed.Load(), c.UnsyncedLost.Load(), c.Checked.Load())
}
