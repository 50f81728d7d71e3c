package messaging

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// modes runs a test in plain and in durable mode.
func modes(t *testing.T, test func(t *testing.T, durable bool, settings ...string)) {
	t.Run("plain", func(t *testing.T) { test(t, false) })
	t.Run("durable", func(t *testing.T) { test(t, true, "durable", "true", "fsync", "false", "ack_wait", "2s") })
}

func TestAMessageArrivesAsItWasSent(t *testing.T) {
	modes(t, func(t *testing.T, durable bool, settings ...string) {
		w := open(t, settings...)
		box := newInbox()
		w.subscribe("orders-1", "shop.*.new", box.take)
		sequence := w.publish("shop.eu.new", "a book", "Kind", "paper", "Trace", "t1", "Kind", "used")
		if (sequence != 0) != durable {
			t.Errorf("published with sequence %d", sequence)
		}
		m := box.wait(t, 1)[0]
		if m.GetSubject() != "shop.eu.new" || string(m.GetPayload()) != "a book" || m.GetSubscription() != "shop.*.new" ||
			m.GetProvider() != testProvider || m.GetDelivery() != 1 || m.GetWantsReply() || m.GetSequence() != sequence {
			t.Errorf("got %v", m)
		}
		var headers []string
		for _, h := range m.GetHeaders() {
			headers = append(headers, h.GetName()+"="+h.GetValue())
		}
		if got := strings.Join(headers, " "); got != "Kind=paper Kind=used Trace=t1" {
			t.Errorf("headers: %s", got)
		}
	})
}

func TestOneReplicaOfEachWorkloadGetsAMessage(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		a1, a2, b := newInbox(), newInbox(), newInbox()
		w.subscribe("a-1", "news.>", a1.take)
		w.subscribe("a-2", "news.>", a2.take)
		w.subscribe("b-1", "news.>", b.take)
		var want []string
		for i := range 200 {
			w.publish("news.today", fmt.Sprintf("%03d", i))
			want = append(want, fmt.Sprintf("%03d", i))
		}
		b.wait(t, 200)
		eventually(t, "workload a has all", func() bool { return len(a1.messages())+len(a2.messages()) >= 200 })
		got := append(a1.payloads(), a2.payloads()...)
		slices.Sort(got)
		if !slices.Equal(got, want) || !slices.Equal(b.payloads(), want) {
			t.Errorf("a got %d, b got %d messages", len(got), len(b.messages()))
		}
		if len(a1.messages()) == 0 || len(a2.messages()) == 0 {
			t.Errorf("the replicas got %d and %d", len(a1.messages()), len(a2.messages()))
		}
	})
}

func TestAReplicaOnTheSameNodeIsPreferredUnlessBusy(t *testing.T) {
	w := open(t)
	near, far := newInbox(), newInbox()
	hold, held := make(chan struct{}), make(chan struct{})
	w.handle("a-2", far.take)
	w.subscribe("a-1", "x", func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error) {
		if string(m.GetPayload()) == "slow" {
			close(held)
			<-hold
		}
		return near.take(ctx, m)
	})
	w.change(func() {
		w.subs = append(w.subs, provider.Subscription{Instance: "a-2", Name: "a", Node: "n2", Generation: 1, Provider: testProvider, Subject: "x"})
	})
	eventually(t, "both are members", func() bool {
		s := serviceOf(w).hub.subs[key{"a", "x"}]
		has, _ := s.serves("a-2")
		return has
	})
	for i := range 5 {
		w.publish("x", "quick")
		near.wait(t, i+1)
	}
	if n := len(far.messages()); n != 0 {
		t.Fatalf("the far replica got %d messages while the near one was idle", n)
	}
	w.publish("x", "slow")
	<-held
	w.publish("x", "other")
	far.wait(t, 1)
	close(hold)
	near.wait(t, 6)
}

