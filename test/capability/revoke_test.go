package capability

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestRevocationReachesRunningGuests takes a permission away from guests that are
// using it on three nodes, again and again, in every other round losing the leader
// as soon as it has acknowledged that. WASMATRIX_REVOKE_ROUNDS is how often.
func TestRevocationReachesRunningGuests(t *testing.T) {
	const permission = "kv:write:revoked/"
	c := harness.Start(t, dev.Options{Nodes: 3})
	var guests []*relay
	for _, n := range c.Nodes() {
		guests = append(guests, startRelay(t, c, "kv", &pb.WorkloadSpec{
			Name: "writer-" + n.Name(), Placement: &pb.PlacementRules{Node: n.Name()},
			Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: slices.Concat(baseKV, []string{permission})}},
		}))
	}
	var quiet, leaderless []time.Duration
	for round := range rounds(t, "WASMATRIX_REVOKE_ROUNDS", 4) {
		for _, g := range guests {
			grant(t, g, permission)
		}
		denied := make([]<-chan time.Time, len(guests))
		for i, g := range guests {
			denied[i] = firstDenial(t, g)
		}
		victim := c.Leader()
		// One request takes it from all of them in turn; the time counts from the
		// acknowledgement of the last.
		for _, g := range guests {
			_, err := c.Client.RevokeCapability(c.Context(settleTime), &pb.RevokeCapabilityRequest{Target: g.name, ProviderId: "kv", Permissions: []string{permission}})
			if err != nil {
				t.Fatal(err)
			}
		}
		acked := time.Now()
		lose := round%2 == 1
		if lose {
			if err := victim.KillPeer(); err != nil {
				t.Fatal(err)
			}
		}
		var slowest time.Duration
		for i := range denied {
			slowest = max(slowest, (<-denied[i]).Sub(acked))
		}
		if lose {
			leaderless = append(leaderless, slowest)
			if err := victim.Start(); err != nil {
				t.Fatal(err)
			}
			c.Ready()
		} else {
			quiet = append(quiet, slowest)
		}
	}
	for _, g := range guests {
		g.unharmed()
	}
	t.Logf("acknowledged revocation to the last of three nodes' guests denied, %d rounds: %s", len(quiet), distribution(quiet))
	t.Logf("the same with the leader killed after the acknowledgement, %d rounds: %s", len(leaderless), distribution(leaderless))
}

// grant gives a permission and waits until the guest can use it.
func grant(t *testing.T, g *relay, permission string) {
	t.Helper()
	eventually(t, g.Cluster, g.name+" to be allowed", func(ctx context.Context) error {
		_, err := g.Client.AssignCapability(ctx, &pb.AssignCapabilityRequest{
			Target: g.name, Grant: &pb.CapabilityGrant{Provider: "kv", Permissions: []string{permission}},
		})
		if err != nil {
			return err
		}
		return write(ctx, g)
	})
}

func write(ctx context.Context, g *relay) error {
	return g.call(ctx, "kv/set", &pb.KvSetRequest{Key: []byte("revoked/key"), Value: []byte("x")}, &pb.KvSetResponse{})
}

// firstDenial has the guest write without end, and tells when it was first denied.
// After that it must stay so.
func firstDenial(t *testing.T, g *relay) <-chan time.Time {
	denied := make(chan time.Time, 1)
	var done sync.WaitGroup
	t.Cleanup(done.Wait)
	ctx := g.Context(settleTime)
	done.Go(func() {
		for ctx.Err() == nil {
			err := write(ctx, g)
			if code(err) == pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
				at := time.Now()
				for range 20 {
					if err := write(ctx, g); err == nil {
						t.Errorf("%s was allowed again after it had been denied", g.name)
					}
				}
				denied <- at
				return
			}
			if no := (errNoAnswer{}); errors.As(err, &no) && ctx.Err() == nil {
				continue // through a peer that was killed
			}
		}
		t.Errorf("%s was never denied", g.name)
		denied <- time.Now()
	})
	return denied
}

// distribution describes durations.
func distribution(took []time.Duration) string {
	if len(took) == 0 {
		return "none"
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[min(int(q*float64(len(took))), len(took)-1)] }
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, max %s", at(.5), at(.9), at(.99), took[len(took)-1])
}
