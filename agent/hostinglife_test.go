package agent

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// A configuration that cannot be opened leaves the one before it in its place,
// says so, and is tried again.
func TestAFailedUpdateIsToldAndTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "it runs", leader.reportsProvider(providerRunning, 1))
		kind.refuse("bad")
		leader.put(putProvider(func(p *pb.Provider) { p.SpecVersion, p.Spec.Driver = 2, "bad" }))
		within(t, time.Second, "the failure is told", func() bool {
			return strings.Contains(leader.reportedProvider("kv").GetMessage(), "still with the configuration before: open provider kv: no such driver")
		})
		st := leader.reportedProvider("kv")
		if st.GetState() != providerRunning || st.GetSpecVersion() != 1 || !agent.providers.Serves("kv") {
			t.Fatalf("reported %v", st)
		}
		kind.refuse("")
		within(t, 5*time.Second, "it is updated at last", func() bool {
			st := leader.reportedProvider("kv")
			return st.GetSpecVersion() == 2 && st.GetMessage() == "" && st.GetState() == providerRunning
		})
		for _, st := range leader.allReported("kv") {
			if st.GetState() > providerRunning {
				t.Errorf("it was reported as %v", st)
			}
		}
	})
}

// A stop lets calls in flight finish, within the grace that was asked for, and says
// how many there were.
func TestAStopWaitsForItsCalls(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		release := make(chan struct{})
		kind := &memoKind{hold: release}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "it runs", leader.reportsProvider(providerRunning, 1))
		var wg sync.WaitGroup
		call := func() error {
			_, err := agent.providers.Invoke(context.Background(), "kv", "kv", provider.Call{})
			return err
		}
		failures := make(chan error, 200)
		for range 200 {
			wg.Go(func() { failures <- call() })
		}
		synctest.Wait()
		leader.put(putProvider(func(p *pb.Provider) { p.DesiredRunning, p.StopGrace = false, durationpb.New(30*time.Second) }))
		within(t, time.Second, "it drains", leader.reportsProvider(pb.ProviderState_PROVIDER_STATE_DRAINING, 1))
		if st := leader.reportedProvider("kv"); st.GetCallsInFlight() != 200 || st.GetSpecVersion() != 1 {
			t.Errorf("reported %v", st)
		}
		if err := call(); !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("a later call: %v", err)
		}
		<-time.After(20 * time.Second)
		close(release)
		wg.Wait()
		close(failures)
		for err := range failures {
			if err != nil {
				t.Errorf("a call in flight: %v", err)
			}
		}
		within(t, time.Second, "it has stopped", leader.reportsProvider(pb.ProviderState_PROVIDER_STATE_STOPPED, 1))
	})
}

func TestAStopCutsOffWhatOutlastsTheGrace(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{hold: make(chan struct{})}
		agent := start(t, testConfig(t, n, withKind(kind)))
		leader.put(putProvider())
		within(t, time.Second, "it runs", leader.reportsProvider(providerRunning, 1))
		result := make(chan error, 1)
		go func() {
			_, err := agent.providers.Invoke(context.Background(), "kv", "kv", provider.Call{})
			result <- err
		}()
		synctest.Wait()
		leader.put(putProvider(func(p *pb.Provider) { p.DesiredRunning, p.StopGrace = false, durationpb.New(3*time.Second) }))
		began := time.Now()
		if err := <-result; !errors.Is(err, provider.ErrUnavailable) || time.Since(began) > 4*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		within(t, time.Second, "it has stopped", leader.reportsProvider(pb.ProviderState_PROVIDER_STATE_STOPPED, 1))
		if m := leader.reportedProvider("kv").GetMessage(); !strings.Contains(m, "1 calls in flight") {
			t.Errorf("message %q", m)
		}
	})
}

// The replicas of a provider are on nodes of their own; what happens to one does
// not touch another.
func TestReplicasOfAProviderAreKeptApart(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		kind := &memoKind{}
		agent := start(t, testConfig(t, n, withKind(kind)))
		elsewhere := func(p *pb.Provider) { p.Replica, p.Placement.NodeId = 1, "n2" }
		leader.put(putProvider(), putProvider(elsewhere))
		within(t, time.Second, "both are known and one runs here", func() bool {
			return len(agent.directory.Replicas("kv")) == 2 && leader.reportsProvider(providerRunning, 1)()
		})
		leader.put(&pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveProvider{RemoveProvider: "kv/1"}})
		within(t, time.Second, "the other is gone", func() bool { return len(agent.directory.Replicas("kv")) == 1 })
		// This one moves away, and another comes here: it goes on without a pause.
		leader.put(
			putProvider(func(p *pb.Provider) { p.Replica, p.Placement.Generation = 2, 5 }),
			putProvider(func(p *pb.Provider) { p.Placement.NodeId, p.Placement.Generation = "n2", 2 }),
		)
		within(t, time.Second, "the new one is reported", leader.reportsProvider(providerRunning, 5))
		if opened, closed := kind.count(); opened != 1 || closed != 0 {
			t.Fatalf("opened %d times and closed %d times", opened, closed)
		}
		leader.lose() // a full set follows
		still(t, 5*time.Second, "it serves", func() bool { return agent.providers.Serves("kv") })
		leader.put(&pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveProvider{RemoveProvider: "kv/2"}})
		within(t, time.Second, "it is closed", func() bool {
			_, closed := kind.count()
			return closed == 1
		})
	})
}
