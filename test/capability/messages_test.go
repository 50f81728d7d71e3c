package capability

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestMessagesSurviveAKilledReplica publishes messages that two replicas share,
// and kills the node of one in the middle. None is lost: a message that was on its
// way to the killed replica goes to the other one, in plain mode too, for the
// provider lives. Each replica notes what it has handled in another provider.
// WASMATRIX_MESSAGES is how many.
func TestMessagesSurviveAKilledReplica(t *testing.T) {
	total := rounds(t, "WASMATRIX_MESSAGES", 3000)
	for _, mode := range []struct {
		name    string
		durable bool
	}{{"durable", true}, {"plain", false}} {
		t.Run(mode.name, func(t *testing.T) {
			c := harness.Start(t, dev.Options{Nodes: 3})
			config := map[string]string{}
			if mode.durable {
				config["durable"] = "true"
			}
			for _, spec := range []*pb.ProviderSpec{
				{Id: "jobs", Type: "messaging", Config: config, Placement: &pb.PlacementRules{Node: "n1"}},
				{Id: "notes", Type: "kv", Driver: "memory", Placement: &pb.PlacementRules{Node: "n1"}},
			} {
				if _, err := c.Client.RegisterProvider(c.Context(settleTime), &pb.RegisterProviderRequest{Spec: spec}); err != nil {
					t.Fatal(err)
				}
				providerRuns(t, c, spec.Id, 0)
			}
			w := startRelay(t, c, "kv,messaging", &pb.WorkloadSpec{
				Name: "witness", Replicas: 2, Limits: &pb.InstanceLimits{Concurrency: 16},
				Placement: &pb.PlacementRules{},
				Triggers:  []*pb.Trigger{{Trigger: &pb.Trigger_Subscribe{Subscribe: "jobs.>"}}},
				Capabilities: []*pb.CapabilityGrant{
					{Provider: "notes", Permissions: slices.Concat(baseKV, []string{"kv:write:seen/"}), Bucket: "shared"},
					{Provider: "jobs", Permissions: slices.Concat(baseMessaging, []string{"msg:subscribe:jobs.>"})},
				},
			})
			victim := victimOf(t, w)
			began := time.Now()
			acked, failed := publish(t, c, total, func() {
				if err := c.Node(victim).Kill(); err != nil {
					t.Error(err)
				}
			})
			var lost int
			seen := func(ctx context.Context) error {
				had, err := keys(ctx, c, "notes", "shared", "seen/")
				if err != nil {
					return err
				}
				lost = 0
				for _, id := range acked {
					if had[id] == 0 {
						lost++
					}
				}
				if lost > 0 {
					return fmt.Errorf("%d of %d are missing", lost, len(acked))
				}
				return nil
			}
			ctx, cancel := context.WithTimeout(t.Context(), settleTime+time.Duration(total)*time.Millisecond)
			defer cancel()
			if err := harness.Until(ctx, "all acknowledged messages to be handled", seen); err != nil {
				t.Error(err)
			}
			t.Logf("%s: %d messages acknowledged, %d refused, %d lost, one of two replicas killed, %s",
				mode.name, len(acked), failed, lost, time.Since(began).Round(time.Millisecond))
		})
	}
}

// victimOf returns a node of the workload that does not run the providers.
func victimOf(t *testing.T, w *relay) string {
	t.Helper()
	for _, in := range w.instances {
		got, err := w.Client.QueryInstance(w.Context(20*time.Second), &pb.QueryInstanceRequest{Target: in.Id})
		if err != nil {
			t.Fatal(err)
		}
		if node := got.Instance.Placement.NodeId; node != "n1" {
			return node
		}
	}
	t.Fatal("both replicas are on n1")
	return ""
}

// publish publishes messages as a user from several callers, calls half in the
// middle, and returns those that were acknowledged and how many were not.
func publish(t *testing.T, c *harness.Cluster, total int, half func()) (acked []string, failed int) {
	t.Helper()
	const callers = 32
	var next atomic.Int64
	var mu sync.Mutex
	var done sync.WaitGroup
	for range callers {
		done.Go(func() {
			for {
				n := next.Add(1)
				if n > int64(total) {
					return
				}
				if n == int64(total/2) {
					half()
				}
				id := fmt.Sprintf("%07d", n)
				payload, err := proto.Marshal(&pb.MsgPublishRequest{Subject: "jobs." + id[len(id)-1:], Payload: []byte(id)})
				if err == nil {
					_, err = c.Client.CallProvider(c.Context(settleTime), &pb.CallProviderRequest{
						ProviderId: "jobs", Capability: "messaging", Operation: "publish", Payload: payload,
					})
				}
				mu.Lock()
				if err == nil {
					acked = append(acked, id)
				} else {
					failed++
				}
				mu.Unlock()
			}
		})
	}
	done.Wait()
	return acked, failed
}
