package fsm_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func sessionOf(id string) *pb.Command {
	return command(&pb.OpenSessionCommand{SessionId: id, IdleTimeout: durationpb.New(time.Hour)})
}

func (b *bed) session(id string) {
	b.t.Helper()
	if res := b.send(sessionOf(id)); res.GetError() != nil || len(res.GetIds()) != 1 || res.GetIds()[0] != id {
		b.t.Fatalf("open session %s: %v", id, res)
	}
}

// numbered is a request of a session; its id and digest follow from its number.
func numbered(session string, sequence, outstanding uint64, payload proto.Message) *pb.Command {
	cmd := request(fmt.Sprintf("%s-%d", session, sequence), fmt.Sprint(sequence), payload)
	cmd.Session = &pb.CommandSession{Id: session, Sequence: sequence, FirstOutstanding: outstanding}
	return cmd
}

// idle is a command that only tells the time.
func idle() *pb.Command { return command(&pb.RemovePeerCommand{}) }

func TestASessionKeepsItsAnswersForAsLongAsItIsUsed(t *testing.T) {
	b := newBed(t)
	b.module()
	b.session("s")
	first := b.send(numbered("s", 1, 1, create("w")))
	if first.GetError() != nil {
		t.Fatal(first)
	}
	// A day of use with the first request outstanding.
	for i := range 200 {
		b.at(time.Duration(i)*30*time.Minute, numbered("s", uint64(i)+2, 1, &pb.DrainNodeCommand{}))
	}
	if again := b.send(numbered("s", 1, 1, create("w"))); !proto.Equal(first, again) {
		t.Errorf("got %v, the first answer was %v", again, first)
	}
	// Whoever knows only the request id gets it too, and another content is a conflict.
	alone := numbered("s", 1, 1, create("w"))
	alone.Session = nil
	if again := b.send(alone); !proto.Equal(first, again) {
		t.Errorf("without its session: %v", again)
	}
	other := numbered("s", 1, 1, create("v"))
	other.RequestDigest = []byte("other")
	if got := b.send(other).GetError(); got.GetCode() != conflict {
		t.Errorf("another content: %v", got)
	}
}

func TestWhatASessionRefuses(t *testing.T) {
	b := newBed(t)
	b.module()
	b.session("s")
	for i := range uint64(100) {
		b.send(numbered("s", i+1, i+1, &pb.DrainNodeCommand{}))
	}
	foreign := numbered("s", 101, 90, create("w"))
	foreign.Actor = "somebody else"
	anonymous := numbered("s", 101, 90, create("w"))
	anonymous.RequestId = ""
	taken := numbered("s", 100, 100, create("w"))
	taken.RequestId = "another request"
	for name, c := range map[string]struct {
		cmd     *pb.Command
		code    pb.ErrorCode
		outcome string
	}{
		"unknown":       {numbered("t", 1, 1, create("w")), conflict, "unknown"},
		"of another":    {foreign, conflict, "unknown"},
		"acknowledged":  {numbered("s", 5, 5, create("w")), conflict, "unknown"},
		"without an id": {anonymous, invalid, "failed"},
		"number 0":      {numbered("s", 0, 0, create("w")), invalid, "failed"},
		"answered":      {numbered("s", 101, 102, create("w")), invalid, "failed"},
		"number in use": {taken, conflict, "failed"},
		"far ahead":     {numbered("s", 100+fsm.MaxOutstanding, 100, create("w")), exhausted, "failed"},
	} {
		before := dump(t, b.s)
		got := b.send(c.cmd).GetError()
		if got.GetCode() != c.code || got.GetDetails()["outcome"] != c.outcome ||
			(c.outcome == "unknown") != (got.GetDetails()["attempt"] == "failed") {
			t.Errorf("%s: got %v", name, got)
		}
		// Nothing is remembered of it: header and trailer differ, nothing else.
		if was, is := parse(t, before), parse(t, dump(t, b.s)); len(was) != len(is) {
			t.Errorf("%s: %d records became %d", name, len(was), len(is))
		}
		if again := b.send(c.cmd); again.GetError().GetCode() != c.code {
			t.Errorf("%s: repeated it gives %v", name, again)
		}
	}
	if len(b.s.View().Instances(nil)) != 0 {
		t.Error("a refused request had an effect")
	}
	if got := b.send(numbered("s", 99+fsm.MaxOutstanding, 100, create("w"))); got.GetError() != nil {
		t.Errorf("the last number that fits: %v", got)
	}
}

func TestAcknowledgedAnswersAreDropped(t *testing.T) {
	b := newBed(t)
	b.session("s")
	most := 0
	for i := range uint64(1000) {
		b.send(numbered("s", i+1, i+1, &pb.DrainNodeCommand{}))
		_, answers := b.s.View().SessionCounts()
		most = max(most, answers)
	}
	if most > 40 {
		t.Errorf("up to %d answers were kept of a client that has them all", most)
	}
	if b.s.View().Answered("s-1") || !b.s.View().Answered("s-1000") {
		t.Error("the wrong answers were dropped")
	}
}

