package dispatch

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-memdb"
	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// renewalsPerTTL is how often an agent renews within a TTL.
	renewalsPerTTL = 4
	// driftDivisor is the drift of clocks that leases allow for: 1 %.
	driftDivisor = 100
	// slack is δ: what a lease lives longer than TTL·(1+drift).
	slack = 100 * time.Millisecond
	// looksPerTTL is how often the leader looks after its leases even when none is
	// due, to notice that it stood still.
	looksPerTTL = 8
	// expiriesAtOnce bounds the expiries proposed side by side; Raft puts them in
	// common batches.
	expiriesAtOnce = 64
	// expiryRetry is when an expiry that could not be committed is proposed again.
	expiryRetry = time.Second
	// actor names this duty in the commands it causes.
	actor = "dispatcher"
)

// leaseSettings is what lease times follow from.
type leaseSettings struct {
	ttl       time.Duration
	perSecond int
}

// ttlFor returns the TTL for a number of nodes, in whole seconds above the
// default: max(default, ceil(4·nodes / renewals per second)).
func (s leaseSettings) ttlFor(nodes int) time.Duration {
	needed := (renewalsPerTTL*nodes + s.perSecond - 1) / s.perSecond
	return max(s.ttl, time.Duration(needed)*time.Second)
}

// held is how long the leader keeps a lease of a TTL after it handled a renewal.
func held(ttl time.Duration) time.Duration {
	if plant.On(plant.ExpireEarly) {
		return ttl * 3 / 4
	}
	return ttl + ttl/driftDivisor + slack
}

// term is the work of one leadership.
type term struct {
	peer     Peer
	clock    Clock
	settings leaseSettings
	log      *slog.Logger
	metrics  *metrics
	leases   *leases
	proofs   *proofs
	dirs     *directories
	quotas   *quotas
	// ttl is the present TTL in nanoseconds.
	ttl atomic.Int64
	// ended is closed when this peer does not lead any more.
	ended chan struct{}
}

func newTerm(peer Peer, clock Clock, settings leaseSettings, log *slog.Logger, m *metrics) *term {
	t := &term{
		peer: peer, clock: clock, settings: settings, log: log, metrics: m,
		leases: newLeases(), proofs: newProofs(), dirs: newDirectories(), quotas: newQuotas(), ended: make(chan struct{}),
	}
	t.ttl.Store(int64(settings.ttl))
	return t
}

func (t *term) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return t.followNodes(ctx) })
	g.Go(func() error { return t.followProviders(ctx) })
	g.Go(func() error { return t.expireLeases(ctx) })
	g.Go(func() error { return t.proofs.run(ctx, t.peer, t.clock) })
	return g.Wait()
}

// view returns the registry as this peer has it. A leader's own state holds all
// that was committed before its term, and its own commits once Propose returns.
func (t *term) view(ctx context.Context) (fsm.View, error) {
	view, err := t.peer.View(ctx, &pb.ReadOptions{Stale: true})
	if err != nil {
		return view, fmt.Errorf("read the registry: %w", err)
	}
	return view, nil
}

func (t *term) leaseTTL() time.Duration { return time.Duration(t.ttl.Load()) }

// followNodes keeps leases, TTL and the directory in step with the registered nodes.
func (t *term) followNodes(ctx context.Context) error {
	for {
		ws, err := t.syncLeases(ctx)
		if err != nil {
			return err
		}
		if err := ws.WatchCtx(ctx); err != nil {
			return err
		}
	}
}

// syncLeases gives a full lease to every READY node without one and drops those
// of dead epochs. It alone drops leases, in the order of the registry, so a lease
// whose end is committed cannot come to life again through an older view.
func (t *term) syncLeases(ctx context.Context) (memdb.WatchSet, error) {
	view, err := t.view(ctx)
	if err != nil {
		return nil, err
	}
	ws := memdb.NewWatchSet()
	nodes := view.Nodes(ws)
	// The last leader may have told a TTL for more READY nodes than there are now,
	// but never for more than were ever registered.
	grace := t.clock.Now().Add(held(t.settings.ttlFor(len(nodes))))
	if plant.On(plant.NoGrace) {
		grace = t.clock.Now()
	}
	ready := 0
	for _, node := range nodes {
		h := holder{node: node.GetId(), epoch: node.GetEpoch()}
		if fsm.Ready(node) {
			ready++
			t.leases.adopt(h, view.Index(), grace)
		} else {
			t.leases.drop(h.node, view.Index())
		}
	}
	t.ttl.Store(int64(t.settings.ttlFor(ready)))
	t.metrics.countNodes(nodes)
	t.dirs.nodes.sync(nodes)
	return ws, nil
}

