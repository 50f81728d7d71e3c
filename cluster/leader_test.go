package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestFailoverKeepsAcknowledgedWrites(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	var mu sync.Mutex
	var acknowledged []string
	ctx, cancel := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("w%d-%d", w, i)
				if _, err := leader.Propose(ctx, write(id)); err != nil {
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, id)
				mu.Unlock()
			}
		})
	}
	l.eventually("some writes are acknowledged", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(acknowledged) > 50
	})
	leader.crash()
	cancel()
	writers.Wait()
	next := l.leader()
	view, err := next.View(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range acknowledged {
		if !has(view, id) {
			t.Errorf("acknowledged write %s is lost", id)
		}
	}
}

func TestPlannedStopHandsLeadershipOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	// A candidate that was told to stand says so in its request for votes; one
	// that missed heartbeats does not.
	requests := make(chan raft.Observation, 64)
	for _, p := range l.peers {
		if p != leader {
			p.raft.Load().RegisterObserver(raft.NewObserver(requests, true, func(o *raft.Observation) bool {
				_, ok := o.Data.(raft.RequestVoteRequest)
				return ok
			}))
		}
	}
	leader.stop()
	select {
	case o := <-requests:
		if request, ok := o.Data.(raft.RequestVoteRequest); !ok || !request.LeadershipTransfer {
			t.Error("the next leader had to notice by itself that the last one was gone")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody stood for election")
	}
	l.put("after")
}

func TestTransferLeadership(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	next := l.other(leader)
	// Any peer takes the call.
	cluster := pb.NewClusterServiceClient(l.admin(l.other(leader, next)))
	resp, err := cluster.TransferLeadership(t.Context(), &pb.TransferLeadershipRequest{PeerId: next.cfg.ID})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetLeaderId() != next.cfg.ID || resp.GetPreviousLeaderId() != leader.cfg.ID {
		t.Errorf("leadership went from %s to %s", resp.GetPreviousLeaderId(), resp.GetLeaderId())
	}
	if _, err := cluster.TransferLeadership(t.Context(), &pb.TransferLeadershipRequest{PeerId: "nobody"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND {
		t.Errorf("a transfer to nobody: %v", err)
	}
}

func TestDutiesRunOnlyWhileLeading(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var running, most atomic.Int32
	ids := []string{"n1", "n2", "n3"}
	for _, id := range ids {
		l.prepare = func(p *Peer) {
			p.Lead(func(ctx context.Context) error {
				most.Store(max(most.Load(), running.Add(1)))
				defer running.Add(-1)
				if !p.IsLeader() {
					t.Errorf("%s runs a duty and does not lead", id)
				}
				<-ctx.Done()
				return nil
			})
		}
		l.start(id, expect(3))
	}
	l.leader()
	l.eventually("the duty runs", func() bool { return running.Load() == 1 })
	leader := l.leader()
	leader.stop()
	l.leader()
	l.eventually("the duty runs elsewhere", func() bool { return running.Load() == 1 })
	for _, p := range l.peers {
		p.stop()
	}
	if running.Load() != 0 || most.Load() != 1 {
		t.Errorf("%d duties left behind, %d at once", running.Load(), most.Load())
	}
}

func TestFailedDutyGivesLeadershipAway(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var fail sync.Once
	failed := make(chan string, 1)
	for _, id := range []string{"n1", "n2", "n3"} {
		l.prepare = func(p *Peer) {
			p.Lead(func(ctx context.Context) (err error) {
				fail.Do(func() {
					failed <- p.cfg.ID
					err = errors.New("broken")
				})
				if err == nil {
					<-ctx.Done()
				}
				return err
			})
		}
		l.start(id, expect(3))
	}
	first := <-failed
	l.eventually("another peer leads", func() bool {
		id, _ := l.peers[first].Leader()
		return id != "" && id != first
	})
}

func TestFailedDutyOfASinglePeerIsTriedAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	var runs atomic.Int32
	l.prepare = func(p *Peer) {
		p.Lead(func(ctx context.Context) error {
			if runs.Add(1) == 1 {
				return errors.New("broken")
			}
			<-ctx.Done()
			return nil
		})
	}
	l.start("n1", expect(1))
	l.eventually("the duty runs again", func() bool { return runs.Load() == 2 })
	l.put("w")
}

func TestStampedTimesNeverGoBack(t *testing.T) {
	at := func(seconds int64) time.Time { return time.Unix(seconds, 0) }
	clock := []int64{100, 90, 110, 50, 50}
	s := newStamp(func() time.Time {
		now := clock[0]
		clock = clock[1:]
		return at(now)
	})
	for i, want := range []int64{100, 100, 110, 110, 200} {
		committed := at(0)
		if i == 4 {
			// Another leader's clock was ahead.
			committed = at(200)
		}
		if got := s.next(committed); !got.Equal(at(want)) {
			t.Errorf("stamp %d is %v, want %v", i, got.Unix(), want)
		}
	}
}

func TestCommandsCarryTheInjectedTime(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	when := time.Date(2031, 1, 2, 3, 4, 5, 0, time.UTC)
	p := l.start("n1", expect(1), func(c *Config) { c.Seams.Now = func() time.Time { return when } })
	l.put("w")
	if got := p.state.View().Time(); !got.Equal(when) {
		t.Errorf("the state's time is %v, want %v", got, when)
	}
}

func TestProposeAnswers(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	ctx := correlation.With(t.Context(), "corr-1")
	l.eventually("a refusal comes back as an error of the API", func() bool {
		_, err := l.leader().Propose(ctx, refused())
		return apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND
	})
	follower := l.other(l.leader())
	_, err := follower.Propose(ctx, write("w"))
	e := apierror.From(err)
	id, address := leader.Leader()
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || e.Detail(DetailOutcome) != OutcomeFailed ||
		e.Detail(DetailLeader) != id || e.Detail(DetailLeaderAddress) != address || address == "" {
		t.Errorf("a follower answered %v %v", err, e.Proto(ctx))
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.leader().Propose(done, write("never")); err == nil {
		t.Error("a write without time left was accepted")
	}
}

// A write whose leader loses its followers may still happen: the answer must
// say so, and repeating it must not do it twice.
func TestWriteCutOffFromTheQuorumHasAnUnknownOutcome(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	for _, p := range l.peers {
		if p != leader {
			p.crash()
		}
	}
	_, err := leader.Propose(t.Context(), write("limbo"))
	e := apierror.From(err)
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER {
		t.Fatalf("a write without a quorum: %v", err)
	}
	if e.Detail(DetailOutcome) != OutcomeUnknown {
		t.Skipf("leadership was lost before the write began: %v", err)
	}
	for _, id := range []string{"n1", "n2", "n3"} {
		if l.peers[id] == nil {
			l.start(id)
		}
	}
	l.put("limbo")
	l.everywhere("limbo")
}

func TestCallerIsAuthenticatedAcrossTheHop(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	follower := l.other(l.three())
	ctx := metadata.AppendToOutgoingContext(t.Context(), correlation.Header, "corr-77", "x-secret", "not for the leader")
	api := pb.NewControlPlaneServiceClient(l.admin(follower))
	_, err := api.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: &pb.ProviderSpec{Id: "p1", Type: "kv"}})
	if err != nil {
		t.Fatal(err)
	}
	seen := l.leader().seen.Load()
	if seen == nil {
		t.Fatal("the leader did not see the call")
	}
	if seen.caller != "spiffe://test/user/root/admin" || seen.correlation != "corr-77" {
		t.Errorf("the leader saw caller %q, correlation id %q", seen.caller, seen.correlation)
	}
	if len(seen.metadata.Get("x-secret")) != 0 {
		t.Error("other metadata of the caller was forwarded")
	}
}