func TestAnIdleSessionEnds(t *testing.T) {
	b := newBed(t)
	b.module()
	b.at(0, sessionOf("s"))
	b.at(0, numbered("s", 1, 1, create("w")))
	b.at(time.Hour, idle())
	if got := b.at(time.Hour, numbered("s", 2, 1, create("v"))); got.GetError() != nil {
		t.Errorf("ended too early: %v", got)
	}
	b.at(2*time.Hour, idle())
	if _, ok := b.s.View().Session("s"); !ok {
		t.Error("ended although it was used an hour ago")
	}
	late := 2*time.Hour + 5*time.Minute
	if got := b.at(late, numbered("s", 2, 1, create("v"))).GetError(); got.GetCode() != conflict || got.GetDetails()["session"] != "s" {
		t.Errorf("a repetition after its end: %v", got)
	}
	if sessions, answers := b.s.View().SessionCounts(); sessions != 0 || answers != 0 {
		t.Errorf("%d sessions and %d answers are left", sessions, answers)
	}
	if len(b.s.View().Instances(nil)) != 2 {
		t.Error("it was run again")
	}
}

func TestABadSessionIsNotOpened(t *testing.T) {
	b := newBed(t)
	b.session("s")
	open := func(id string, idle time.Duration) *pb.OpenSessionCommand {
		return &pb.OpenSessionCommand{SessionId: id, IdleTimeout: durationpb.New(idle)}
	}
	b.refuse(invalid, open("", time.Hour))
	b.refuse(invalid, open("t", time.Minute))
	b.refuse(invalid, open("t", 25*time.Hour))
	b.refuse(invalid, &pb.OpenSessionCommand{SessionId: "t"})
	b.refuse(conflict, open("s", time.Hour))
}

// crowded is a state with as many sessions as there may be, all but one last
// used at the start, the first one with an answer.
func crowded(t *testing.T) *bed {
	b := newBed(t)
	b.module()
	b.at(0, sessionOf("s0"))
	b.at(0, numbered("s0", 1, 1, create("w")))
	recs := parse(t, dump(t, b.s))
	at := len(recs) - 2 // before the answer of the session and the trailer
	answer := recs[at]
	recs = recs[:at]
	for i := range fsm.MaxSessions - 1 {
		recs = append(recs, &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Session{Session: &pb.ClientSession{
			Id: fmt.Sprintf("t%05d", i), Actor: "test", IdleTimeout: durationpb.New(time.Hour),
			ActiveAt: timestamppb.New(epochStart().Add(time.Minute)), FirstOutstanding: 1,
		}}})
	}
	restoreInto(t, b.s, compose(t, append(recs, answer)...))
	return b
}

func TestOnlySoManySessionsAreKept(t *testing.T) {
	b := crowded(t)
	if got := b.at(fsm.DedupAge/2, sessionOf("more")).GetError(); got.GetCode() != exhausted {
		t.Errorf("while all may be in use: %v", got)
	}
	// Repeating what s0 asked for is no use of it, and it is the oldest.
	late := fsm.DedupAge + 2*time.Minute
	if got := b.at(late, sessionOf("more")); got.GetError() != nil {
		t.Fatalf("with one that is idle: %v", got)
	}
	if _, ok := b.s.View().Session("s0"); ok {
		t.Error("the one that was idle the longest is still there")
	}
	if sessions, answers := b.s.View().SessionCounts(); sessions != fsm.MaxSessions || answers != 0 {
		t.Errorf("%d sessions, %d answers", sessions, answers)
	}
	if got := b.at(late, numbered("s0", 1, 1, create("w"))).GetError(); got.GetCode() != conflict {
		t.Errorf("a request of a session that had to go: %v", got)
	}
}

// TestAClientThatRepeatsIsServedOnce plays clients with and without luck: each
// request reaches the log any number of times and in any order, late ones too,
// and has its effect exactly once, always with the same answer.
func TestAClientThatRepeatsIsServedOnce(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		b := &bed{t: t, s: fsm.New()}
		b.module()
		b.session("s")
		const requests = 20
		answers := map[uint64]*pb.CommandResult{}
		outstanding := uint64(1)
		for len(answers) < requests {
			seq := outstanding + uint64(rapid.IntRange(0, 5).Draw(rt, "ahead"))
			if seq > requests || rapid.IntRange(0, 9).Draw(rt, "late") == 0 {
				seq = uint64(rapid.IntRange(1, requests).Draw(rt, "sequence"))
			}
			cmd := numbered("s", seq, min(seq, outstanding), create(fmt.Sprintf("w%d", seq)))
			res := b.send(cmd)
			known, again := answers[seq]
			switch {
			case again && res.GetError().GetDetails()["first_outstanding"] != "":
				if seq >= outstanding {
					rt.Fatalf("request %d is refused, the client has said that it waits from %d on", seq, outstanding)
				}
			case again && !proto.Equal(known, res):
				rt.Fatalf("request %d: got %v, the first answer was %v", seq, res, known)
			case !again && res.GetError() != nil:
				rt.Fatalf("request %d: %v", seq, res)
			case !again:
				answers[seq] = res
			}
			for answers[outstanding] != nil {
				outstanding++
			}
			if rapid.IntRange(0, 20).Draw(rt, "restart") == 0 {
				restoreInto(t, b.s, dump(t, b.s))
			}
		}
		if n := len(b.s.View().Instances(nil)); n != requests {
			rt.Fatalf("%d instances of %d requests", n, requests)
		}
	})
}