func TestTheNextReplicaTakesWhatOneDoesNot(t *testing.T) {
	for name, refusal := range map[string]error{
		"not running": provider.ErrConflict, "gone": provider.ErrInstanceNotFound, "busy": provider.ErrExhausted,
		"not allowed": provider.ErrDenied, "no handler": provider.ErrInvalid, "unreachable by now": provider.ErrUnavailable,
	} {
		t.Run(name, func(t *testing.T) {
			w := open(t, "max_deliver", "1")
			var refused atomic.Int32
			w.subscribe("a-1", "x", func(context.Context, *pb.Message) (*pb.MessageResult, error) {
				refused.Add(1)
				return nil, provider.Errorf(refusal, "not now")
			})
			w.publish("x", "m")
			eventually(t, "it was tried again", func() bool { return refused.Load() > 1 })
			box := newInbox()
			w.subscribe("a-2", "x", box.take)
			if m := box.wait(t, 1)[0]; m.GetDelivery() != 1 {
				t.Errorf("what no replica took counts as delivery: %d", m.GetDelivery())
			}
		})
	}
}

func TestRetry(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, append(settings, "backoff", "5ms", "max_deliver", "4")...)
		var mu sync.Mutex
		deliveries := map[string][]uint32{}
		w.subscribe("a-1", "x", func(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
			mu.Lock()
			defer mu.Unlock()
			p := string(m.GetPayload())
			deliveries[p] = append(deliveries[p], m.GetDelivery())
			switch {
			case p == "reject":
				return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_REJECT, Reason: "never"}, nil
			case p == "poison", p == "thrice" && m.GetDelivery() < 3:
				return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, RetryAfterMs: 3}, nil
			case p == "crash" && m.GetDelivery() < 2:
				return nil, provider.Errorf(provider.ErrInternal, "guest crashed")
			case p == "late" && m.GetDelivery() < 2:
				return nil, provider.Errorf(provider.ErrTimeout, "time limit")
			case p == "cut" && m.GetDelivery() < 8:
				return nil, provider.Errorf(provider.ErrCommunication, "the node is gone")
			}
			return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_ACKNOWLEDGE}, nil
		})
		want := map[string]int{"ok": 1, "reject": 1, "poison": 4, "thrice": 3, "crash": 2, "late": 2, "cut": 8}
		total := 0
		for p, n := range want {
			w.publish("x", p)
			total += n
		}
		eventually(t, "all was delivered as often as it should", func() bool {
			mu.Lock()
			defer mu.Unlock()
			sum := 0
			for _, d := range deliveries {
				sum += len(d)
			}
			return sum >= total
		})
		eventually(t, "nothing is in flight", func() bool { return w.metric("wasmatrix_messaging_in_flight") == 0 })
		mu.Lock()
		defer mu.Unlock()
		for p, n := range want {
			var counts []uint32
			for i := range n {
				counts = append(counts, uint32(i+1))
			}
			if !slices.Equal(deliveries[p], counts) {
				t.Errorf("%s: deliveries %v, want %v", p, deliveries[p], counts)
			}
		}
		for outcome, n := range map[string]float64{"acknowledged": 5, "rejected": 1, "given_up": 1, "retried": 3 + 2 + 1 + 1 + 7} {
			if got := w.metric("wasmatrix_messaging_deliveries_total", outcome); got != n {
				t.Errorf("%s: %v, want %v", outcome, got, n)
			}
		}
	})
}

func TestAHandlerSaysWhenToRetry(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, append(settings, "backoff", "1h", "max_backoff", "1h")...)
		var times []time.Time
		var mu sync.Mutex
		w.subscribe("a-1", "x", func(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Now())
			if m.GetDelivery() == 1 {
				return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, RetryAfterMs: 100}, nil
			}
			return &pb.MessageResult{}, nil
		})
		w.publish("x", "m")
		eventually(t, "it came twice", func() bool { mu.Lock(); defer mu.Unlock(); return len(times) == 2 })
		if d := times[1].Sub(times[0]); d < 90*time.Millisecond {
			t.Errorf("it came again after %s", d)
		}
	})
}

