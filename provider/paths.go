package provider

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

const (
	// breakAfter is after how many calls in a row that did not get through a replica
	// is left alone, breakFor for how long, and probeTimeout how long it may then take
	// to show that it is there again. Together the two bound for how long one that has
	// recovered stays hidden.
	breakAfter   = 3
	breakFor     = 700 * time.Millisecond
	probeTimeout = 500 * time.Millisecond
	// doubtFor is for how long a replica that did not serve, or took too long, comes
	// after the others.
	doubtFor = time.Second
	// maxPaths is with how many paths those that are not in use are forgotten.
	maxPaths = 4096
)

// paths are the ways to the replicas on other nodes, with what is known of their health.
type paths struct {
	remote Remote
	turn   atomic.Uint64 // whose turn it is among equals

	mu    sync.RWMutex
	known map[pathKey]*path
}

type pathKey struct{ provider, address string }

// path is the way to one replica.
type path struct {
	flying  atomic.Int64
	doubted atomic.Int64 // until when it comes after others, in Unix nanoseconds
	opened  atomic.Int64 // when the breaker opened, in Unix nanoseconds
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
}

func newPaths(remote Remote) *paths {
	return &paths{remote: remote, known: map[pathKey]*path{}}
}

func newPath() *path {
	p := &path{}
	p.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests: 1,
		Timeout:     breakFor,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakAfter },
		OnStateChange: func(_ string, _, to gobreaker.State) {
			if to == gobreaker.StateOpen {
				p.opened.Store(time.Now().UnixNano())
			}
		},
		IsSuccessful: func(err error) bool { return !TransportFailed(err) },
	})
	return p
}

func (s *paths) get(provider, address string) *path {
	key := pathKey{provider, address}
	s.mu.RLock()
	p, ok := s.known[key]
	s.mu.RUnlock()
	if ok {
		return p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.known[key]; ok {
		return p
	}
	if len(s.known) >= maxPaths {
		for k, p := range s.known {
			if p.flying.Load() == 0 {
				delete(s.known, k)
			}
		}
	}
	p = newPath()
	s.known[key] = p
	return p
}

// candidate is a replica that a call may go to.
type candidate struct {
	path    *path
	node    string
	address string
}

// candidates returns the replicas on other nodes that take calls as far as is
// known here, the best first: those that answer, then those with the fewest calls
// under way, then in turn.
func (r *Router) candidates(ctx context.Context, f *Facts) []candidate {
	self := r.directory.Self()
	if len(f.Replicas) < 2 {
		p := f.Provider
		if p.Node == self || reachable(p, f.Address) != nil {
			return nil
		}
		return []candidate{{r.paths.get(p.ID, f.Address), p.Node, f.Address}}
	}
	type ranked struct {
		candidate
		worse  int
		flying int64
	}
	now := time.Now().UnixNano()
	all := make([]ranked, 0, len(f.Replicas))
	for _, rec := range f.Replicas {
		address, _ := r.directory.NodeAddress(rec.Node)
		if rec.Node == self || reachable(rec, address) != nil {
			continue
		}
		p := r.paths.get(rec.ID, address)
		c := ranked{candidate: candidate{p, rec.Node, address}, flying: p.flying.Load()}
		switch {
		case p.breaker.State() != gobreaker.StateClosed:
			c.worse = 2
		case now < p.doubted.Load():
			c.worse = 1
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil
	}
	first := int(r.paths.turn.Add(1) % uint64(len(all)))
	all = append(all[first:], all[:first]...)
	slices.SortStableFunc(all, func(a, b ranked) int {
		if a.worse != b.worse {
			return a.worse - b.worse
		}
		return int(a.flying - b.flying)
	})
	out := make([]candidate, len(all))
	healthy := 0
	for i := range all {
		out[i] = all[i].candidate
		if all[i].worse < 2 {
			healthy = i + 1
		}
	}
	if healthy > 0 {
		r.revisit(ctx, out[healthy:], f.Provider.ID)
	}
	return out
}

// begin asks whether a call may go to a replica, and counts it; finish, which must
// be called with how it ended, counts it back.
func (s *paths) begin(ctx context.Context, c *candidate, provider string) (finish func(error), err error) {
	if c.path.breaker.State() != gobreaker.StateClosed {
		if err := s.probe(ctx, c, provider); err != nil {
			return nil, err
		}
	}
	done, err := c.path.breaker.Allow()
	if err != nil {
		return nil, c.leftAlone(provider)
	}
	c.path.flying.Add(1)
	return func(err error) {
		c.path.flying.Add(-1)
		if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTimeout) {
			c.path.doubted.Store(time.Now().Add(doubtFor).UnixNano())
		}
		done(err)
	}, nil
}

// probe finds out whether a replica that was left alone is there again. It asks
// for something without an effect, and only for a short time, so that other calls
// are not held up by the one that is made first.
func (s *paths) probe(ctx context.Context, c *candidate, provider string) error {
	done, err := c.path.breaker.Allow()
	if err != nil {
		return c.leftAlone(provider)
	}
	err = s.ask(ctx, c, provider)
	done(err)
	return err
}

// ask is a probe that the breaker has allowed.
func (s *paths) ask(ctx context.Context, c *candidate, provider string) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout)
	defer cancel()
	err := s.remote.Probe(bounded, c.address)
	if err == nil {
		return nil
	}
	return Errorf(ErrCommunication, "node %s at %s could not be reached: %s", c.node, c.address, err).
		With("node", c.node).With("address", c.address).With("provider", provider).
		NextStep("wasmatrix node list").Because(err).OnTheWay()
}

// revisit probes replicas that were left alone for long enough, without a call that
// would wait for it: as long as others answer, none would ever come to them.
func (r *Router) revisit(ctx context.Context, list []candidate, provider string) {
	for i := range list {
		c := list[i]
		if c.path.breaker.State() != gobreaker.StateHalfOpen {
			continue
		}
		if done, err := c.path.breaker.Allow(); err == nil {
			r.crew.Run(func() { done(r.paths.ask(ctx, &c, provider)) })
		}
	}
}

func (c *candidate) leftAlone(provider string) error {
	until := time.Unix(0, c.path.opened.Load()).Add(breakFor).UTC().Format(time.RFC3339Nano)
	return Errorf(ErrCommunication, "node %s at %s could not be reached by the last calls; the next is made after %s", c.node, c.address, until).
		With("node", c.node).With("address", c.address).With("provider", provider).With("until", until).
		NextStep("wasmatrix node list").OnTheWay()
}

// elsewhere reports whether a call that failed at one replica may go to another:
// the first certainly did not carry it out, or it may be carried out twice.
func elsewhere(err error, repeatable bool) bool {
	if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrCommunication) {
		return false
	}
	e, own := errors.AsType[*Error](err)
	return repeatable || own && e.Details[DetailOutcome] != OutcomeUnknown
}
