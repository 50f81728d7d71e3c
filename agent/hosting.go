package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

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
	Stop(ctx context.Context, id string) error
}

// hosting keeps the providers that are placed on this node as they are wanted.
type hosting struct {
	node   string
	dir    string
	host   providerHost
	report func(id string, st *pb.ProviderStatus)
	log    *slog.Logger

	mu        sync.Mutex
	providers map[string]*hostedProvider
	fresh     []*hostedProvider
	wake      chan struct{}
}

// hostedProvider is one provider of this node. Its goroutine opens, reopens and
// closes the driver.
type hostedProvider struct {
	id   string
	wake chan struct{}

	// What follows is guarded by hosting.mu.
	want   *pb.Provider // nil: no longer placed here
	status *pb.ProviderStatus

	// What follows belongs to the goroutine.
	have  providerHave
	tries int
}

// providerHave is what the goroutine of a provider last did.
type providerHave struct {
	open        bool
	stopped     bool // STOPPED was reported for generation
	generation  uint64
	nodeEpoch   uint64
	specVersion uint64
	due         time.Time // of the next try; zero when none failed
}

// providerStep is what the goroutine of a provider does next.
type providerStep int

// The steps of a provider.
const (
	providerRest   providerStep = iota // wait for news
	providerAwait                      // wait for news, and until due
	providerOpen                       // open the driver, closing the old one first
	providerAdopt                      // go on under a new generation
	providerClose                      // drain and close the driver
	providerForget                     // nothing is left to do
)

// stepProvider decides what follows; it is pure. A new generation in a new epoch
// of the node, with the same spec, is the same provider: the node was only away
// from the control plane. A new generation in the same epoch is a new start.
func stepProvider(want *pb.Provider, have providerHave, shutdown bool, now time.Time) providerStep {
	gone := want == nil || shutdown
	run := !gone && want.GetDesiredRunning()
	generation := want.GetPlacement().GetGeneration()
	switch {
	case gone && !have.open:
		return providerForget
	case !run && have.open:
		return providerClose
	case !run && have.stopped && have.generation == generation:
		return providerRest
	case !run:
		return providerClose
	}
	sameSpec := have.specVersion == want.GetSpecVersion()
	switch {
	case have.open && sameSpec && have.generation == generation:
		return providerRest
	case have.open && sameSpec && have.nodeEpoch != want.GetPlacement().GetNodeEpoch():
		return providerAdopt
	case !have.open && sameSpec && have.generation == generation && now.Before(have.due):
		return providerAwait
	}
	return providerOpen
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

// put says how a provider is wanted; one placed on another node is not wanted here.
func (h *hosting) put(rec *pb.Provider) {
	if rec.GetPlacement().GetNodeId() != h.node {
		h.remove(rec.GetId())
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

// remove says that a provider is not placed on this node.
func (h *hosting) remove(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p, ok := h.providers[id]; ok {
		p.want = nil
		poke(p.wake)
	}
}

// replace makes records all that is known of providers.
func (h *hosting) replace(records map[string]*pb.Provider) {
	h.mu.Lock()
	known := slices.Collect(maps.Keys(h.providers))
	h.mu.Unlock()
	for _, id := range known {
		if _, ok := records[id]; !ok {
			h.remove(id)
		}
	}
	for _, rec := range records {
		h.put(rec)
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
		case providerAdopt:
			p.have.generation, p.have.nodeEpoch = want.GetPlacement().GetGeneration(), want.GetPlacement().GetNodeEpoch()
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

func (h *hosting) open(ctx context.Context, p *hostedProvider, want *pb.Provider) {
	if p.have.specVersion != want.GetSpecVersion() || p.have.generation != want.GetPlacement().GetGeneration() {
		p.tries = 0
	}
	p.have = providerHave{
		generation: want.GetPlacement().GetGeneration(), nodeEpoch: want.GetPlacement().GetNodeEpoch(),
		specVersion: want.GetSpecVersion(),
	}
	h.tell(p, pb.ProviderState_PROVIDER_STATE_STARTING, "")
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	err := h.host.Start(ctx, want.GetSpec().GetType(), provider.Config{
		ID: p.id, Driver: want.GetSpec().GetDriver(), Settings: want.GetSpec().GetConfig(),
		Dir: filepath.Join(h.dir, p.id),
	})
	if err == nil {
		p.have.open, p.tries = true, 0
		h.tell(p, pb.ProviderState_PROVIDER_STATE_RUNNING, "")
		return
	}
	p.tries++
	delay := openBackoff.delay(p.tries, rand.Float64())
	p.have.due = time.Now().Add(delay)
	h.log.WarnContext(ctx, "opening a provider failed", "provider", p.id, "error", err, "retry_in", delay)
	h.tell(p, pb.ProviderState_PROVIDER_STATE_FAILED, err.Error())
}

// close drains and closes the driver. Nothing is reported of a provider that has
// left this node, nor of one that ends with the agent: it is still wanted.
func (h *hosting) close(ctx context.Context, p *hostedProvider, want *pb.Provider) {
	told := want != nil && !want.GetDesiredRunning()
	if told {
		p.have.generation = want.GetPlacement().GetGeneration()
	}
	if p.have.open {
		if told {
			h.tell(p, pb.ProviderState_PROVIDER_STATE_DRAINING, "")
		}
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if err := h.host.Stop(bounded, p.id); err != nil {
			h.log.WarnContext(ctx, "closing a provider failed", "provider", p.id, "error", err)
		}
	}
	p.have.open, p.have.stopped, p.have.due = false, told, time.Time{}
	if told {
		h.tell(p, pb.ProviderState_PROVIDER_STATE_STOPPED, "")
	}
}

// tell records and reports a state of the provider's present generation.
func (h *hosting) tell(p *hostedProvider, state pb.ProviderState, message string) {
	st := &pb.ProviderStatus{
		State: state, Generation: p.have.generation, Message: oneLine(message), ChangedAt: timestamppb.New(time.Now()),
	}
	h.mu.Lock()
	p.status = st
	h.mu.Unlock()
	h.report(p.id, st)
}

// statuses returns what was last observed of each provider.
func (h *hosting) statuses() map[string]*pb.ProviderStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string]*pb.ProviderStatus{}
	for id, p := range h.providers {
		if p.status != nil {
			out[id] = p.status
		}
	}
	return out
}

// states counts the hosted providers by state, for the metrics.
func (h *hosting) states() map[pb.ProviderState]int {
	counts := map[pb.ProviderState]int{}
	for _, st := range h.statuses() {
		counts[st.GetState()]++
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
		if p.status.GetState() == pb.ProviderState_PROVIDER_STATE_RUNNING {
			serving++
			continue
		}
		trouble += fmt.Sprintf("; %s is %s", id, providerStateLabel(p.status.GetState()))
		if m := p.status.GetMessage(); m != "" {
			trouble += " (" + m + ")"
		}
	}
	return serving == wanted, fmt.Sprintf("%d of %d serve%s", serving, wanted, trouble)
}