func TestInFlightIsBounded(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, append(settings, "max_in_flight", "3")...)
		var now, most atomic.Int32
		release := make(chan struct{})
		box := newInbox()
		w.subscribe("a-1", "x", func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error) {
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			<-release
			now.Add(-1)
			return box.take(ctx, m)
		})
		for i := range 50 {
			w.publish("x", fmt.Sprint(i))
		}
		eventually(t, "three are in handlers", func() bool { return now.Load() == 3 })
		close(release)
		box.wait(t, 50)
		if most.Load() != 3 {
			t.Errorf("%d messages were in handlers at once, the bound is 3", most.Load())
		}
	})
}

func TestPlainDropsWhatDoesNotFit(t *testing.T) {
	w := open(t, "max_in_flight", "1", "max_pending", "10")
	release := make(chan struct{})
	box := newInbox()
	w.subscribe("a-1", "x", func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error) {
		<-release
		return box.take(ctx, m)
	})
	for i := range 100 {
		w.publish("x", fmt.Sprint(i))
	}
	// The one in the handler, the one that waits for its slot, and those in the buffer.
	if err := serviceOf(w).link.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	close(release)
	eventually(t, "all were delivered or dropped", func() bool {
		return float64(len(box.messages()))+w.metric("wasmatrix_messaging_dropped_total", "full") == 100
	})
	if n := len(box.messages()); n < 10 || n > 12 {
		t.Errorf("%d were delivered, expected the one in the handler, the one that waits for it and 10 in the buffer", n)
	}
}

func TestRevocationEndsDelivery(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		gone, stays := newInbox(), newInbox()
		w.subscribe("a-1", "x", gone.take)
		w.subscribe("b-1", "x", stays.take)
		w.publish("x", "one")
		gone.wait(t, 1)
		w.revoke("a-1")
		eventually(t, "the hub knows", func() bool { return !serviceOf(w).hub.has(key{"a", "x"}) })
		for i := range 20 {
			w.publish("x", fmt.Sprint(i))
		}
		stays.wait(t, 21)
		if n := len(gone.messages()); n != 1 {
			t.Errorf("after the revocation %d more came", n-1)
		}
	})
}

func TestRevocationEndsRetriesAndWaiting(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, append(settings, "backoff", "1ms", "max_deliver", "0")...)
		var n atomic.Int64
		w.subscribe("a-1", "x", func(context.Context, *pb.Message) (*pb.MessageResult, error) {
			n.Add(1)
			return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY}, nil
		})
		w.publish("x", "m")
		eventually(t, "it is retried", func() bool { return n.Load() > 3 })
		w.revoke("a-1")
		eventually(t, "nothing is in flight", func() bool { return w.metric("wasmatrix_messaging_in_flight") == 0 })
		eventually(t, "no subscription is left", func() bool { return w.metric("wasmatrix_messaging_subscriptions") == 0 })
		at := n.Load()
		box := newInbox()
		w.subscribe("b-1", "x", box.take)
		w.publish("x", "next")
		box.wait(t, 1)
		if n.Load() != at {
			t.Errorf("it was delivered %d times after the end", n.Load()-at)
		}
	})
}

func TestUnsubscribe(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		box, other := newInbox(), newInbox()
		w.subscribe("a-1", "x", box.take)
		w.subscribe("b-1", "x", other.take)
		w.publish("x", "one")
		box.wait(t, 1)
		if !w.unsubscribe("a-1", "x") || w.unsubscribe("a-1", "x") {
			t.Error("existed is wrong")
		}
		w.publish("x", "two")
		other.wait(t, 2)
		if len(box.messages()) != 1 {
			t.Error("a message came after unsubscribe had answered")
		}
		w.subscribe("a-1", "x", box.take)
		w.publish("x", "three")
		if m := box.wait(t, 2)[1]; string(m.GetPayload()) != "three" {
			t.Errorf("a new subscription begins with %s", m.GetPayload())
		}
	})
}

