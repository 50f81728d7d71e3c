package capability

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// load has effects through a relay, again and again, from several callers.
type load struct {
	kind  *kind
	relay *relay
	stop  context.CancelFunc
	done  sync.WaitGroup

	mu      sync.Mutex
	acked   []string
	unknown map[string]bool // failed, and may have been had
	codes   map[pb.ErrorCode]int
	wrong   []error
}

// effectNumber names effects, so that none has the name of another.
var effectNumber atomic.Uint64

// startLoad starts callers that go on until stop.
func startLoad(ctx context.Context, k *kind, r *relay, callers int) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{kind: k, relay: r, stop: cancel, unknown: map[string]bool{}, codes: map[pb.ErrorCode]int{}}
	for range callers {
		l.done.Go(func() {
			for ctx.Err() == nil {
				l.once(context.WithoutCancel(ctx))
			}
		})
	}
	return l
}

// once has one effect and takes up how it ended.
func (l *load) once(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	id := fmt.Sprintf("%08d", effectNumber.Add(1))
	err := l.kind.do(ctx, l.relay, id)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.acked = append(l.acked, id)
	case code(err) == 0:
		l.wrong = append(l.wrong, fmt.Errorf("effect %s: the guest has no answer: %w", id, err))
	default:
		l.codes[code(err)]++
		l.unknown[id] = true
	}
}

// end stops the callers and waits for them.
func (l *load) end() {
	l.stop()
	l.done.Wait()
}

// progress waits until so many effects more were acknowledged.
func (l *load) progress(t *testing.T, more int) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.acked)
	}
	want := count() + more
	eventually(t, l.relay.Cluster, fmt.Sprintf("%d more effects", more), func(context.Context) error {
		if have := count(); have < want {
			return fmt.Errorf("%d are missing", want-have)
		}
		return nil
	})
}

// verify checks every acknowledged effect, that none was had twice, and that calls
// failed with the codes allowed only.
func (l *load) verify(t *testing.T, provider string, allowed ...pb.ErrorCode) {
	t.Helper()
	for _, err := range l.wrong {
		t.Error(err)
	}
	for code, n := range l.codes {
		if !slices.Contains(allowed, code) {
			t.Errorf("%d calls failed with %s", n, code)
		}
	}
	var seen map[string]int
	eventually(t, l.relay.Cluster, "all acknowledged effects", func(ctx context.Context) error {
		var err error
		if seen, err = l.kind.seen(ctx, l.relay.Cluster, provider); err != nil {
			return err
		}
		lost := 0
		for _, id := range l.acked {
			if seen[id] == 0 {
				lost++
			}
		}
		if lost > 0 {
			return fmt.Errorf("%d of %d are missing", lost, len(l.acked))
		}
		return nil
	})
	for _, id := range l.acked {
		if seen[id] > 1 && !l.kind.twice {
			t.Errorf("effect %s was had %d times", id, seen[id])
		}
	}
	t.Logf("%s: %d effects acknowledged and had, failed %v", provider, len(l.acked), maps.Collect(maps.All(l.codes)))
}

const (
	unavailable   = pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE
	communication = pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE
	timeout       = pb.ErrorCode_ERROR_CODE_TIMEOUT
)

// TestProviderLife takes a provider of each kind through its life while guests on
// its own and on another node use it: no acknowledged effect is lost, none is had
// twice, every failed call has the right code, and the guests live.
func TestProviderLife(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	for _, k := range kinds(t) {
		for where, node := range map[string]string{"on the same node": "n2", "on another node": "n1"} {
			t.Run(k.name+" "+where, func(t *testing.T) {
				id := fmt.Sprintf("%s-for-%s", k.name, node)
				registerOn(t, c, &k, id, "n2")
				r := startRelay(t, c, k.tags, &pb.WorkloadSpec{
					Name: "relay-" + id, Placement: &pb.PlacementRules{Node: node},
					Capabilities: k.grants(id), Limits: &pb.InstanceLimits{Concurrency: 8},
				})
				t.Run("stopped and started", func(t *testing.T) { stopAndStart(t, &k, r, id) })
				t.Run("updated", func(t *testing.T) { update(t, &k, r, id) })
				// A guest on the provider's node would be gone with the agent.
				if node != "n2" {
					t.Run("its agent killed", func(t *testing.T) { agentRestart(t, &k, r, id) })
				}
				r.unharmed()
			})
		}
	}
}

// registerOn registers a provider of a kind on a node.
func registerOn(t *testing.T, c *harness.Cluster, k *kind, id, node string) {
	t.Helper()
	spec := proto.CloneOf(k.spec)
	spec.Id, spec.Placement = id, &pb.PlacementRules{Node: node}
	if _, err := c.Client.RegisterProvider(c.Context(settleTime), &pb.RegisterProviderRequest{Spec: spec}); err != nil {
		t.Fatal(err)
	}
	providerRuns(t, c, id, 0)
	if k.prepare != nil {
		k.prepare(t, c, id)
	}
}

