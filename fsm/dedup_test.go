package fsm_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// request is a command with a request id and a digest.
func request(id, digest string, payload proto.Message) *pb.Command {
	cmd := command(payload)
	cmd.RequestId, cmd.RequestDigest = id, []byte(digest)
	return cmd
}

func create(name string) *pb.CreateInstancesCommand {
	return &pb.CreateInstancesCommand{Spec: workload(name, ""), InstanceIds: []string{name + "-1"}}
}

func TestARepeatedRequestHasNoSecondEffect(t *testing.T) {
	b := newBed(t)
	b.module()
	first := b.send(request("r1", "d", create("w")))
	same(t, "created", first.GetIds(), "w-1")
	b.do(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
	b.do(&pb.RemoveInstancesCommand{InstanceIds: []string{"w-1"}})
	b.news()
	// The instance is gone, and the repeated request must not bring it back.
	again := b.send(request("r1", "d", create("w")))
	if !proto.Equal(first, again) {
		t.Errorf("got %v, the first answer was %v", again, first)
	}
	if again.GetIndex() == b.index {
		t.Error("the answer has the index of the repetition")
	}
	b.tells()
	if _, ok := b.s.View().Instance("w-1"); ok {
		t.Error("the repeated request had an effect")
	}
}

func TestARefusalIsRememberedToo(t *testing.T) {
	b := newBed(t)
	first := b.send(request("r1", "d", create("w")))
	if first.GetError().GetCode() != noModule {
		t.Fatalf("got %v", first)
	}
	b.module()
	if again := b.send(request("r1", "d", create("w"))); !proto.Equal(first, again) {
		t.Errorf("got %v, the first answer was %v", again, first)
	}
}

func TestTheSameIDForAnotherRequestIsAConflict(t *testing.T) {
	b := newBed(t)
	b.module()
	first := b.send(request("r1", "d", create("w")))
	if got := b.send(request("r1", "other", create("v"))).GetError(); got.GetCode() != conflict {
		t.Errorf("got %v", got)
	}
	if _, ok := b.s.View().Instance("v-1"); ok {
		t.Error("it had an effect")
	}
	if again := b.send(request("r1", "d", create("w"))); !proto.Equal(first, again) {
		t.Errorf("the first answer was lost: %v", again)
	}
}

func TestAnAnswerBelongsToTheCaller(t *testing.T) {
	b := newBed(t)
	first := b.send(request("r1", "d", create("w")))
	want := proto.Clone(first)
	for range 2 {
		first.Error.Message = "changed"
		first.Error.Timestamp.Seconds = 1
		again := b.send(request("r1", "d", create("w")))
		if !proto.Equal(want, again) {
			t.Errorf("got %v, want %v", again, want)
		}
		first = again
	}
}

// at sends a command with a time of its own.
func (b *bed) at(after time.Duration, cmd *pb.Command) *pb.CommandResult {
	b.t.Helper()
	cmd.Time = timestamppb.New(epochStart().Add(after))
	return b.send(cmd)
}

func TestAnswersAreKeptForTheirTime(t *testing.T) {
	b := newBed(t)
	b.at(0, command(&pb.PutModuleCommand{Module: &pb.Module{Digest: digest}}))
	b.at(0, request("r1", "d", create("w")))
	if got := b.at(fsm.DedupAge, request("r1", "d", create("w"))); got.GetError() != nil {
		t.Errorf("forgotten too early: %v", got)
	}
	if got := b.at(fsm.DedupAge+1, request("r1", "d", create("w"))); got.GetError().GetCode() != conflict {
		t.Errorf("not forgotten: %v", got)
	}
}

func TestOnlySoManyAnswersAreKept(t *testing.T) {
	b := newBed(t)
	b.at(0, command(&pb.PutModuleCommand{Module: &pb.Module{Digest: digest}}))
	first := b.at(0, request("r0", "d", create("w")))

	// As many more as there is room for, by way of a snapshot.
	recs := parse(t, dump(t, b.s))
	recs = recs[:len(recs)-1]
	for range fsm.DedupKept - 1 {
		b.index++
		recs = append(recs, &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Dedup{Dedup: &pb.DedupRecord{
			RequestId: fmt.Sprintf("r%d", b.index), Time: timestamppb.New(epochStart()),
			Result: &pb.CommandResult{Index: b.index},
		}}})
	}
	recs[0].GetHeader().Index = b.index
	restoreInto(t, b.s, compose(t, recs...))

	// One too many is refused rather than an answer forgotten that somebody counts on.
	for range 2 {
		if got := b.at(0, request("one too many", "d", create("v"))); got.GetError().GetCode() != exhausted {
			t.Errorf("got %v", got)
		}
		if again := b.at(0, request("r0", "d", create("w"))); !proto.Equal(first, again) {
			t.Errorf("forgotten too early: %v", again)
		}
	}
	if got := b.at(0, command(create("v"))); got.GetError() != nil {
		t.Errorf("a request without an id: %v", got)
	}
	if got := b.at(fsm.DedupAge+1, request("one too many", "d", create("u"))); got.GetError() != nil {
		t.Errorf("when the others have aged: %v", got)
	}
}

func TestTimeNeverGoesBack(t *testing.T) {
	b := newBed(t)
	if !b.s.View().Time().IsZero() {
		t.Errorf("a new state is at %v", b.s.View().Time())
	}
	send := func(at *timestamppb.Timestamp) time.Time {
		b.index++
		b.s.Apply(b.index, &pb.Command{Time: at, Payload: command(&pb.RemovePeerCommand{}).Payload})
		return b.s.View().Time()
	}
	noon := epochStart()
	for i, at := range []*timestamppb.Timestamp{
		timestamppb.New(noon), timestamppb.New(noon.Add(-time.Hour)), nil, {Seconds: 1 << 60}, {Nanos: -1},
	} {
		if got := send(at); !got.Equal(noon) {
			t.Errorf("step %d: the state is at %v", i, got)
		}
	}
	if got := send(timestamppb.New(noon.Add(1))); !got.Equal(noon.Add(1)) {
		t.Errorf("the state is at %v", got)
	}
}
