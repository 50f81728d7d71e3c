package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// writePrefix starts the names of the workloads that a Load registers.
const writePrefix = "load-"

// Load keeps writing to the registry and invoking a guest through one client
// until it is stopped, and can then tell whether anything was lost.
//
// A write registers a workload that no node may run, so that it costs a commit
// and nothing else; an invocation makes the guest count a visit.
type Load struct {
	client *client.Client
	target string
	visits string
	stop   func() // ends the loops after the operation under way
	done   sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced with every finished operation
	writes  []ack
	calls   []ack
	failed  []error
}

// ack is one acknowledged operation.
type ack struct {
	name string
	at   time.Time
}

// Counts is how far a Load is.
type Counts struct {
	// Writes and Invocations count acknowledged operations.
	Writes, Invocations int
}

// Report is what a Load found in the end.
type Report struct {
	// Writes and Invocations count acknowledged operations, Failed failed invocations.
	Writes, Invocations, Failed int
	// Lost and Doubled count acknowledged writes that are not in the registry, or are there twice.
	Lost, Doubled int
	// Visits is what the guest counted in its provider.
	Visits int
	// LongestGap is the longest time between two acknowledged invocations.
	LongestGap time.Duration
	// WriteGaps are the times between two acknowledged writes, in order.
	WriteGaps []time.Duration
	// LastFailure is the last failure of an invocation.
	LastFailure error
}

// Err says what went wrong, or nil.
func (r *Report) Err() error {
	var errs []error
	if r.Lost > 0 || r.Doubled > 0 {
		errs = append(errs, fmt.Errorf("%d acknowledged writes lost, %d applied twice", r.Lost, r.Doubled))
	}
	if r.Visits < r.Invocations {
		errs = append(errs, fmt.Errorf("%d invocations acknowledged and only %d visits counted", r.Invocations, r.Visits))
	}
	return errors.Join(errs...)
}

// StartLoad starts one writer and one invoker of the running workload target.
func StartLoad(ctx context.Context, c *client.Client, target string) *Load {
	stopping := make(chan struct{})
	l := &Load{
		client: c, target: target, visits: "load-" + uuid.NewString()[:8],
		stop: sync.OnceFunc(func() { close(stopping) }), changed: make(chan struct{}),
	}
	goOn := func() bool {
		select {
		case <-stopping:
			return false
		default:
			return ctx.Err() == nil
		}
	}
	l.done.Go(func() { l.write(ctx, goOn) })
	l.done.Go(func() { l.invoke(ctx, goOn) })
	return l
}

// Stop ends the load and waits for what is under way.
func (l *Load) Stop() {
	l.stop()
	l.done.Wait()
}

func (l *Load) write(ctx context.Context, goOn func() bool) {
	target, err := l.client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: l.target})
	if err != nil {
		l.record(func() { l.failed = append(l.failed, err) })
		return
	}
	for i := 0; goOn(); i++ {
		name := fmt.Sprintf("%s%05d", writePrefix, i)
		_, err := l.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
			Name: name, Module: target.Instance.Spec.Module,
			Placement:    &pb.PlacementRules{Labels: map[string]string{"node": "none-has-this"}},
			Capabilities: target.Instance.Spec.Capabilities,
		}})
		at := time.Now()
		l.record(func() {
			switch {
			case err == nil:
				l.writes = append(l.writes, ack{name, at})
			case ctx.Err() == nil:
				l.failed = append(l.failed, err)
			}
		})
	}
}

func (l *Load) invoke(ctx context.Context, goOn func() bool) {
	for goOn() {
		_, err := l.client.Invoke(ctx, &pb.InvokeRequest{Target: l.target, Payload: []byte(l.visits)})
		at := time.Now()
		l.record(func() {
			switch {
			case err == nil:
				l.calls = append(l.calls, ack{at: at})
			case ctx.Err() == nil:
				l.failed = append(l.failed, err)
			}
		})
	}
}

func (l *Load) record(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

// Counts returns how far the load is.
func (l *Load) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Counts{Writes: len(l.writes), Invocations: len(l.calls)}
}

// WaitProgress waits until n more writes and n more invocations were acknowledged.
func (l *Load) WaitProgress(ctx context.Context, n int) error {
	start := l.Counts()
	return l.wait(ctx, fmt.Sprintf("%d more writes and invocations", n), func() bool {
		return len(l.writes) >= start.Writes+n && len(l.calls) >= start.Invocations+n
	})
}

// WaitWriteAfter waits for the first write acknowledged after t and returns when that was.
func (l *Load) WaitWriteAfter(ctx context.Context, t time.Time) (at time.Time, err error) {
	err = l.wait(ctx, "an acknowledged write", func() bool {
		for i := len(l.writes) - 1; i >= 0 && l.writes[i].at.After(t); i-- {
			at = l.writes[i].at
		}
		return !at.IsZero()
	})
	return at, err
}

// WriteGapSince returns the longest time between two acknowledged writes of which
// the later one came after t.
func (l *Load) WriteGapSince(t time.Time) (longest time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.writes) - 1; i > 0 && l.writes[i].at.After(t); i-- {
		longest = max(longest, l.writes[i].at.Sub(l.writes[i-1].at))
	}
	return longest
}

// wait blocks until ok, which is called under l.mu, or ctx ends.
func (l *Load) wait(ctx context.Context, what string, ok func() bool) error {
	for {
		l.mu.Lock()
		reached, changed, counts := ok(), l.changed, fmt.Sprintf("%d writes, %d invocations, failures %v", len(l.writes), len(l.calls), l.failed[max(0, len(l.failed)-3):])
		l.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s (so far %s): %w", what, counts, ctx.Err())
		}
	}
}

// Verify stops the load and compares what was acknowledged with what is there.
func (l *Load) Verify(ctx context.Context) (*Report, error) {
	l.Stop()
	found, err := l.registered(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the registry back: %w", err)
	}
	answer, err := l.client.Invoke(ctx, &pb.InvokeRequest{Target: l.target, Payload: []byte(l.visits)})
	if err != nil {
		return nil, fmt.Errorf("read the visits back: %w", err)
	}
	visits, err := strconv.Atoi(string(bytes.TrimSpace(answer.Payload[bytes.LastIndexByte(answer.Payload, ' ')+1:])))
	if err != nil {
		return nil, fmt.Errorf("read the visits back: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &Report{Writes: len(l.writes), Invocations: len(l.calls), Failed: len(l.failed), Visits: visits - 1}
	if len(l.failed) > 0 {
		r.LastFailure = l.failed[len(l.failed)-1]
	}
	for _, w := range l.writes {
		switch n := found[w.name]; {
		case n == 0:
			r.Lost++
		case n > 1:
			r.Doubled++
		}
	}
	r.WriteGaps = gaps(l.writes)
	for _, g := range gaps(l.calls) {
		r.LongestGap = max(r.LongestGap, g)
	}
	return r, nil
}

// registered counts the instances of each workload that a Load registered.
func (l *Load) registered(ctx context.Context) (map[string]int, error) {
	found := map[string]int{}
	for token := ""; ; {
		page, err := l.client.ListInstances(ctx, &pb.ListInstancesRequest{PageToken: token, PageSize: 1000})
		if err != nil {
			return nil, err
		}
		for _, i := range page.Instances {
			found[i.Name]++
		}
		if token = page.NextPageToken; token == "" {
			return found, nil
		}
	}
}

func gaps(acks []ack) []time.Duration {
	var out []time.Duration
	for i := 1; i < len(acks); i++ {
		out = append(out, acks[i].at.Sub(acks[i-1].at))
	}
	return out
}
