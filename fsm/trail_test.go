package fsm_test

import (
	"testing"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// TestTheHashesOfThePastAreRemembered: what the state says of an index later is
// what it said then, for entries that are no commands too.
func TestTheHashesOfThePastAreRemembered(t *testing.T) {
	s := fsm.New()
	m := fsm.NewRaftFSM(s, failOn(t))
	then := map[uint64]string{}
	const last = 6000
	for index := uint64(1); index <= last; index++ {
		e := &raft.Log{Index: index, Type: raft.LogConfiguration}
		if index%3 != 0 {
			e = entry(t, index, command(&pb.DrainNodeCommand{NodeId: "n"}))
		}
		m.Apply(e)
		then[index] = s.View().Hash()
		if hash, ok := s.HashAt(index); index > 1 && (!ok || hash != then[index]) {
			t.Fatalf("at index %d itself: %s, %v", index, hash, ok)
		}
	}
	known := 0
	for index := uint64(1); index <= last; index++ {
		hash, ok := s.HashAt(index)
		if ok && hash != then[index] {
			t.Fatalf("index %d: got %s, it was %s", index, hash, then[index])
		}
		if ok {
			known++
		}
		if want := index > last-1000 || index%fsm.CoarseStep == 0; want && !ok {
			t.Fatalf("index %d is forgotten", index)
		}
	}
	if known > 2000 {
		t.Errorf("%d hashes are remembered", known)
	}
	if _, ok := s.HashAt(last + 1); ok {
		t.Error("it knows the future")
	}
	// A snapshot may come from elsewhere: nothing before it is comparable.
	restoreInto(t, s, dump(t, s))
	if _, ok := s.HashAt(last); ok {
		t.Error("it knows the past of a restored state")
	}
	m.Apply(entry(t, last+1, command(&pb.DrainNodeCommand{NodeId: "n"})))
	if hash, ok := s.HashAt(last + 1); !ok || hash != s.View().Hash() {
		t.Errorf("after the restore: %s, %v", hash, ok)
	}
}