func TestAnyPeerTakesWritesAndReads(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.three()
	for id, p := range l.peers {
		api := pb.NewControlPlaneServiceClient(l.admin(p))
		resp, err := api.RegisterProvider(t.Context(), &pb.RegisterProviderRequest{RequestId: id, Spec: &pb.ProviderSpec{Id: "by-" + id, Type: "kv"}})
		if err != nil {
			t.Fatalf("write at %s: %v", id, err)
		}
		// A stale read of that index sees it, wherever it is made.
		for other, q := range l.peers {
			list, err := pb.NewControlPlaneServiceClient(l.admin(q)).ListProviders(t.Context(),
				&pb.ListProvidersRequest{Read: &pb.ReadOptions{Stale: true, MinIndex: resp.GetIndex()}})
			if err != nil || list.GetIndex() < resp.GetIndex() {
				t.Errorf("stale read at %s: index %d, want %d: %v", other, list.GetIndex(), resp.GetIndex(), err)
			}
		}
	}
	list, err := pb.NewControlPlaneServiceClient(l.admin(l.other(l.leader()))).ListProviders(t.Context(), &pb.ListProvidersRequest{})
	if err != nil || len(list.GetProviders()) != 3 {
		t.Errorf("a linearizable read through a follower: %v, %v", list.GetProviders(), err)
	}
}

