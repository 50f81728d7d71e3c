package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	openTimeout  = 30 * time.Second
	drainTimeout = 10 * time.Second
)

// openBackoff paces the opening of a driver that fails.
var openBackoff = restartPolicy{backoff: time.Second, maxBackoff: 30 * time.Second}

// providerHost opens and closes providers; *provider.Host is one.
type providerHost interface {
	Start(ctx context.Context, typ string, cfg provider.Config) error
	Update(ctx context.Context, typ string, cfg provider.Config) error
	Serves(id string) bool
	Drain(id string) (inFlight int)
	Stop(ctx context.Context, id string) error
}

// hosting keeps the providers that are placed on this node as they are wanted.
type hosting struct {
	node   string
	dir    string
	host   providerHost
	report func(*pb.ProviderReport)
	log    *slog.Logger
	// messages is what messaging providers get; may be nil.
	messages provider.Messages

	mu        sync.Mutex
	providers map[string]*hostedProvider // by id: no two replicas of one are on a node
	fresh     []*hostedProvider
	wake      chan struct{}
}

// hostedProvider is one provider of this node. Its goroutine opens, reopens and
// closes the driver.
type hostedProvider struct {
	id   string
	wake chan struct{}

	// What follows is guarded by hosting.mu.
	want *pb.Provider       // nil: no longer placed here
	last *pb.ProviderReport // what was last observed

	// What follows belongs to the goroutine.
	have  providerHave
	tries int
}

