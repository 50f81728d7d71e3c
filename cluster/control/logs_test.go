package control

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// logStream is a FollowLogs call with a deadline.
func logStream(t *testing.T, p *testPeer, req *pb.FollowLogsRequest) grpc.ServerStreamingClient[pb.FollowLogsResponse] {
	t.Helper()
	ctx, cancel := context.WithTimeout(asAlice(t.Context()), 20*time.Second)
	t.Cleanup(cancel)
	stream, err := p.client.FollowLogs(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// line reads the next line of a stream.
func line(t *testing.T, stream grpc.ServerStreamingClient[pb.FollowLogsResponse]) *pb.LogEntry {
	t.Helper()
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetEntry()
}

func wantLines(t *testing.T, stream grpc.ServerStreamingClient[pb.FollowLogsResponse], want ...string) {
	t.Helper()
	for _, w := range want {
		if got := line(t, stream).GetMessage(); got != w {
			t.Fatalf("line is %q, want %q", got, w)
		}
	}
}

func wantEnd(t *testing.T, stream grpc.ServerStreamingClient[pb.FollowLogsResponse]) {
	t.Helper()
	if resp, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("stream goes on with %v, %v; want its end", resp, err)
	}
}

func TestLogsOfAllReplicasAreMergedByTime(t *testing.T) {
	p := newPeer(t)
	n1, n2 := &fakeAgent{}, &fakeAgent{}
	p.addNode("n1", n1)
	p.addNode("n2", n2)
	web := p.start("web", 3)
	p.run(web[0], "n1")
	p.run(web[1], "n2")
	n1.write(web[0], 10, "one")
	n2.write(web[1], 20, "two")
	n2.write(web[1], 30, "three")
	n1.write(web[0], 40, "four")
	n1.write(web[0], 50, "five")
	p.loseLeader()

	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}})
	wantLines(t, stream, "one", "two", "three", "four", "five")
	wantEnd(t, stream)

	stream = logStream(t, p, &pb.FollowLogsRequest{Targets: []string{web[1], web[2]}})
	wantLines(t, stream, "two", "three")
	wantEnd(t, stream)

	stream = logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}, Tail: 1})
	wantLines(t, stream, "three", "five")
	wantEnd(t, stream)
}

func TestLogsThatCannotBeReadAreNamed(t *testing.T) {
	p := newPeer(t)
	n1 := &fakeAgent{}
	p.addNode("n1", n1)
	p.register("n2")
	web := p.start("web", 2)
	p.run(web[0], "n1")
	p.run(web[1], "n2")
	n1.write(web[0], 10, "one")
	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}})
	wantLines(t, stream, "one")
	note := line(t, stream)
	if note.GetInstanceId() != web[1] || note.GetNodeId() != "n2" || note.GetStream() != pb.LogStream_LOG_STREAM_SYSTEM ||
		note.GetLevel() != pb.LogLevel_LOG_LEVEL_WARN || !strings.Contains(note.GetMessage(), "cannot be read") {
		t.Errorf("the note is %v", note)
	}
	wantEnd(t, stream)

	_, err := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web", "nothing"}}).Recv()
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
}

func TestFollowedLogsKeepUpWithTheWorkload(t *testing.T) {
	p := newPeer(t)
	n1, n2 := &fakeAgent{}, &fakeAgent{}
	p.addNode("n1", n1)
	p.addNode("n2", n2)
	p.service.handlers.suffix = func() string { return "bbbbb" }
	first := p.start("web", 1)[0]
	n1.write(first, 10, "before")
	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}, Follow: true})

	// It starts later.
	p.run(first, "n1")
	wantLines(t, stream, "before")
	n1.write(first, 20, "live")
	wantLines(t, stream, "live")

	// It moves.
	p.apply(&pb.Command{Payload: &pb.Command_DrainNode{DrainNode: &pb.DrainNodeCommand{NodeId: "n1", Draining: true}}})
	n1.write(first, 30, "last words")
	wantLines(t, stream, "last words")
	p.place(first, "n2") // asks it to leave
	p.leave(first)
	p.place(first, "n2")
	n2.write(first, 5, "moved")
	wantLines(t, stream, "moved")

	// Another appears under the name.
	if _, err := p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: first}); err != nil {
		t.Fatal(err)
	}
	p.report(first, pb.InstanceState_INSTANCE_STATE_STOPPED)
	p.service.handlers.suffix = func() string { return "ccccc" }
	second := p.start("web", 1)[0]
	p.run(second, "n2")
	n2.write(second, 40, "second")
	wantLines(t, stream, "second")

	p.service.Close()
	_, err := stream.Recv()
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE)
}

