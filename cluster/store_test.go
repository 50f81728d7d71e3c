package cluster

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func testWatch() *diskWatch {
	return &diskWatch{limit: time.Minute, slow: func() {}, recovered: func() {}, damaged: func(error) {}}
}

func TestEntriesComeBackAsTheyWereStored(t *testing.T) {
	logs := &checkedLogs{LogStore: raft.NewInmemStore(), watch: testWatch()}
	want := &raft.Log{Index: 1, Term: 2, Type: raft.LogCommand, Data: []byte("data"), Extensions: []byte("ext")}
	bare := &raft.Log{Index: 2, Term: 2, Type: raft.LogNoop}
	if err := logs.StoreLogs([]*raft.Log{want, bare}); err != nil {
		t.Fatal(err)
	}
	var got raft.Log
	if err := logs.GetLog(1, &got); err != nil || string(got.Data) != "data" || string(got.Extensions) != "ext" {
		t.Errorf("entry 1: %+v, %v", got, err)
	}
	if err := logs.GetLog(2, &got); err != nil || got.Extensions != nil {
		t.Errorf("entry 2: %+v, %v", got, err)
	}
	if string(want.Extensions) != "ext" {
		t.Error("the caller's entry was changed")
	}
	if err := logs.GetLog(3, &got); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry 3: %v", err)
	}
}

func TestDamagedEntriesAreNoticed(t *testing.T) {
	tests := map[string]func(*raft.Log){
		"data":        func(e *raft.Log) { e.Data = []byte("dat4") },
		"shorter":     func(e *raft.Log) { e.Data = e.Data[:3] },
		"term":        func(e *raft.Log) { e.Term++ },
		"type":        func(e *raft.Log) { e.Type = raft.LogNoop },
		"checksum":    func(e *raft.Log) { e.Extensions[len(e.Extensions)-1] ^= 1 },
		"no checksum": func(e *raft.Log) { e.Extensions = nil },
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			store := raft.NewInmemStore()
			var reported atomic.Int32
			watch := testWatch()
			watch.damaged = func(error) { reported.Add(1) }
			logs := &checkedLogs{LogStore: store, watch: watch}
			if err := logs.StoreLog(&raft.Log{Index: 1, Term: 2, Data: []byte("data")}); err != nil {
				t.Fatal(err)
			}
			var entry raft.Log
			if err := store.GetLog(1, &entry); err != nil {
				t.Fatal(err)
			}
			damage(&entry)
			if err := store.StoreLog(&entry); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := logs.GetLog(1, &raft.Log{}); !errors.Is(err, ErrCorrupt) {
					t.Errorf("read: %v", err)
				}
			}
			if reported.Load() != 1 {
				t.Errorf("reported %d times", reported.Load())
			}
			if err := (&storage{logs: logs, snapshots: raft.NewInmemSnapshotStore()}).verify(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("verify: %v", err)
			}
		})
	}
}

// A restored snapshot leaves a hole in the log; one above it is damage.
func TestAHoleInTheLogIsDamageUnlessASnapshotHoldsIt(t *testing.T) {
	for held, want := range map[uint64]error{0: ErrCorrupt, 2: ErrCorrupt, 3: nil} {
		store, snapshots := raft.NewInmemStore(), raft.NewInmemSnapshotStore()
		logs := &checkedLogs{LogStore: store, watch: testWatch()}
		for _, index := range []uint64{1, 2, 4} {
			if err := logs.StoreLog(&raft.Log{Index: index, Term: 2, Data: []byte("data")}); err != nil {
				t.Fatal(err)
			}
		}
		if held > 0 {
			sink, err := snapshots.Create(raft.SnapshotVersionMax, held, 2, raft.Configuration{}, 0, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := sink.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := (&storage{logs: logs, snapshots: snapshots}).verify(); !errors.Is(err, want) {
			t.Errorf("with a snapshot up to %d: %v, want %v", held, err, want)
		}
	}
}

func TestEmptyDiskIsMarkedUntilThePeerHasItsPlace(t *testing.T) {
	memory := raft.NewInmemStore()
	s := &storage{logs: &checkedLogs{LogStore: memory, watch: testWatch()}, stable: memory, snapshots: raft.NewInmemSnapshotStore()}
	for range 2 {
		if mark, err := s.unsettled(); err != nil || !mark {
			t.Fatalf("an empty disk: %v, %v", mark, err)
		}
	}
	// Entries of a leader arrive before the peer has joined; then it crashes.
	if err := s.logs.StoreLog(&raft.Log{Index: 1, Term: 1}); err != nil {
		t.Fatal(err)
	}
	if mark, err := s.unsettled(); err != nil || !mark {
		t.Fatalf("a disk that was empty: %v, %v", mark, err)
	}
	if err := s.markUnsettled(0); err != nil {
		t.Fatal(err)
	}
	if mark, err := s.unsettled(); err != nil || mark {
		t.Fatalf("a settled disk: %v, %v", mark, err)
	}
}

func TestGuardRefusesVotesUntilThePeerMayVote(t *testing.T) {
	_, inner := raft.NewInmemTransport("a")
	address, other := raft.NewInmemTransport("b")
	inner.Connect(address, other)
	_, asker := raft.NewInmemTransport("c")
	asker.Connect("a", inner)
	g, err := newGuard(inner, &atomic.Bool{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); g.run(ctx) }()
	defer func() { cancel(); <-done }()
	go func() {
		for {
			select {
			case rpc := <-g.Consumer():
				switch rpc.Command.(type) {
				case *raft.RequestVoteRequest:
					rpc.Respond(&raft.RequestVoteResponse{Granted: true}, nil)
				case *raft.RequestPreVoteRequest:
					rpc.Respond(&raft.RequestPreVoteResponse{Granted: true}, nil)
				default:
					rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	for _, may := range []bool{false, true} {
		g.mayVote.Store(may)
		var vote raft.RequestVoteResponse
		if err := asker.RequestVote("a", "a", &raft.RequestVoteRequest{}, &vote); vote.Granted != may {
			t.Errorf("may vote %v: %+v, %v", may, vote, err)
		}
		var pre raft.RequestPreVoteResponse
		if err := asker.RequestPreVote("a", "a", &raft.RequestPreVoteRequest{}, &pre); pre.Granted != may {
			t.Errorf("may vote %v: pre-vote %+v, %v", may, pre, err)
		}
		var entries raft.AppendEntriesResponse
		if err := asker.AppendEntries("a", "a", &raft.AppendEntriesRequest{}, &entries); err != nil || !entries.Success {
			t.Errorf("may vote %v: entries %+v, %v", may, entries, err)
		}
	}
}

func TestSealedGuardSendsNothing(t *testing.T) {
	_, inner := raft.NewInmemTransport("a")
	g, err := newGuard(inner, &atomic.Bool{})
	if err != nil {
		t.Fatal(err)
	}
	g.seal()
	sends := map[string]func() error{
		"entries":  func() error { return g.AppendEntries("b", "b", nil, nil) },
		"vote":     func() error { return g.RequestVote("b", "b", nil, nil) },
		"pre-vote": func() error { return g.RequestPreVote("b", "b", nil, nil) },
		"snapshot": func() error { return g.InstallSnapshot("b", "b", nil, nil, nil) },
		"timeout":  func() error { return g.TimeoutNow("b", "b", nil, nil) },
	}
	for name, send := range sends {
		if err := send(); !errors.Is(err, errSealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	g.unseal()
	if err := g.check(); err != nil {
		t.Error(err)
	}
}
