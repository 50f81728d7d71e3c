package messaging

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// 20,000 messages, and the delivering side dies in the middle without a word:
// every acknowledged one is handled in the end.
func TestNoAcknowledgedMessageIsLost(t *testing.T) {
	const total = 20000
	w := open(t, "durable", "true", "fsync", "false", "ack_wait", "500ms")
	var mu sync.Mutex
	seen := make(map[string]int, total)
	half := make(chan struct{})
	once := sync.OnceFunc(func() { close(half) })
	w.subscribe("a-1", "jobs", func(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
		mu.Lock()
		defer mu.Unlock()
		seen[string(m.GetPayload())]++
		if len(seen) >= total/2 {
			once()
		}
		return &pb.MessageResult{}, nil
	})
	var writers sync.WaitGroup
	var failed atomic.Int32
	for n := range 8 {
		writers.Go(func() {
			for i := n; i < total; i += 8 {
				call := callOf("s-1", opPublish, &pb.MsgPublishRequest{Subject: "jobs", Payload: fmt.Appendf(nil, "%05d", i)})
				if _, err := w.provider.Invoke(context.Background(), call); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	writers.Wait()
	if failed.Load() > 0 {
		t.Fatalf("%d messages were refused", failed.Load())
	}
	<-half
	dead := serviceOf(w)
	dead.link.close() // the connection and the server, with messages in handlers
	w.open()
	_ = dead.Close()
	eventually(t, "all were handled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen) == total
	})
}

func TestAFullStreamRefuses(t *testing.T) {
	w := open(t, "durable", "true", "fsync", "false", "max_bytes", "1MiB")
	w.subscribe("a-1", "x", nil) // subscribed and not running: everything is kept
	payload := string(make([]byte, 100<<10))
	var err error
	for range 20 {
		if err = w.call("s-1", opPublish, &pb.MsgPublishRequest{Subject: "x", Payload: []byte(payload)}, &pb.MsgPublishResponse{}); err != nil {
			break
		}
	}
	if !errors.Is(err, provider.ErrExhausted) {
		t.Fatalf("got %v", err)
	}
	box := newInbox()
	w.handle("a-1", box.take)
	box.wait(t, 5)
	eventually(t, "there is room again", func() bool {
		return w.call("s-1", opPublish, &pb.MsgPublishRequest{Subject: "x"}, &pb.MsgPublishResponse{}) == nil
	})
}

func TestAMessageIdIsStoredOnce(t *testing.T) {
	w := open(t, "durable", "true", "fsync", "false")
	box := newInbox()
	w.subscribe("a-1", "x", box.take)
	first := w.publish("x", "m", "Message-Id", "7")
	if again := w.publish("x", "m", "Message-Id", "7"); again != first {
		t.Errorf("stored as %d and %d", first, again)
	}
	// Another workload's ids are its own.
	req := &pb.MsgPublishRequest{Subject: "x", Payload: []byte("n"), Headers: []*pb.MessageHeader{{Name: "Message-Id", Value: "7"}}}
	if err := w.call("other-1", opPublish, req, &pb.MsgPublishResponse{}); err != nil {
		t.Fatal(err)
	}
	box.wait(t, 2)
	w.publish("x", "last")
	box.wait(t, 3)
	if got := box.payloads(); fmt.Sprint(got) != "[last m n]" {
		t.Errorf("got %v", got)
	}
}

func TestAPartOfASubscriptionCannotBeKept(t *testing.T) {
	server := startNATS(t)
	w := server.open("durable", "true", "subjects", "jobs.>")
	err := w.call("a-1", opSubscribe, &pb.MsgSubscribeRequest{Subject: "*.new"}, &pb.MsgSubscribeResponse{})
	if !errors.Is(err, provider.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	box := newInbox()
	w.subscribe("a-1", "news.*", box.take)
	if sequence := w.publish("news.today", "m"); sequence != 0 {
		t.Errorf("a subject that is not kept: sequence %d", sequence)
	}
	box.wait(t, 1)
}

func (w *world) consumers() int {
	w.t.Helper()
	l := serviceOf(w).link
	stream, err := l.js.Stream(context.Background(), l.stream.name)
	if err != nil {
		w.t.Fatal(err)
	}
	return stream.CachedInfo().State.Consumers
}

// The position of a subscription is kept for a while once the records do not name
// it any more, for they may be incomplete, and is deleted then. What a guest ends
// is ended at once.
func TestPositionsOfEndedSubscriptions(t *testing.T) {
	w := open(t, "durable", "true", "fsync", "false")
	w.subscribe("a-1", "x", nil)
	w.subscribe("b-1", "x", nil)
	w.unsubscribe("b-1", "x")
	if n := w.consumers(); n != 1 {
		t.Errorf("after unsubscribe there are %d positions", n)
	}
	w.publish("x", "kept")
	subs := w.Subscriptions(testProvider)
	w.revoke("a-1")
	box := newInbox()
	w.handle("a-1", box.take)
	w.change(func() { w.subs = subs })
	box.wait(t, 1)
	w.revoke("a-1")
	eventually(t, "no position is left", func() bool { return w.consumers() == 0 })
}

func TestADeletedStreamIsMadeAgain(t *testing.T) {
	w := open(t, "durable", "true", "fsync", "false")
	l := serviceOf(w).link
	if err := l.js.DeleteStream(t.Context(), l.stream.name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Fatal(err)
	}
	eventually(t, "messages are stored again", func() bool {
		return w.call("s-1", opPublish, &pb.MsgPublishRequest{Subject: "x"}, &pb.MsgPublishResponse{}) == nil
	})
}
