package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
)

// guests is an executor whose guests write to the providers that they were
// granted, again and again, from their start to their very end.
type guests struct {
	*runtimetest.Fake
	process *workerProcess
}

func newGuests(p *workerProcess) *guests { return &guests{Fake: runtimetest.NewFake(), process: p} }

// Prepare returns a guest that has not started.
func (g *guests) Prepare(ctx context.Context, spec runtime.Spec, host runtime.Host) (runtime.Instance, error) {
	inner, err := g.Fake.Prepare(ctx, spec, host)
	if err != nil {
		return nil, err
	}
	return &guest{Instance: inner, guests: g, spec: spec, host: host}, nil
}

// guest is one running guest.
type guest struct {
	runtime.Instance
	guests *guests
	spec   runtime.Spec
	host   runtime.Host
	ended  sync.Once
	cancel context.CancelFunc
}

// Start begins the work.
func (g *guest) Start(ctx context.Context) error {
	w := g.guests.process.machine.world
	if g.guests.process.killed.Load() {
		return errors.New("sim: the machine has crashed")
	}
	if err := g.Instance.Start(ctx); err != nil {
		return err
	}
	w.counts.Starts.Add(1)
	w.judgeStart(g.guests.process.machine, g.spec)
	work, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	seed := w.draw()
	w.background.Go(func() {
		defer cancel()
		g.work(work, rand.New(rand.NewPCG(seed, 0x6775657374)))
	})
	w.background.Go(func() {
		if _, err := g.Wait(work); err == nil {
			cancel()
		}
	})
	return nil
}

// work writes until ctx ends. A call that is under way then goes on: a guest may
// be stopped at any moment, and what it has sent is on its way.
func (g *guest) work(ctx context.Context, dice *rand.Rand) {
	w := g.guests.process.machine.world
	names, slots := w.providers, make(chan struct{}, guestSlots)
	for n := 0; ; n++ {
		pause := time.NewTimer(time.Duration((0.5 + dice.Float64()) * float64(w.profile.GuestEvery)))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
		if len(names) == 0 || g.guests.process.killed.Load() {
			continue
		}
		payload, err := proto.Marshal(&pb.KvSetRequest{
			Provider: names[dice.IntN(len(names))], Key: []byte("k"), Value: fmt.Appendf(nil, "%s/%d/%d", g.spec.InstanceID, g.spec.Generation, n),
		})
		if err != nil {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		w.background.Go(func() {
			defer func() { <-slots }()
			bounded, cancel := context.WithTimeout(correlation.With(context.WithoutCancel(ctx), "sim"), guestPatience)
			defer cancel()
			if _, err := g.host.Call(bounded, "kv", "set", payload); err != nil {
				w.counts.Refused.Add(1)
			}
		})
	}
}

// guestSlots is how many calls of one guest are under way at once.
const guestSlots = 8

// guestPatience is how long a guest waits for one call.
const guestPatience = 8 * time.Second

// Stop ends the guest.
func (g *guest) Stop(ctx context.Context, grace time.Duration) error {
	g.ended.Do(func() {
		if !g.guests.process.killed.Load() {
			g.guests.process.machine.world.judgeStop(g.guests.process.machine, g.spec)
		}
	})
	return g.Instance.Stop(ctx, grace)
}

// Close frees the guest.
func (g *guest) Close(ctx context.Context) error {
	if g.cancel != nil {
		g.cancel()
	}
	return g.Instance.Close(ctx)
}

// recordingKind is the real key-value capability; what its providers accept is
// recorded.
type recordingKind struct {
	*kv.Kind
	process *workerProcess
}

// Open opens a provider.
func (k *recordingKind) Open(ctx context.Context, cfg provider.Config) (provider.Provider, error) {
	if k.process.killed.Load() {
		return nil, provider.Errorf(provider.ErrUnavailable, "the machine has crashed")
	}
	inner, err := k.Kind.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	w := k.process.machine.world
	era := "disk"
	if cfg.Driver == "memory" {
		era = fmt.Sprintf("memory %d", w.draw())
	}
	return &recordedProvider{Provider: inner, process: k.process, store: cfg.ID + " on " + era}, nil
}

type recordedProvider struct {
	provider.Provider
	process *workerProcess
	store   string
}

// Invoke serves one call and records it when it had an effect.
func (p *recordedProvider) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	if p.process.killed.Load() {
		return nil, provider.Errorf(provider.ErrUnavailable, "the machine has crashed")
	}
	out, err := p.Provider.Invoke(ctx, call)
	if err != nil || call.Operation != "set" || call.Instance == "" {
		return out, err
	}
	var resp pb.KvSetResponse
	if err := proto.Unmarshal(out, &resp); err != nil {
		return nil, err
	}
	p.process.machine.world.effect(effect{
		who:     generation{call.Instance, call.Created, call.Generation},
		store:   p.store,
		version: resp.GetVersion(), at: time.Now(),
	})
	return out, nil
}