// followProviders keeps the directory of providers in step.
func (t *term) followProviders(ctx context.Context) error {
	for {
		view, err := t.view(ctx)
		if err != nil {
			return err
		}
		ws := memdb.NewWatchSet()
		t.dirs.syncProviders(view.Providers(ws))
		if err := ws.WatchCtx(ctx); err != nil {
			return err
		}
	}
}

// expireLeases ends leases that have run out. When it gets to one much later than
// it should, this process or its disk stood still, and renewals may have too:
// then every lease gets its full time once more. The same holds when it looks much
// later than it meant to: what nodes sent meanwhile still waits to be read.
func (t *term) expireLeases(ctx context.Context) error {
	for {
		now, ttl := t.clock.Now(), t.leaseTTL()
		if late := t.leases.overdue(now); late > ttl/renewalsPerTTL {
			t.log.WarnContext(ctx, "leases were not looked after in time; every one is extended", "late", late)
			t.leases.forgive(now.Add(held(ttl)))
		}
		due, next := t.leases.expire(now)
		if len(due) > 0 {
			if err := t.commitExpiries(ctx, due); err != nil {
				return err
			}
			continue
		}
		if pulse := now.Add(ttl / looksPerTTL); !next.IsZero() && pulse.Before(next) {
			next = pulse
		}
		if err := t.waitUntil(ctx, now, next); err != nil {
			return err
		}
		if woke := t.clock.Now(); !next.IsZero() && woke.Sub(next) > ttl/looksPerTTL {
			t.log.WarnContext(ctx, "this process stood still; leases that would have ended are extended", "late", woke.Sub(next))
			t.leases.forgive(woke.Add(ttl))
		}
	}
}

// waitUntil waits for next, for ever if it is zero, or for a lease that may end sooner.
func (t *term) waitUntil(ctx context.Context, now, next time.Time) error {
	var fired <-chan time.Time
	if !next.IsZero() {
		timer, stop := t.clock.Timer(next.Sub(now))
		defer stop()
		fired = timer
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.leases.sooner:
	case <-fired:
	}
	return nil
}

// commitExpiries ends the epochs of leases that ran out. The leases go when the
// registry shows it. An error means that this peer does not lead any more.
func (t *term) commitExpiries(ctx context.Context, due []holder) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(expiriesAtOnce)
	for _, h := range due {
		g.Go(func() error { return t.commitExpiry(ctx, h) })
	}
	return g.Wait()
}

func (t *term) commitExpiry(ctx context.Context, h holder) error {
	log := t.log.With("node", h.node, "epoch", h.epoch)
	result, err := t.peer.Propose(ctx, &pb.Command{
		Actor: actor,
		Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{
			NodeId: h.node, Epoch: h.epoch,
		}},
	})
	switch {
	case err == nil && result.GetEpoch() != h.epoch:
		// The registry knows the node by another epoch: it has registered meanwhile, or
		// a snapshot was restored. That epoch needs a lease to end by, too.
		t.leases.adopt(holder{h.node, result.GetEpoch()}, result.GetIndex(), t.clock.Now().Add(held(t.leaseTTL())))
		return nil
	case err == nil:
		t.metrics.expirations.Inc()
		log.WarnContext(ctx, "lease expired")
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_NO_LEADER:
		return fmt.Errorf("expire node %s: %w", h.node, err)
	case apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND:
		t.leases.drop(h.node, math.MaxUint64)
		return nil
	default:
		log.ErrorContext(ctx, "the end of a lease was not committed", "retry_in", expiryRetry, "error", err)
		t.leases.retry(h, t.clock.Now().Add(expiryRetry))
		return nil
	}
}