func TestForwardedCallGoesNoFurther(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	follower := l.other(leader)
	ctx := metadata.AppendToOutgoingContext(t.Context(), hopKey, "n9")
	_, err := pb.NewControlPlaneServiceClient(l.admin(follower)).ListProviders(ctx, &pb.ListProvidersRequest{})
	if e := apierror.From(err); e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || e.Detail(detailHop) != "n9" {
		t.Errorf("a forwarded call at a follower: %v", err)
	}
	if l.leader().seen.Load() != nil {
		t.Error("the call was forwarded a second time")
	}
}

func TestCallWaitsForTheElection(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	follower := l.other(leader)
	api := pb.NewControlPlaneServiceClient(l.admin(follower))
	leader.crash()
	// Nobody leads now; a read is let wait and repeated, not refused.
	if _, err := api.ListProviders(t.Context(), &pb.ListProvidersRequest{}); err != nil {
		t.Errorf("a read during an election: %v", err)
	}
}

func TestCallWithoutQuorumFailsInTimeAndSaysWhy(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three(func(c *Config) { c.Timers.LeaderWait = 200 * time.Millisecond })
	last := l.other(leader)
	l.other(leader, last).crash()
	leader.crash()
	l.eventually("the leader is missed", func() bool { id, _ := last.Leader(); return id == "" })
	_, err := pb.NewControlPlaneServiceClient(l.admin(last)).ListProviders(t.Context(), &pb.ListProvidersRequest{})
	e := apierror.From(err)
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || e.Error() != "no leader: 1 of 3 voting peers alive, quorum is 2" || e.Proto(t.Context()).GetNextStep() == "" {
		t.Errorf("without a quorum: %v", err)
	}
	stale := &pb.ListProvidersRequest{Read: &pb.ReadOptions{Stale: true}}
	if _, err := pb.NewControlPlaneServiceClient(l.admin(last)).ListProviders(t.Context(), stale); err != nil {
		t.Errorf("a stale read without a quorum: %v", err)
	}
	status, err := pb.NewClusterServiceClient(l.admin(last)).Status(t.Context(), &pb.StatusRequest{})
	if err != nil || status.GetLeaderId() != "" || status.GetWithoutLeader().AsDuration() <= 0 {
		t.Errorf("status without a quorum: %v, %v", status, err)
	}
}

func TestStatusTellsTheCluster(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	l.put("w")
	l.everywhere("w")
	follower := l.other(leader)
	status, err := pb.NewClusterServiceClient(l.admin(follower)).Status(t.Context(), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if status.GetPeerId() != follower.cfg.ID || status.GetCluster() != "test" || status.GetStateHash() == "" ||
		status.GetAppliedIndex() == 0 || status.GetTerm() == 0 || status.GetProviders()["PENDING"] != 1 {
		t.Errorf("status %v", status)
	}
	for _, peer := range status.GetPeers() {
		if !peer.GetVoter() || !peer.GetAlive() || peer.GetApiAddress() != l.peers[peer.GetId()].cfg.APIAdvertise ||
			peer.GetSelf() != (peer.GetId() == follower.cfg.ID) {
			t.Errorf("peer %v", peer)
		}
	}
	if len(status.GetPeers()) != 3 {
		t.Errorf("%d peers", len(status.GetPeers()))
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	registry := prometheus.NewPedanticRegistry()
	l.start("n1", expect(1), func(c *Config) { c.Registerer = registry })
	l.leader()
	l.put("w")
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	want := map[string]float64{"wasmatrix_raft_has_leader": 1, "wasmatrix_peers_voters": 1, "wasmatrix_peers_voters_alive": 1, "wasmatrix_raft_leader_changes_total": 1}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if value, ok := want[f.GetName()]; ok {
			delete(want, f.GetName())
			if m := f.GetMetric()[0]; m.GetGauge().GetValue()+m.GetCounter().GetValue() != value {
				t.Errorf("%s is %v, want %v", f.GetName(), m, value)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("missing %v", want)
	}
}

func TestMoreThanOneReaderSharesABarrier(t *testing.T) {
	t.Parallel()
	r := newReads()
	first := r.join()
	if r.join() != first {
		t.Error("two readers that wait got two barriers")
	}
	if r.take() != first {
		t.Error("another batch was taken")
	}
	// The barrier of the first is under way now.
	if r.join() == first {
		t.Error("a reader joined a barrier that was started before it arrived")
	}
}

func TestLeaderStopsWhileAFollowerIsLost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	lost := l.other(leader)
	lost.crash()
	l.eventually("the leader misses the follower", func() bool { return leader.role.contacts.isLost(lost.cfg.ID) })
	l.put("meanwhile")
	leader.cancel()
	select {
	case <-leader.done:
	case <-time.After(15 * time.Second):
		t.Fatal("the leader waits for a follower that is gone")
	}
}
