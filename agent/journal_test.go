package agent

import (
	"errors"
	"log/slog"
	"os"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func testJournal(t *testing.T) *journal {
	t.Helper()
	return newJournal(t.TempDir(), slog.New(slog.DiscardHandler), nil, func(error) {})
}

func journalSet() *pb.WatchAssignmentsResponse {
	set := newAssignments()
	set.sequence, set.index = 9, 12
	set.instances["a-1"] = &pb.Instance{Id: "a-1", Name: "a", Placement: &pb.Placement{Generation: 2}}
	set.nodes["n2"] = &pb.NodeAddress{NodeId: "n2", AgentAddress: "x:1"}
	set.providers["kv"] = &pb.Provider{Id: "kv"}
	set.grants[assignmentKey{"a-1", "kv"}] = &pb.CapabilityAssignment{InstanceId: "a-1", ProviderId: "kv"}
	set.remotes["b-1"] = &pb.RemoteInstance{InstanceId: "b-1"}
	return set.full(func(string) *pb.InstanceStatus {
		return &pb.InstanceStatus{Generation: 2, State: pb.InstanceState_INSTANCE_STATE_COMPLETED}
	})
}

func TestJournalKeepsTheWholeSet(t *testing.T) {
	j := testJournal(t)
	if got, err := j.load(); got != nil || err != nil {
		t.Fatalf("without a file: %v, %v", got, err)
	}
	want := journalSet()
	if err := j.saveLocked(want); err != nil {
		t.Fatal(err)
	}
	got, err := j.load()
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, want) {
		t.Fatalf("got %v\nwant %v", got, want)
	}
	if err := os.WriteFile(j.path+".tmp-1", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := j.load(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(j.path + ".tmp-1"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("an unfinished write is still there: %v", err)
	}
	set := newAssignments()
	if err := set.apply(got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(set.full(func(string) *pb.InstanceStatus { return nil }), want) {
		t.Fatal("the set that was read gives another journal")
	}
}

// TestJournalDamageIsNeverSilent flips each bit and cuts at each length.
func TestJournalDamageIsNeverSilent(t *testing.T) {
	j := testJournal(t)
	if err := j.saveLocked(journalSet()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(j.path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(data []byte, what string, at int) {
		t.Helper()
		if err := os.WriteFile(j.path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := j.load(); !errors.Is(err, errJournalDamaged) {
			t.Fatalf("%s at %d: %v", what, at, err)
		}
	}
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1 << (i % 8)
		check(bad, "a flipped bit", i)
		check(good[:i], "cut", i)
	}
	check(append(append([]byte(nil), good...), 0), "a byte too many", len(good))
}
