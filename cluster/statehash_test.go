package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func comparing(c *Config) { c.Timers.CompareStates = 50 * time.Millisecond }

// ended waits until a peer ends by itself and returns why.
func (r *running) ended() error {
	r.lab.Helper()
	r.lab.eventually(r.cfg.ID+" ends", func() bool {
		select {
		case <-r.done:
			return true
		default:
			return false
		}
	})
	err := r.err
	r.err = nil
	r.stop()
	return err
}

// TestAPeerWithAnotherStateStops: the one that differs stops, says where and how
// to go on, stays stopped until that is done, and recovers after it.
func TestAPeerWithAnotherStateStops(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.prepare = func(p *Peer) {
		if p.cfg.ID == "n3" {
			p.state.Apply(0, write("ghost"))
		}
	}
	for _, id := range []string{"n1", "n2", "n3"} {
		l.start(id, expect(3), comparing)
	}
	astray := l.peers["n3"]
	l.put("real")
	err := astray.ended()
	if !errors.Is(err, ErrDiverged) {
		t.Fatalf("ended with %v", err)
	}
	want := l.leader().state.View()
	for _, part := range []string{"at index ", "its hash is ", "2 of 3 voters have ", filepath.Join(l.dirs["n3"], "raft"), "move it aside"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the message lacks %q: %v", part, err)
		}
	}
	// The others go on, and do not believe the one that differs.
	l.put("more")
	if _, ok := want.Provider("ghost"); ok {
		t.Error("the leader has the ghost")
	}

	// A restart alone is refused with the same words.
	l.prepare = nil
	if again := l.start("n3", expect(3), comparing).ended(); again == nil || again.Error() != err.Error() {
		t.Errorf("after a restart: %v", again)
	}

	// The way back.
	raftFiles := filepath.Join(l.dirs["n3"], "raft")
	if err := os.Rename(raftFiles, raftFiles+".old"); err != nil {
		t.Fatal(err)
	}
	l.start("n3", expect(3), comparing)
	l.voters("n1", "n2", "n3")
	l.put("last")
	l.everywhere("last")
	if has(l.peers["n3"].state.View(), "ghost") {
		t.Error("the ghost is back")
	}
}

// TestALeaderWithAnotherStateStops: it is not the role that is right but the majority.
func TestALeaderWithAnotherStateStops(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three(comparing)
	l.put("real")
	l.everywhere("real")
	// What a stray bit in memory would do.
	index := leader.state.View().Index()
	if res := leader.state.Apply(index, write("ghost")); res.GetError() != nil {
		t.Fatal(res)
	}
	l.put("more")
	if err := leader.ended(); !errors.Is(err, ErrDiverged) {
		t.Fatalf("ended with %v", err)
	}
	l.put("last")
	l.everywhere("last")
}

func TestMajorities(t *testing.T) {
	for name, c := range map[string]struct {
		poll poll
		want string
		ok   bool
	}{
		"all":           {poll{voters: 3, votes: map[string]int{"a": 3}}, "a", true},
		"two of three":  {poll{voters: 3, votes: map[string]int{"a": 1, "b": 2}}, "b", true},
		"two of four":   {poll{voters: 4, votes: map[string]int{"a": 2, "b": 2}}, "", false},
		"all differ":    {poll{voters: 3, votes: map[string]int{"a": 1, "b": 1, "c": 1}}, "", false},
		"few answered":  {poll{voters: 5, votes: map[string]int{"a": 2}}, "", false},
		"one of two":    {poll{voters: 2, votes: map[string]int{"a": 1, "b": 1}}, "", false},
		"nobody":        {poll{voters: 0}, "", false},
		"three of five": {poll{voters: 5, votes: map[string]int{"a": 2, "b": 3}}, "b", true},
	} {
		if got, ok := c.poll.majority(); got != c.want || ok != c.ok {
			t.Errorf("%s: got %q, %v", name, got, ok)
		}
	}
	for _, index := range []uint64{0, 1, 63, 64, 65, 1000, 1 << 20} {
		seen := map[uint64]bool{}
		for _, at := range compared(index) {
			if at > index || seen[at] && at != index {
				t.Errorf("at %d it compares %v", index, compared(index))
			}
			seen[at] = true
		}
		if n := len(compared(index)); n > comparedIndexes {
			t.Errorf("at %d it compares %d indexes", index, n)
		}
	}
}

func TestOnlyPeersAndOperatorsSeeHashes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.start("n1", expect(1))
	l.put("a")
	view := leader.state.View() // the peer's own commands go on changing the state
	index := view.Index()
	got, err := pb.NewClusterServiceClient(l.admin(leader)).StateHash(t.Context(), &pb.StateHashRequest{Indexes: []uint64{index, index + 1000}})
	if err != nil || len(got.GetHashes()) != 1 || got.GetHashes()[0].GetHash() != view.Hash() || got.GetClusterId() == "" {
		t.Errorf("an operator: %v, %v", got, err)
	}
	if _, err := pb.NewClusterServiceClient(l.worker(leader)).StateHash(t.Context(), &pb.StateHashRequest{}); err == nil {
		t.Error("a worker was answered")
	}
}
