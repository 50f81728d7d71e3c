package remote

import (
	"context"
	"sync"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	// driftDivisor is the drift of clocks that a limit allows for: 1 %.
	driftDivisor = 100
	// readEvery is how old a reading may be: what it loses to drift grows with its age.
	readEvery = 10 * time.Second
)

// The detail of a refusal of a call that is limited by an unknown clock.
const (
	detailClock  = "clock"
	clockUnknown = "unknown"
)

// clocks turns moments of this node's clock into moments of other agents' clocks
// that come no later. For that it needs one reading of the other clock: what was
// read by the time the answer was here cannot have been read later than that.
type clocks struct {
	clock provider.Clock

	mu    sync.Mutex
	known map[string]reading // by address
}

// reading is what another agent's clock showed at some time before here.
type reading struct {
	id   uint64
	now  time.Duration
	here time.Duration
}

func newClocks(clock provider.Clock) *clocks {
	return &clocks{clock: clock, known: map[string]reading{}}
}

// limit writes into caller until when the agent at address may let the call have
// its effect: no later than notAfter on this node's clock. It asks that agent for
// its clock unless it did so lately.
func (c *clocks) limit(ctx context.Context, agent pb.NodeAgentServiceClient, address string, caller *pb.InstanceCaller, notAfter time.Duration) error {
	c.mu.Lock()
	r, ok := c.known[address]
	c.mu.Unlock()
	if !ok || c.clock()-r.here > readEvery {
		resp, err := agent.ReadClock(ctx, &pb.ReadClockRequest{})
		if err != nil {
			return err
		}
		r = c.learn(address, resp.GetClock())
	}
	caller.Clock, caller.NotAfter = r.id, int64(r.until(notAfter))
	return nil
}

// until returns a moment of the other clock that comes no later than notAfter.
// It is never 0, which would mean no limit.
func (r reading) until(notAfter time.Duration) time.Duration {
	left := notAfter - r.here
	return max(r.now+left-left.Abs()/driftDivisor, 1)
}

// learn takes up a reading that has just arrived. An older one may tell more: of
// two, the one that was on its way for less time. But it would have to be found
// out which that is, and a way takes little beside what a limit leaves.
func (c *clocks) learn(address string, at *pb.AgentClock) reading {
	r := reading{id: at.GetId(), now: time.Duration(at.GetNow()), here: c.clock()}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[address] = r
	return r
}

func (c *clocks) forget(address string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.known, address)
}
