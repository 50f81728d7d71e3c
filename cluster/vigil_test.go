package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

const vigilLimit = 250 * time.Millisecond

// laggingLink is a network on which every message takes a while.
type laggingLink struct {
	*raft.InmemTransport
	rand func(time.Duration) time.Duration
}

func (l *laggingLink) delay() { time.Sleep(time.Millisecond/4 + l.rand(2*time.Millisecond)) }

func (l *laggingLink) AppendEntries(id raft.ServerID, at raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	l.delay()
	defer l.delay()
	return l.InmemTransport.AppendEntries(id, at, args, resp)
}

func (l *laggingLink) RequestVote(id raft.ServerID, at raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	l.delay()
	defer l.delay()
	return l.InmemTransport.RequestVote(id, at, args, resp)
}

func (l *laggingLink) RequestPreVote(id raft.ServerID, at raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	l.delay()
	defer l.delay()
	return l.InmemTransport.RequestPreVote(id, at, args, resp)
}

// laggingDisk is a disk on which every sync takes a while.
type laggingDisk struct {
	*raft.InmemStore
	rand func(time.Duration) time.Duration
}

func (d *laggingDisk) StoreLogs(entries []*raft.Log) error {
	time.Sleep(time.Millisecond + d.rand(4*time.Millisecond))
	return d.InmemStore.StoreLogs(entries)
}

func (d *laggingDisk) SetUint64(key []byte, value uint64) error {
	time.Sleep(time.Millisecond + d.rand(4*time.Millisecond))
	return d.InmemStore.SetUint64(key, value)
}

// ensemble is a few Rafts with vigils and nothing else, in virtual time.
type ensemble struct {
	*testing.T
	rafts []*raft.Raft
	links []*laggingLink
	stops []func()
}

func newEnsemble(t *testing.T, n int, seed uint64) *ensemble {
	t.Helper()
	e := &ensemble{T: t}
	var mu sync.Mutex
	source := rand.New(rand.NewPCG(seed, 1))
	random := func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(source.Int64N(int64(d)))
	}
	var servers []raft.Server
	for i := range n {
		address, inner := raft.NewInmemTransport(raft.ServerAddress(fmt.Sprintf("n%d", i)))
		e.links = append(e.links, &laggingLink{inner, random})
		servers = append(servers, raft.Server{ID: raft.ServerID(address), Address: address})
	}
	for i, a := range e.links {
		for j, b := range e.links {
			if i != j {
				a.Connect(b.LocalAddr(), b.InmemTransport)
			}
		}
	}
	for i, link := range e.links {
		id := fmt.Sprintf("n%d", i)
		cfg := Config{ID: id, Timers: Timers{Heartbeat: vigilLimit}}.withDefaults()
		var r *raft.Raft
		v, err := newVigil(link, id, vigilLimit, newSignal(), func() *raft.Raft { return r })
		if err != nil {
			t.Fatal(err)
		}
		disk := &laggingDisk{raft.NewInmemStore(), random}
		snapshots := raft.NewInmemSnapshotStore()
		conf := cfg.raftConfig()
		if err := raft.BootstrapCluster(conf, disk, disk, snapshots, v, raft.Configuration{Servers: servers}); err != nil {
			t.Fatal(err)
		}
		if r, err = raft.NewRaft(conf, &raft.MockFSM{}, disk, disk, snapshots, v); err != nil {
			t.Fatal(err)
		}
		e.rafts = append(e.rafts, r)
		seen := make(chan raft.Observation, 16)
		observer := raft.NewObserver(seen, false, nil)
		r.RegisterObserver(observer)
		ctx, cancel := context.WithCancel(context.Background())
		var group sync.WaitGroup
		group.Go(func() { v.run(ctx) })
		group.Go(func() { v.watch(ctx, r) })
		group.Go(func() {
			for ctx.Err() == nil {
				select {
				case <-ctx.Done():
				case <-seen:
					v.changed.notify()
				}
			}
		})
		e.stops = append(e.stops, sync.OnceFunc(func() {
			if err := r.Shutdown().Error(); err != nil {
				t.Error(err)
			}
			r.DeregisterObserver(observer)
			cancel()
			group.Wait()
		}))
	}
	return e
}

func (e *ensemble) stop() {
	for _, stop := range e.stops {
		stop()
	}
}

// leader waits for a leader other than not.
func (e *ensemble) leader(not int) int {
	e.Helper()
	for range 20_000 {
		for i, r := range e.rafts {
			if i != not && r.State() == raft.Leader {
				return i
			}
		}
		time.Sleep(time.Millisecond)
	}
	e.Fatal("nobody leads")
	return 0
}

// cut takes one away from the others.
func (e *ensemble) cut(i int) {
	for j, other := range e.links {
		if i != j {
			other.Disconnect(e.links[i].LocalAddr())
			e.links[i].Disconnect(other.LocalAddr())
		}
	}
}