// run keeps the providers until ctx ends, then drains and closes them.
func (h *hosting) run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		h.mu.Lock()
		fresh := h.fresh
		h.fresh = nil
		h.mu.Unlock()
		for _, p := range fresh {
			running.Go(func() { h.keep(ctx, p) })
		}
		select {
		case <-h.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// put says how a replica of a provider is wanted; one placed on another node is
// not wanted here.
func (h *hosting) put(rec *pb.Provider) {
	if rec.GetPlacement().GetNodeId() != h.node {
		h.remove(provider.ReplicaKey(rec.GetId(), rec.GetReplica()))
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.providers[rec.GetId()]
	if !ok {
		p = &hostedProvider{id: rec.GetId(), wake: make(chan struct{}, 1)}
		h.providers[p.id] = p
		h.fresh = append(h.fresh, p)
		poke(h.wake)
	}
	p.want = rec
	poke(p.wake)
}

// remove says that a replica, named by its provider.ReplicaKey, is not placed on
// this node. Another one of the same provider may be.
func (h *hosting) remove(key string) {
	id, _, _ := strings.Cut(key, "/")
	h.mu.Lock()
	defer h.mu.Unlock()
	if p, ok := h.providers[id]; ok && p.want != nil && provider.ReplicaKey(id, p.want.GetReplica()) == key {
		p.want = nil
		poke(p.wake)
	}
}

// replace makes records all that is known of providers.
func (h *hosting) replace(records map[string]*pb.Provider) {
	here := map[string]bool{}
	for _, rec := range records {
		if rec.GetPlacement().GetNodeId() == h.node {
			here[rec.GetId()] = true
			h.put(rec)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, p := range h.providers {
		if !here[id] {
			p.want = nil
			poke(p.wake)
		}
	}
}

func poke(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// keep is the goroutine of one provider.
func (h *hosting) keep(ctx context.Context, p *hostedProvider) {
	done := ctx.Done()
	for {
		h.mu.Lock()
		want := p.want
		h.mu.Unlock()
		var due <-chan time.Time
		switch stepProvider(want, p.have, ctx.Err() != nil, time.Now()) {
		case providerOpen:
			h.open(ctx, p, want)
			continue
		case providerUpdate:
			h.update(ctx, p, want)
			continue
		case providerAdopt:
			p.have.placed(want)
			h.tell(p, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
			continue
		case providerClose:
			h.close(ctx, p, want)
			continue
		case providerForget:
			if h.forget(p, ctx.Err() != nil) {
				return
			}
			continue
		case providerAwait:
			due = time.After(time.Until(p.have.due))
		case providerRest:
		}
		select {
		case <-p.wake:
		case <-due:
		case <-done:
			done = nil
		}
	}
}

func (h *hosting) forget(p *hostedProvider, shutdown bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.want == nil {
		delete(h.providers, p.id)
		return true
	}
	return shutdown
}

func (h *hosting) config(want *pb.Provider) provider.Config {
	return provider.Config{
		ID: want.GetId(), Driver: want.GetSpec().GetDriver(), Settings: want.GetSpec().GetConfig(),
		Dir: filepath.Join(h.dir, want.GetId()), StopGrace: stopGrace(want),
		Node: h.node, Messages: h.messages,
	}
}

// stopGrace is how long calls in flight may take to finish.
func stopGrace(want *pb.Provider) time.Duration {
	if d := want.GetStopGrace(); d != nil {
		return max(d.AsDuration(), time.Millisecond)
	}
	return provider.DefaultStopGrace
}

func (h *hosting) open(ctx context.Context, p *hostedProvider, want *pb.Provider) {
	if p.have.specVersion != want.GetSpecVersion() || !p.have.same(want) {
		p.tries = 0
	}
	p.have = providerHave{specVersion: want.GetSpecVersion()}
	p.have.placed(want)
	h.tell(p, pb.ProviderState_PROVIDER_STATE_STARTING, "")
	bounded, cancel := context.WithTimeout(ctx, stopGrace(want)+openTimeout)
	defer cancel()
	if err := h.host.Start(bounded, want.GetSpec().GetType(), h.config(want)); err != nil {
		h.failed(ctx, p, want, "opening a provider failed", err)
		return
	}
	p.have.open, p.tries = true, 0
	h.tell(p, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
}

// update gives an open provider its new driver or configuration. When that fails
// the one before goes on, and it is tried again.
func (h *hosting) update(ctx context.Context, p *hostedProvider, want *pb.Provider) {
	if p.have.tried != want.GetSpecVersion() {
		p.tries = 0
	}
	bounded, cancel := context.WithTimeout(ctx, stopGrace(want)+openTimeout)
	defer cancel()
	err := h.host.Update(bounded, want.GetSpec().GetType(), h.config(want))
	if err == nil {
		p.have.specVersion, p.have.due, p.tries = want.GetSpecVersion(), time.Time{}, 0
		h.tell(p, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
		return
	}
	p.have.open = h.host.Serves(p.id)
	h.failed(ctx, p, want, "changing the configuration of a provider failed", err)
}

// failed plans the next try of what went wrong, and reports it.
func (h *hosting) failed(ctx context.Context, p *hostedProvider, want *pb.Provider, what string, err error) {
	p.tries++
	delay := openBackoff.delay(p.tries, rand.Float64())
	p.have.due, p.have.tried = time.Now().Add(delay), want.GetSpecVersion()
	h.log.WarnContext(ctx, what, "provider", p.id, "error", err, "retry_in", delay, "still_serving", p.have.open)
	if p.have.open {
		h.tell(p, pb.ProviderState_PROVIDER_STATE_RUNNING, fmt.Sprintf("still with the configuration before: %s", err))
		return
	}
	p.have.specVersion = want.GetSpecVersion()
	h.tell(p, pb.ProviderState_PROVIDER_STATE_FAILED, err.Error())
}

// close drains and closes the driver. Nothing is reported of a provider that has
// left this node, nor of one that ends with the agent: it is still wanted.
func (h *hosting) close(ctx context.Context, p *hostedProvider, want *pb.Provider) {
	told := want != nil && !want.GetDesiredRunning()
	grace, outcome := drainTimeout, ""
	if told {
		p.have.placed(want)
		grace = stopGrace(want)
	}
	if p.have.open {
		inFlight := h.host.Drain(p.id)
		if told {
			h.draining(p, inFlight)
		}
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if err := h.host.Stop(bounded, p.id); err != nil {
			outcome = err.Error()
			h.log.WarnContext(ctx, "closing a provider failed", "provider", p.id, "error", err)
		}
	}
	p.have.open, p.have.stopped, p.have.due = false, told, time.Time{}
	if told {
		h.tell(p, pb.ProviderState_PROVIDER_STATE_STOPPED, outcome)
	}
}

// draining reports that a provider finishes what is under way.
func (h *hosting) draining(p *hostedProvider, inFlight int) {
	st := p.have.status(pb.ProviderState_PROVIDER_STATE_DRAINING, "")
	st.CallsInFlight = uint32(min(inFlight, math.MaxInt32)) //nolint:gosec // bounded
	h.record(p, st)
}

// tell records and reports a state of the provider's present generation.
func (h *hosting) tell(p *hostedProvider, state pb.ProviderState, message string) {
	h.record(p, p.have.status(state, message))
}

func (h *hosting) record(p *hostedProvider, st *pb.ProviderStatus) {
	r := &pb.ProviderReport{ProviderId: p.id, Replica: p.have.replica, Status: st}
	h.mu.Lock()
	p.last = r
	h.mu.Unlock()
	h.report(r)
}

// reports returns what was last observed of each provider.
func (h *hosting) reports() []*pb.ProviderReport {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []*pb.ProviderReport
	for _, p := range h.providers {
		if p.last != nil {
			out = append(out, p.last)
		}
	}
	return out
}

// states counts the hosted providers by state, for the metrics.
func (h *hosting) states() map[pb.ProviderState]int {
	counts := map[pb.ProviderState]int{}
	for _, r := range h.reports() {
		counts[r.GetStatus().GetState()]++
	}
	return counts
}

// health says which providers of this node do not serve though they should.
func (h *hosting) health() (ready bool, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	serving, wanted, trouble := 0, 0, ""
	for _, id := range slices.Sorted(maps.Keys(h.providers)) {
		p := h.providers[id]
		if !p.want.GetDesiredRunning() {
			continue
		}
		wanted++
		if p.last.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_RUNNING {
			serving++
			continue
		}
		trouble += fmt.Sprintf("; %s is %s", id, providerStateLabel(p.last.GetStatus().GetState()))
		if m := p.last.GetStatus().GetMessage(); m != "" {
			trouble += " (" + m + ")"
		}
	}
	return serving == wanted, fmt.Sprintf("%d of %d serve%s", serving, wanted, trouble)
}