func TestSubscriptionsSurviveARestartOfTheHub(t *testing.T) {
	modes(t, func(t *testing.T, durable bool, settings ...string) {
		w := open(t, settings...)
		box := newInbox()
		w.subscribe("a-1", "x", box.take)
		w.publish("x", "before")
		box.wait(t, 1)
		w.handle("a-1", nil) // not running: what comes now waits
		if durable {
			w.publish("x", "meanwhile")
		}
		w.close()
		if err := w.call("s-1", opPublish, &pb.MsgPublishRequest{Subject: "x"}, &pb.MsgPublishResponse{}); !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("a closed provider: %v", err)
		}
		w.open()
		w.handle("a-1", box.take)
		if err := serviceOf(w).hub.await(t.Context(), key{"a", "x"}, "a-1", true); err != nil {
			t.Fatal(err)
		}
		w.publish("x", "after")
		want := []string{"after", "before"}
		if durable {
			want = append(want, "meanwhile")
		}
		box.wait(t, len(want))
		if got := box.payloads(); !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func TestCloseLetsHandlersFinish(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		entered, release := make(chan struct{}), make(chan struct{})
		box := newInbox()
		w.subscribe("a-1", "x", func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error) {
			close(entered)
			<-release
			return box.take(ctx, m)
		})
		w.publish("x", "m")
		<-entered
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			w.close()
		}()
		eventually(t, "it takes no calls", func() bool {
			err := w.call("s-1", opPublish, &pb.MsgPublishRequest{Subject: "y"}, &pb.MsgPublishResponse{})
			return errors.Is(err, provider.ErrUnavailable)
		})
		select {
		case <-closed:
			t.Fatal("Close did not wait for the handler")
		default:
		}
		close(release)
		<-closed
		if len(box.messages()) != 1 || w.metric("wasmatrix_messaging_deliveries_total", "acknowledged") != 1 {
			t.Error("the handler's answer was not taken")
		}
		if w.metric("wasmatrix_messaging_in_flight") != 0 || w.metric("wasmatrix_messaging_subscriptions") != 0 {
			t.Error("the gauges do not say that all has ended")
		}
	})
}

func TestCloseDoesNotWaitForEver(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		w.close()
		w.cfg.StopGrace = 50 * time.Millisecond
		w.open()
		entered := make(chan struct{})
		w.subscribe("a-1", "x", func(ctx context.Context, _ *pb.Message) (*pb.MessageResult, error) {
			close(entered)
			<-ctx.Done()
			return nil, provider.FromContext(ctx)
		})
		w.publish("x", "m")
		<-entered
		w.close()
	})
}

func TestASupersededGenerationPublishesNothing(t *testing.T) {
	w := open(t)
	box := newInbox()
	w.subscribe("a-1", "x", box.take)
	publish := func(generation uint64, payload string) error {
		call := callOf("s-1", opPublish, &pb.MsgPublishRequest{Subject: "x", Payload: []byte(payload)})
		call.Generation = generation
		_, err := w.provider.Invoke(t.Context(), call)
		return err
	}
	for generation := range uint64(3) {
		if err := publish(generation+1, "new"); err != nil {
			t.Fatal(err)
		}
	}
	if err := publish(2, "old"); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("an older generation: %v", err)
	}
	call := callOf("s-1", opSubscribe, &pb.MsgSubscribeRequest{Subject: "y"})
	call.Generation = 2
	if _, err := w.provider.Invoke(t.Context(), call); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("an older generation subscribes: %v", err)
	}
	box.wait(t, 3)
	if got := box.payloads(); slices.Contains(got, "old") {
		t.Errorf("got %v", got)
	}
}

// serviceOf returns what a world's provider is made of.
func serviceOf(w *world) *service {
	s, ok := w.provider.(*service)
	if !ok {
		panic("the provider is none of this package")
	}
	return s
}