// join undoes cut.
func (e *ensemble) join(i int) {
	for j, other := range e.links {
		if i != j {
			other.Connect(e.links[i].LocalAddr(), e.links[i].InmemTransport)
			e.links[i].Connect(other.LocalAddr(), other.InmemTransport)
		}
	}
}

// Without the vigil the median is two heartbeat timeouts and the worst case over three.
func TestLeaderIsReplacedWhenTheTimeoutIsOver(t *testing.T) {
	for _, n := range []int{3, 5} {
		t.Run(fmt.Sprintf("%d peers", n), func(t *testing.T) {
			t.Parallel()
			var took []time.Duration
			for seed := range uint64(60) {
				synctest.Test(t, func(t *testing.T) {
					e := newEnsemble(t, n, seed)
					defer e.stop()
					old := e.leader(-1)
					// Writes are under way, so that the logs of the others differ.
					for range 10 {
						e.rafts[old].Apply([]byte("w"), time.Second)
						time.Sleep(time.Duration(seed%7) * time.Millisecond)
					}
					e.cut(old)
					began := time.Now()
					e.leader(old)
					took = append(took, time.Since(began))
				})
			}
			slices.Sort(took)
			t.Logf("p50 %s, p90 %s, max %s", took[len(took)/2], took[len(took)*9/10], took[len(took)-1])
			if p50 := took[len(took)/2]; p50 > vigilLimit+vigilLimit/4 {
				t.Errorf("half of the elections took more than %s", p50)
			}
			// With three peers about one election in ten splits its votes and needs another.
			if p70 := took[len(took)*7/10]; p70 > 3*vigilLimit/2 {
				t.Errorf("three elections in ten took more than %s", p70)
			}
		})
	}
}

// A short pause of the network replaces nobody.
func TestShortSilenceReplacesNobody(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			e := newEnsemble(t, 3, seed)
			defer e.stop()
			leader := e.leader(-1)
			time.Sleep(time.Second)
			term := e.rafts[leader].CurrentTerm()
			for range 10 {
				e.cut(leader)
				// Before it, a message may be a fifth of the timeout old, and after it Raft
				// takes up to half of one until it tries again.
				time.Sleep(vigilLimit / 4)
				e.join(leader)
				time.Sleep(time.Second)
			}
			if now := e.rafts[leader].CurrentTerm(); now != term || e.rafts[leader].State() != raft.Leader {
				t.Errorf("seed %d: term %d became %d, the leader is a %s now", seed, term, now, e.rafts[leader].State())
			}
		})
	}
}

// hashicorp/raft by itself would leave the one that returns alone for up to 10 s.
func TestFollowerThatWasAwayForLongIsServedAtOnce(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			e := newEnsemble(t, 3, seed)
			defer e.stop()
			leader := e.leader(-1)
			away := (leader + 1) % 3
			e.cut(away)
			time.Sleep(time.Minute)
			if err := e.rafts[leader].Apply([]byte("w"), time.Second).Error(); err != nil {
				t.Fatal(err)
			}
			e.join(away)
			began := time.Now()
			for e.rafts[away].AppliedIndex() < e.rafts[leader].AppliedIndex() {
				time.Sleep(time.Millisecond)
				if took := time.Since(began); took > vigilLimit {
					t.Fatalf("seed %d: the follower is back for %s and has not got the entries that it missed", seed, took)
				}
			}
		})
	}
}

// A lost follower that is removed, or whose leader is deposed, holds nothing up.
func TestNothingWaitsForAFollowerThatIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnsemble(t, 3, 1)
		defer e.stop()
		leader := e.leader(-1)
		away := (leader + 1) % 3
		e.cut(away)
		time.Sleep(time.Minute)
		began := time.Now()
		id := raft.ServerID(fmt.Sprintf("n%d", away))
		if err := e.rafts[leader].RemoveServer(id, 0, time.Second).Error(); err != nil {
			t.Fatal(err)
		}
		if err := e.rafts[leader].Apply([]byte("w"), time.Second).Error(); err != nil {
			t.Fatal(err)
		}
		// It waits for what replicates.
		if err := e.rafts[leader].Shutdown().Error(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 2*vigilLimit {
			t.Errorf("removal and shutdown took %s", took)
		}
	})
}

func TestMessagesAreSentAnewOverStaleConnectionsOnly(t *testing.T) {
	refused := errors.New("refused")
	tests := []struct {
		name    string
		answers []error
		want    error
		sent    int
	}{
		{"at once", []error{nil}, nil, 1},
		{"after stale connections", []error{io.EOF, fmt.Errorf("write: %w", syscall.EPIPE), syscall.ECONNRESET, nil}, nil, 4},
		{"refused", []error{refused}, refused, 1},
		{"never", []error{io.EOF, io.EOF, io.EOF, io.EOF}, io.EOF, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sent := 0
			err := again(func() error { sent++; return tt.answers[sent-1] })
			if !errors.Is(err, tt.want) || sent != tt.sent {
				t.Errorf("sent %d times, %v", sent, err)
			}
		})
	}
}
