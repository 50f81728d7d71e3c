package dispatch

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// skewedClock is a clock that runs at another speed than the real one.
type skewedClock struct {
	began time.Time
	speed float64
}

func newSkewedClock(speed float64) *skewedClock { return &skewedClock{began: time.Now(), speed: speed} }

func (c *skewedClock) Now() time.Time {
	return c.began.Add(time.Duration(float64(time.Since(c.began)) * c.speed))
}

func (c *skewedClock) Timer(d time.Duration) (<-chan time.Time, func()) {
	return systemClock{}.Timer(time.Duration(float64(d)/c.speed) + 1)
}

// agentMargin is the part of the TTL that an agent gives up of it.
const agentMargin = 0.1

// Whatever the clocks of agent and leader do within their drift, and however long
// renewals and their answers are on their way: the agent's own deadline comes
// before the end of its lease is committed, and that comes within its bound.
func TestTheAgentsDeadlineComesBeforeTheLeadersWhateverTheClocksDo(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			speed := func() float64 { return 0.99 + 0.02*rng.Float64() }
			r := newRegistry(t)
			leader := newSkewedClock(speed())
			l := newLead(t, r, "p1", func(c *Config) { c.Clock = leader }).settle(t)
			l.peer.proof = time.Duration(rng.Int64N(int64(300 * time.Millisecond)))
			agent := speed()
			deadline := func(sent time.Time, ttl time.Duration) time.Time {
				return sent.Add(time.Duration(float64(ttl) * (1 - agentMargin) / agent))
			}
			way := func() { time.Sleep(time.Duration(rng.Int64N(int64(250 * time.Millisecond)))) }

			sent := time.Now()
			way()
			own := deadline(sent, l.register(t, "n1", 0).LeaseTtl.AsDuration())
			for range rng.IntN(12) {
				way()
				sent = time.Now()
				way()
				resp, err := l.renew(t, "n1", 1)
				way()
				if err != nil {
					t.Fatalf("seed %d: a node that renews is refused: %v", seed, err)
				}
				if d := deadline(sent, resp.LeaseTtl.AsDuration()); d.After(own) {
					own = d
				}
				time.Sleep(time.Duration(float64(DefaultLeaseTTL/renewalsPerTTL) / agent))
				if r.node("n1").GetState() != pb.NodeState_NODE_STATE_READY {
					t.Fatalf("seed %d: a node that renews was lost", seed)
				}
			}
			for r.node("n1").GetState() == pb.NodeState_NODE_STATE_READY {
				if time.Since(sent) > 4500*time.Millisecond {
					t.Fatalf("seed %d: not lost %s after its last renewal", seed, time.Since(sent))
				}
				pass(time.Millisecond)
			}
			if left := time.Until(own); left > 0 {
				t.Fatalf("seed %d: the end of the lease is committed, and the agent goes on for %s", seed, left)
			}
		})
	}
}

// A leader that stands still for less than a lease has not heard the renewals
// that were sent meanwhile; it must read them before it gives anyone up.
func TestNobodyIsLostForRenewalsThatTheLeaderHasNotReadYet(t *testing.T) {
	for _, stood := range []time.Duration{2500 * time.Millisecond, 2900 * time.Millisecond, 3200 * time.Millisecond, 5 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			r := newRegistry(t)
			clock := &stalledClock{}
			l := newLead(t, r, "p1", func(c *Config) { c.Clock = clock }).settle(t)
			l.register(t, "n1", 0)
			pass(600 * time.Millisecond)
			clock.offset.Store(int64(stood))
			pass(time.Second) // the renewals are read one after the other
			if _, err := l.renew(t, "n1", 1); err != nil {
				t.Fatalf("after %s: %v", stood, err)
			}
			// The one that comes no more is still lost in time.
			pass(held(DefaultLeaseTTL) + time.Millisecond)
			if got := r.node("n1").GetState(); got != pb.NodeState_NODE_STATE_LOST {
				t.Fatalf("after %s: n1, which renews no more, is %s", stood, got)
			}
		})
	}
}
