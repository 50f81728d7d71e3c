package control

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// watch collects what a watch sends until it ends or n events came.
func watch(t *testing.T, p *testPeer, req *pb.WatchEventsRequest, n int) []*pb.WatchEventsResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(asAlice(t.Context()), 10*time.Second)
	defer cancel()
	stream, err := p.client.WatchEvents(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	var got []*pb.WatchEventsResponse
	for n < 0 || len(got) < n {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("after %d events: %v", len(got), err)
		}
		got = append(got, resp)
	}
	return got
}

func kinds(events []*pb.WatchEventsResponse) []pb.EventKind {
	out := make([]pb.EventKind, len(events))
	for i, e := range events {
		out[i] = e.GetEvent().GetKind()
	}
	return out
}

const (
	nodeJoined        = pb.EventKind_EVENT_KIND_NODE_JOINED
	instanceRequested = pb.EventKind_EVENT_KIND_INSTANCE_REQUESTED
	instancePlaced    = pb.EventKind_EVENT_KIND_INSTANCE_PLACED
	instanceStarted   = pb.EventKind_EVENT_KIND_INSTANCE_STARTED
	moduleUploaded    = pb.EventKind_EVENT_KIND_MODULE_UPLOADED
)

func TestWatchEventsGivesTheRecordedOnesInOrderAndFiltered(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	web := p.start("web", 1)[0]
	p.run(web, "n1")
	p.start("web-site", 1)
	p.addProvider("store", "kv")
	p.loseLeader()
	all := watch(t, p, &pb.WatchEventsRequest{}, -1)
	want := []pb.EventKind{nodeJoined, moduleUploaded, instanceRequested, instancePlaced, instanceStarted, instanceRequested, pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED}
	if !slices.Equal(kinds(all), want) {
		t.Fatalf("all events are %v, want %v", kinds(all), want)
	}
	for i, e := range all {
		if e.GetGap() || i > 0 && e.GetEvent().GetSequence() != all[i-1].GetEvent().GetSequence()+1 {
			t.Errorf("event %d has gap %v, sequence %d", i, e.GetGap(), e.GetEvent().GetSequence())
		}
	}
	for name, test := range map[string]struct {
		req  *pb.WatchEventsRequest
		want []pb.EventKind
	}{
		"of a workload":      {&pb.WatchEventsRequest{Subject: "web"}, []pb.EventKind{instanceRequested, instancePlaced, instanceStarted}},
		"of an instance":     {&pb.WatchEventsRequest{Subject: web}, []pb.EventKind{instanceRequested, instancePlaced, instanceStarted}},
		"of a node":          {&pb.WatchEventsRequest{Subject: "n1"}, []pb.EventKind{nodeJoined, instancePlaced, instanceStarted}},
		"of a provider":      {&pb.WatchEventsRequest{Subject: "store"}, []pb.EventKind{pb.EventKind_EVENT_KIND_PROVIDER_REGISTERED}},
		"of nothing":         {&pb.WatchEventsRequest{Subject: "we"}, nil},
		"of a kind":          {&pb.WatchEventsRequest{Kinds: []pb.EventKind{instanceRequested, nodeJoined}}, []pb.EventKind{nodeJoined, instanceRequested, instanceRequested}},
		"of kind and name":   {&pb.WatchEventsRequest{Kinds: []pb.EventKind{instanceRequested}, Subject: "web"}, []pb.EventKind{instanceRequested}},
		"after a sequence":   {&pb.WatchEventsRequest{AfterSequence: all[4].GetEvent().GetSequence()}, want[5:]},
		"after the last one": {&pb.WatchEventsRequest{AfterSequence: all[6].GetEvent().GetSequence()}, nil},
	} {
		if got := kinds(watch(t, p, test.req, -1)); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

func TestWatchEventsFollows(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	ctx, cancel := context.WithCancel(asAlice(t.Context()))
	defer cancel()
	stream, err := p.client.WatchEvents(ctx, &pb.WatchEventsRequest{Follow: true, Subject: "web"})
	if err != nil {
		t.Fatal(err)
	}
	id := p.start("web", 1)[0]
	p.start("other", 1)
	p.run(id, "n1")
	for _, want := range []pb.EventKind{instanceRequested, instancePlaced, instanceStarted} {
		resp, err := stream.Recv()
		if err != nil || resp.GetEvent().GetKind() != want || resp.GetGap() {
			t.Fatalf("event is %v, %v; want %v", resp, err, want)
		}
	}
	p.service.Close()
	p.service.Close()
	_, err = stream.Recv()
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE)
}

// flood records more events than are kept.
func flood(p *testPeer) {
	many := p.start("flood", 1000)
	for range fsm.EventsKept/len(many) + 1 {
		p.apply(&pb.Command{Payload: &pb.Command_RestartInstances{RestartInstances: &pb.RestartInstancesCommand{InstanceIds: many}}})
	}
}

func TestWatchEventsMarksAGap(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	p.start("web", 1)
	flood(p)
	oldest, _ := p.state.View().EventBounds()

	got := watch(t, p, &pb.WatchEventsRequest{}, 2)
	if got[0].GetGap() || got[0].GetEvent().GetSequence() != oldest {
		t.Errorf("from the oldest kept: %v, want %d without a gap", got[0], oldest)
	}
	got = watch(t, p, &pb.WatchEventsRequest{AfterSequence: oldest - 1}, 2)
	if got[0].GetGap() {
		t.Errorf("nothing was missed, and the first event is %v", got[0])
	}
	got = watch(t, p, &pb.WatchEventsRequest{AfterSequence: oldest - 2}, 2)
	if !got[0].GetGap() || got[1].GetGap() {
		t.Errorf("one event was missed, and the first two are %v", got)
	}
	// The mark waits for the first event that the client gets.
	got = watch(t, p, &pb.WatchEventsRequest{AfterSequence: 1, Kinds: []pb.EventKind{instanceRequested}}, 2)
	if !got[0].GetGap() || got[1].GetGap() {
		t.Errorf("events were missed, and the first two of a kind are %v", got)
	}
}

func TestEventCursorNoticesWhatItMissedWhileItWaited(t *testing.T) {
	p := newPeer(t)
	var cursor eventCursor
	if events := cursor.next(p.state.View()); len(events) > 0 || cursor.takeGap() {
		t.Fatalf("an empty history gives %v", events)
	}
	p.register("n1")
	flood(p)
	events := cursor.next(p.state.View())
	if len(events) != eventBatch || !cursor.takeGap() || cursor.takeGap() {
		t.Errorf("%d events and no gap, want %d and one gap", len(events), eventBatch)
	}
	// An older snapshot was restored: the history begins anew.
	other := newPeer(t)
	other.register("n1")
	events = cursor.next(other.state.View())
	if len(events) != 1 || events[0].GetKind() != nodeJoined || !cursor.takeGap() {
		t.Errorf("after a restore: %v", events)
	}
}