// stopAndStart stops and starts the provider under load.
func stopAndStart(t *testing.T, k *kind, r *relay, id string) {
	ctx := r.Context(settleTime)
	l := startLoad(ctx, k, r, 8)
	defer l.end()
	for range 3 {
		l.progress(t, 50)
		if _, err := r.Client.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: id}); err != nil {
			t.Fatal(err)
		}
		eventually(t, r.Cluster, "calls to be refused", func(ctx context.Context) error {
			err := k.do(ctx, r, fmt.Sprintf("stopped-%d", effectNumber.Add(1)))
			if code(err) != unavailable {
				return fmt.Errorf("a call to a stopped provider: %w", err)
			}
			return nil
		})
		if _, err := r.Client.StartProvider(ctx, &pb.StartProviderRequest{ProviderId: id}); err != nil {
			t.Fatal(err)
		}
	}
	l.progress(t, 50)
	l.end()
	l.verify(t, id, unavailable)
}

// update gives the provider one configuration after the other under load: no call fails.
func update(t *testing.T, k *kind, r *relay, id string) {
	ctx := r.Context(settleTime)
	got, err := r.Client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
	if err != nil {
		t.Fatal(err)
	}
	l := startLoad(ctx, k, r, 8)
	defer l.end()
	for i := range 6 {
		l.progress(t, 30)
		spec := proto.CloneOf(got.Provider.Spec)
		if i%2 == 0 {
			spec.Config = k.update
		}
		updated, err := r.Client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		providerRuns(t, r.Cluster, id, updated.Provider.SpecVersion)
	}
	l.progress(t, 30)
	l.end()
	l.verify(t, id)
}

// agentRestart kills the agent of the provider's node under load; its peer starts
// a new one.
func agentRestart(t *testing.T, k *kind, r *relay, id string) {
	ctx := r.Context(settleTime)
	l := startLoad(ctx, k, r, 8)
	defer l.end()
	for range 2 {
		l.progress(t, 50)
		if err := r.Node("n2").SignalAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		l.progress(t, 50)
	}
	l.end()
	l.verify(t, id, unavailable, communication, timeout)
}

// TestProviderNodeKilled kills the whole node of a provider in the middle of calls
// of guests elsewhere, and starts it again.
func TestProviderNodeKilled(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	for _, k := range kinds(t) {
		t.Run(k.name, func(t *testing.T) {
			id := k.name + "-3"
			registerOn(t, c, &k, id, "n3")
			r := startRelay(t, c, k.tags, &pb.WorkloadSpec{
				Name: "relay-" + id, Placement: &pb.PlacementRules{Node: "n1"},
				Capabilities: k.grants(id), Limits: &pb.InstanceLimits{Concurrency: 8},
			})
			l := startLoad(r.Context(settleTime), &k, r, 8)
			defer l.end()
			l.progress(t, 50)
			if err := c.Node("n3").Kill(); err != nil {
				t.Fatal(err)
			}
			eventually(t, c, "a call to fail", func(ctx context.Context) error {
				err := k.do(ctx, r, fmt.Sprintf("killed-%d", effectNumber.Add(1)))
				if code(err) == 0 {
					return fmt.Errorf("a call to a provider of a killed node: %w", err)
				}
				return nil
			})
			if err := c.Node("n3").Start(); err != nil {
				t.Fatal(err)
			}
			l.progress(t, 50)
			l.end()
			l.verify(t, id, unavailable, communication, timeout)
			r.unharmed()
		})
	}
}

// TestDrainUnderCallsInFlight stops a provider while 200 calls are in flight: each
// of them finishes with its effect, and calls that come later are refused at once.
func TestDrainUnderCallsInFlight(t *testing.T) {
	const inFlight = 200
	c := harness.Start(t, dev.Options{Nodes: 3})
	for _, k := range kinds(t) {
		if k.hold == nil {
			continue
		}
		for _, node := range []string{"n1", "n2"} {
			t.Run(k.name+" from "+node, func(t *testing.T) {
				id := fmt.Sprintf("%s-for-%s", k.name, node)
				registerOn(t, c, &k, id, "n2")
				r := startRelay(t, c, k.tags, &pb.WorkloadSpec{
					Name: "relay-" + id, Placement: &pb.PlacementRules{Node: node}, Replicas: 4,
					Capabilities: k.grants(id), Limits: &pb.InstanceLimits{Concurrency: inFlight/4 + 10},
				})
				r.evenly = true // each instance is bounded
				drain(t, &k, r, id, inFlight)
				r.unharmed()
			})
		}
	}
}

func drain(t *testing.T, k *kind, r *relay, id string, inFlight int) {
	t.Helper()
	ctx := r.Context(settleTime)
	release := k.hold()
	defer release()
	l := &load{kind: k, relay: r, stop: func() {}, unknown: map[string]bool{}, codes: map[pb.ErrorCode]int{}}
	for range inFlight {
		l.done.Go(func() { l.once(ctx) })
	}
	eventually(t, r.Cluster, fmt.Sprintf("%d calls in flight", inFlight), func(context.Context) error {
		if n := k.held(); n != inFlight {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	stopped := time.Now()
	if _, err := r.Client.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: id}); err != nil {
		t.Fatal(err)
	}
	late := fmt.Sprintf("late-%d", effectNumber.Add(1))
	eventually(t, r.Cluster, "late calls to be refused", func(ctx context.Context) error {
		bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if err := k.do(bounded, r, late); code(err) != unavailable {
			return fmt.Errorf("a call to a provider that drains: %w", err)
		}
		return nil
	})
	t.Logf("refused %s after the stop was asked for, with %d calls in flight", time.Since(stopped).Round(time.Millisecond), inFlight)
	release()
	l.done.Wait()
	l.verify(t, id)
	if len(l.acked) != inFlight {
		t.Errorf("%d of %d calls in flight succeeded: %v", len(l.acked), inFlight, l.codes)
	}
}
