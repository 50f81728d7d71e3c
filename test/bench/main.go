// Bench measures a cluster of three real nodes on this machine: starts,
// invocations and registry writes, each through the public client.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

func main() { os.Exit(start()) }

// start returns the exit code.
func start() int {
	b := &bench{}
	flag.StringVar(&b.binary, "binary", "build/wasmatrix", "the wasmatrix binary")
	flag.StringVar(&b.guests, "guests", "build/guests", "directory of the built guests")
	flag.IntVar(&b.starts, "starts", 100, "how many instance starts to time")
	flag.DurationVar(&b.span, "span", 5*time.Second, "how long each throughput is measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench failed:", err)
		return 1
	}
	return 0
}

type bench struct {
	binary, guests string
	starts         int
	span           time.Duration

	cluster *dev.Cluster
	client  *client.Client
	module  string
}

func (b *bench) run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "wasmatrix-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	b.cluster, err = dev.Create(dev.Options{Nodes: 3, Dir: dir, Binary: b.binary, PortBase: harness.FreePortBase(3), LogLevel: "warn"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.cluster.Close()) }()
	if err := b.cluster.Start(); err != nil {
		return err
	}
	if b.client, err = b.cluster.Client(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.client.Close()) }()
	if _, err := b.cluster.WaitReady(ctx, b.client); err != nil {
		return err
	}
	module, err := b.client.UploadModuleFile(ctx, filepath.Join(b.guests, "hello.wasm"))
	if err != nil {
		return err
	}
	b.module = module.Digest
	for _, measure := range []func(context.Context) error{b.measureStarts, b.measureInvocations, b.measureWrites} {
		if err := measure(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) spec(name string, rules *pb.PlacementRules) *pb.WorkloadSpec {
	return &pb.WorkloadSpec{
		Name: name, Module: b.module, Placement: rules, Limits: &pb.InstanceLimits{Memory: "16MiB", Concurrency: 4},
		Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read", "kv:write"}}},
	}
}

// measureStarts times a start from its acknowledgement, and from the call, to
// the event that says that the instance runs.
func (b *bench) measureStarts(ctx context.Context) error {
	next, stop := iter.Pull2(b.client.WatchEvents(ctx, &pb.WatchEventsRequest{Follow: true, Kinds: []pb.EventKind{pb.EventKind_EVENT_KIND_INSTANCE_STARTED}}))
	defer stop()
	var fromAck, fromCall []time.Duration
	for i := range b.starts + 3 {
		called := time.Now()
		started, err := b.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: b.spec(fmt.Sprintf("start-%03d", i), nil)})
		if err != nil {
			return err
		}
		acknowledged := time.Now()
		for id := ""; id != started.Instances[0].Id; {
			got, err, open := next()
			if err != nil || !open {
				return fmt.Errorf("watch events: %w", err)
			}
			id = got.Event.InstanceId
		}
		// The first start on each node compiles the module.
		if i >= 3 {
			fromAck, fromCall = append(fromAck, time.Since(acknowledged)), append(fromCall, time.Since(called))
		}
		if _, err := b.client.RemoveInstance(ctx, &pb.RemoveInstanceRequest{Target: started.Instances[0].Id, Force: true}); err != nil {
			return err
		}
	}
	report("start, acknowledged to running", fromAck)
	report("start, call to running", fromCall)
	return nil
}

// measureInvocations invokes an instance through the peer of its own node and
// through another one, with a handler that makes two key-value calls.
func (b *bench) measureInvocations(ctx context.Context) error {
	for _, place := range []struct{ title, node, through string }{
		{"invoke, same node, provider local", "n1", "n1"},
		{"invoke, through another node, provider local", "n1", "n2"},
		{"invoke, same node, provider remote", "n2", "n2"},
	} {
		name := "invoke-" + place.node + "-" + place.through
		started, err := b.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: b.spec(name, &pb.PlacementRules{Node: place.node})})
		if err != nil {
			return err
		}
		if err := harness.WaitState(ctx, b.client, started.Instances[0].Id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
			return err
		}
		c, err := harness.ClientOf(b.cluster, b.cluster.Node(place.through))
		if err != nil {
			return err
		}
		for _, callers := range []int{1, 8} {
			err := b.throughput(ctx, fmt.Sprintf("%s, %d callers", place.title, callers), callers, func(ctx context.Context, caller, _ int) error {
				_, err := c.Invoke(ctx, &pb.InvokeRequest{Target: name, Payload: fmt.Appendf(nil, "c%d", caller)})
				return err
			})
			if err != nil {
				return errors.Join(err, c.Close())
			}
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

// measureWrites registers workloads that no node may run.
func (b *bench) measureWrites(ctx context.Context) error {
	nowhere := &pb.PlacementRules{Labels: map[string]string{"node": "none-has-this"}}
	for _, writers := range []int{1, 64} {
		err := b.throughput(ctx, fmt.Sprintf("registry write, %d writers", writers), writers, func(ctx context.Context, w, i int) error {
			_, err := b.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: b.spec(fmt.Sprintf("w%d-%d-%d", writers, w, i), nowhere)})
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// throughput calls op from several goroutines for the span and reports.
func (b *bench) throughput(ctx context.Context, title string, callers int, op func(ctx context.Context, caller, i int) error) error {
	var wg sync.WaitGroup
	var failure atomic.Value
	all := make([][]time.Duration, callers)
	began := time.Now()
	for c := range callers {
		wg.Go(func() {
			for i := 0; time.Since(began) < b.span; i++ {
				at := time.Now()
				if err := op(ctx, c, i); err != nil {
					failure.Store(err)
					return
				}
				all[c] = append(all[c], time.Since(at))
			}
		})
	}
	wg.Wait()
	if err, failed := failure.Load().(error); failed {
		return fmt.Errorf("%s: %w", title, err)
	}
	took := slices.Concat(all...)
	fmt.Printf("%-60s %8.0f/s  ", title, float64(len(took))/time.Since(began).Seconds())
	report("", took)
	return nil
}

func report(title string, took []time.Duration) {
	if len(took) == 0 {
		fmt.Printf("%s nothing finished\n", title)
		return
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	if title != "" {
		fmt.Print(title, strings.Repeat(" ", max(1, 72-len(title))))
	}
	fmt.Printf("p50 %.2f ms  p99 %.2f ms  max %.2f ms  n=%d\n", at(0.5), at(0.99), at(1), len(took))
}
