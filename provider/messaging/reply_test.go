package messaging

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func echo(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
	if !m.GetWantsReply() {
		return nil, errors.New("nobody waits for a reply")
	}
	return &pb.MessageResult{Reply: append([]byte("re: "), m.GetPayload()...)}, nil
}

func TestRequest(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, append(settings, "backoff", "5ms", "max_deliver", "3")...)
		w.subscribe("a-1", "echo.*", echo)
		if got, err := w.request("echo.x", "hello", 0); err != nil || got != "re: hello" {
			t.Errorf("got %q, %v", got, err)
		}
		if _, err := w.request("nobody", "hello", 0); !errors.Is(err, provider.ErrUnavailable) || !strings.Contains(err.Error(), "nobody listens on nobody") {
			t.Errorf("without a listener: %v", err)
		}
		w.subscribe("b-1", "empty", func(context.Context, *pb.Message) (*pb.MessageResult, error) { return &pb.MessageResult{}, nil })
		if got, err := w.request("empty", "hello", 0); err != nil || got != "" {
			t.Errorf("an empty reply: %q, %v", got, err)
		}
		w.subscribe("c-1", "no", func(context.Context, *pb.Message) (*pb.MessageResult, error) {
			return &pb.MessageResult{Verdict: pb.MessageVerdict_MESSAGE_VERDICT_REJECT, Reason: "too late\ntoday"}, nil
		})
		if _, err := w.request("no", "hello", 0); !errors.Is(err, provider.ErrConflict) || !strings.Contains(err.Error(), "too late today") {
			t.Errorf("a rejected request: %v", err)
		}
		var tries atomic.Int32
		w.subscribe("d-1", "flaky", func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error) {
			if tries.Add(1) < 3 {
				return nil, provider.Errorf(provider.ErrInternal, "crashed")
			}
			return echo(ctx, m)
		})
		if got, err := w.request("flaky", "hello", 0); err != nil || got != "re: hello" {
			t.Errorf("a request that is retried: %q, %v", got, err)
		}
		w.subscribe("e-1", "poison", func(context.Context, *pb.Message) (*pb.MessageResult, error) {
			return nil, provider.Errorf(provider.ErrInternal, "crashed again")
		})
		if _, err := w.request("poison", "hello", 0); !errors.Is(err, provider.ErrConflict) || !strings.Contains(err.Error(), "crashed again") {
			t.Errorf("a request that is given up: %v", err)
		}
	})
}

func TestARequestTimesOut(t *testing.T) {
	w := open(t)
	w.subscribe("a-1", "slow", nil) // subscribed, and not running
	began := time.Now()
	_, err := w.request("slow", "hello", 80*time.Millisecond)
	var own *provider.Error
	if !errors.Is(err, provider.ErrTimeout) || !errors.As(err, &own) || own.Details[provider.DetailOutcome] != provider.OutcomeUnknown {
		t.Errorf("got %v", err)
	}
	if d := time.Since(began); d < 70*time.Millisecond {
		t.Errorf("it waited for %s", d)
	}
	eventually(t, "the request is not kept for later", func() bool {
		return w.metric("wasmatrix_messaging_dropped_total", "expired") == 1 && w.metric("wasmatrix_messaging_in_flight") == 0
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.provider.Invoke(ctx, callOf("s-1", opRequest, &pb.MsgRequestRequest{Subject: "slow"})); !errors.Is(err, provider.ErrTimeout) {
		t.Errorf("the caller's deadline comes first: %v", err)
	}
}

func TestOnlyTheFirstReplyCounts(t *testing.T) {
	w := open(t)
	w.subscribe("a-1", "q", echo)
	w.subscribe("b-1", "q", echo)
	for range 50 {
		if got, err := w.request("q", "x", 0); err != nil || got != "re: x" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	r := serviceOf(w).replies
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.waiting); n != 0 {
		t.Errorf("%d requests are still waited for", n)
	}
}

func TestClosingEndsRequests(t *testing.T) {
	w := open(t)
	entered := make(chan struct{})
	w.subscribe("a-1", "slow", func(ctx context.Context, _ *pb.Message) (*pb.MessageResult, error) {
		close(entered)
		<-ctx.Done()
		return nil, provider.FromContext(ctx)
	})
	w.kind.grace = time.Millisecond
	serviceOf(w).grace = time.Millisecond
	failed := make(chan error, 1)
	go func() {
		_, err := w.request("slow", "x", time.Minute)
		failed <- err
	}()
	<-entered
	w.close()
	if err := <-failed; !errors.Is(err, provider.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

// listen follows a subject until stop is called, which returns how it ended.
func (w *world) listen(subject string, sink func(*pb.Message, uint64) error) (stop func() error) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stands, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- serviceOf(w).Follow(ctx, subject, func(message []byte, dropped uint64) error {
			if message == nil {
				close(stands)
				return nil
			}
			m := &pb.Message{}
			if err := proto.Unmarshal(message, m); err != nil {
				return err
			}
			return sink(m, dropped)
		})
	}()
	select {
	case <-stands:
	case err := <-ended:
		w.t.Fatalf("Follow: %v", err)
	}
	return func() error {
		cancel()
		return <-ended
	}
}

func TestFollow(t *testing.T) {
	modes(t, func(t *testing.T, _ bool, settings ...string) {
		w := open(t, settings...)
		w.subscribe("a-1", "q", echo)
		box := newInbox()
		stop := w.listen(">", func(m *pb.Message, _ uint64) error {
			_, err := box.take(t.Context(), m)
			return err
		})
		w.publish("x.y", "one", "A", "b")
		box.wait(t, 1)
		if _, err := w.request("q", "two", 0); err != nil {
			t.Fatal(err)
		}
		got := box.wait(t, 2)
		if got[0].GetSubject() != "x.y" || got[0].GetSubscription() != ">" || len(got[0].GetHeaders()) != 1 ||
			got[1].GetSubject() != "q" || !got[1].GetWantsReply() || len(got[1].GetHeaders()) != 0 {
			t.Errorf("got %v", got)
		}
		if err := stop(); err != nil {
			t.Errorf("a listener that goes away: %v", err)
		}
		if err := serviceOf(w).Follow(t.Context(), "$SYS.>", nil); !errors.Is(err, provider.ErrInvalid) {
			t.Errorf("reserved: %v", err)
		}
	})
}

func TestASlowListenerLosesAndIsTold(t *testing.T) {
	w := open(t)
	hold, entered := make(chan struct{}), make(chan struct{}, 1)
	var got, lost atomic.Uint64
	stop := w.listen("x", func(_ *pb.Message, dropped uint64) error {
		select {
		case entered <- struct{}{}:
		default:
		}
		<-hold
		got.Add(1)
		lost.Add(dropped)
		return nil
	})
	w.publish("x", "first")
	<-entered
	for range 3000 {
		w.publish("x", "m")
	}
	_ = serviceOf(w).link.nc.Flush()
	close(hold)
	eventually(t, "all came or are counted", func() bool {
		w.publish("x", "again")
		return lost.Load() > 1000 && got.Load() > followMessages
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestClosingEndsListeners(t *testing.T) {
	w := open(t)
	stop := w.listen("x", func(*pb.Message, uint64) error { return nil })
	w.close()
	if err := stop(); !errors.Is(err, provider.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