func TestFollowedLogsEndWithTheirInstances(t *testing.T) {
	p := newPeer(t)
	n1 := &fakeAgent{}
	p.addNode("n1", n1)
	id := p.start("web", 1)[0]
	p.run(id, "n1")
	n1.write(id, 10, "one")
	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{id}, Follow: true})
	wantLines(t, stream, "one")
	if _, err := p.client.RemoveInstance(asAlice(t.Context()), &pb.RemoveInstanceRequest{Target: id, Force: true}); err != nil {
		t.Fatal(err)
	}
	n1.write(id, 20, "last words")
	wantLines(t, stream, "last words")
	began := time.Now()
	n1.drop(id)
	wantEnd(t, stream)
	if took := time.Since(began); took >= logLinger/2 {
		t.Errorf("the stream ended %s after the agent had nothing more", took)
	}
}

func TestABrokenLogStreamGoesOnWithoutALineTwice(t *testing.T) {
	p := newPeer(t)
	n1 := &fakeAgent{}
	p.addNode("n1", n1)
	id := p.start("web", 1)[0]
	p.run(id, "n1")
	// Two lines of one time: the first is seen before the break, the second comes after it.
	for at, message := range []string{"a", "b", "c"} {
		n1.write(id, 10+at, message)
	}
	n1.write(id, 12, "c again")
	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}, Follow: true, Tail: 3})
	wantLines(t, stream, "b", "c", "c again")
	n1.breakStreams()
	if note := line(t, stream); note.GetStream() != pb.LogStream_LOG_STREAM_SYSTEM {
		t.Fatalf("after the break comes %v, want a note", note)
	}
	n1.write(id, 12, "c once more")
	n1.write(id, 13, "d")
	wantLines(t, stream, "c once more", "d")
	eventually(t, "a second stream", func() bool { return n1.followers() >= 2 })
	n1.mu.Lock()
	resumed := n1.requests[1]
	n1.mu.Unlock()
	if resumed.GetTail() != 0 || resumed.GetSince().AsDuration() < logOverlap || resumed.GetSince().AsDuration() > time.Minute {
		t.Errorf("the stream was resumed with %v", resumed)
	}
}

func TestNoOldLinesAreFollowedWhenNoneAreAskedFor(t *testing.T) {
	p := newPeer(t)
	n1 := &fakeAgent{}
	p.addNode("n1", n1)
	id := p.start("web", 1)[0]
	p.run(id, "n1")
	n1.write(id, 10, "old")
	stream := logStream(t, p, &pb.FollowLogsRequest{Targets: []string{"web"}, Follow: true, Tail: -1})
	eventually(t, "the agent to be asked", func() bool { return n1.followers() == 1 })
	n1.write(id, 20, "new")
	wantLines(t, stream, "new")
}

func TestMergeKeepsTheOrderOfManyFeeds(t *testing.T) {
	var feeds []chan *pb.LogEntry
	var want []int64
	for i := range 50 {
		feed := make(chan *pb.LogEntry)
		feeds = append(feeds, feed)
		for k := range i % 7 {
			want = append(want, int64(k*100+i*13%100))
		}
		go func() {
			defer close(feed)
			for k := range i % 7 {
				e := &pb.LogEntry{}
				e.Time = at(int64(k*100 + i*13%100))
				feed <- e
			}
		}()
	}
	slices.Sort(want)
	var got []int64
	err := merge(feeds, func(e *pb.LogEntry) error {
		got = append(got, int64(e.GetTime().GetNanos()))
		return nil
	})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("merged into %v, %v; want %v", got, err, want)
	}
}
