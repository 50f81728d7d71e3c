package provider_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// meeting is a provider that stops each call right before its effect, as a slow
// disk or a process that is not scheduled does.
type meeting struct {
	arrived chan provider.Call
	proceed chan struct{}
	effects atomic.Int64
}

func newMeeting() *meeting {
	return &meeting{arrived: make(chan provider.Call), proceed: make(chan struct{})}
}

func (m *meeting) Invoke(_ context.Context, call provider.Call) ([]byte, error) {
	m.arrived <- call
	<-m.proceed
	if err := call.Admit(); err != nil {
		return nil, err
	}
	m.effects.Add(1)
	return nil, nil
}

func (m *meeting) Close() error { return nil }

// meet is node n1 with m as its provider kv, and a clock that the test moves.
func meet(t *testing.T, m *meeting) (*node, *atomic.Int64) {
	t.Helper()
	var now atomic.Int64
	now.Store(int64(time.Hour))
	n := newNode(t, func(c *provider.RouterConfig) {
		c.Clock = func() time.Duration { return time.Duration(now.Load()) }
		c.SettleWithin = -1
	})
	n.kind.open = func(provider.Config) (provider.Provider, error) { return m, nil }
	if err := n.host.Start(t.Context(), "kv", provider.Config{ID: "kv"}); err != nil {
		t.Fatal(err)
	}
	return n, &now
}

// lease is a tenure that a test ends.
type lease struct {
	at   time.Duration
	held bool
}

func (l *lease) Ends() (time.Duration, bool) { return l.at, l.held }

// What happens between the decision and the effect decides about the effect.
func TestACallIsRefusedWhenWhatAllowedItIsGoneBeforeItsEffect(t *testing.T) {
	here := provider.InstanceRecord{ID: "i", Name: "hello", Node: "n1", NodeEpoch: 5, Generation: 3}
	for name, c := range map[string]struct {
		meanwhile func(n *node, port *provider.Port, l *lease, now *atomic.Int64)
		want      error
		mentions  string
	}{
		"nothing": {func(*node, *provider.Port, *lease, *atomic.Int64) {}, nil, ""},
		"another instance has moved": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) {
			n.dir.PutInstance(provider.InstanceRecord{ID: "far", Name: "far", Node: "n3", NodeEpoch: 1, Generation: 8})
		}, nil, ""},
		"the same record again": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) { n.dir.PutInstance(here) }, nil, ""},
		"the whole set again":   {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) { n.dir.Replace(records(t)) }, nil, ""},
		"a newer generation elsewhere": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) {
			n.dir.PutInstance(provider.InstanceRecord{ID: "i", Name: "hello", Node: "n2", NodeEpoch: 1, Generation: 4})
		}, provider.ErrDenied, "superseded by generation 4"},
		"a newer generation here": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) {
			next := here
			next.Generation = 4
			n.dir.PutInstance(next)
		}, provider.ErrDenied, "superseded by generation 4"},
		"its end": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) { n.dir.RemoveInstance("i") }, provider.ErrDenied, "may not call any more"},
		"a set without it": {func(n *node, _ *provider.Port, _ *lease, _ *atomic.Int64) {
			r := records(t)
			r.Instances = r.Instances[1:]
			n.dir.Replace(r)
		}, provider.ErrDenied, "may not call any more"},
		"the guest has ended": {func(_ *node, port *provider.Port, _ *lease, _ *atomic.Int64) { port.End() }, provider.ErrConflict, "has ended"},
		"its tenure runs out": {func(_ *node, _ *provider.Port, l *lease, now *atomic.Int64) {
			now.Store(int64(l.at))
		}, provider.ErrConflict, "lease"},
		"its tenure is taken": {func(_ *node, _ *provider.Port, l *lease, _ *atomic.Int64) { l.held = false }, provider.ErrConflict, "lease"},
		"its tenure is renewed": {func(_ *node, _ *provider.Port, l *lease, now *atomic.Int64) {
			now.Store(int64(l.at))
			l.at += time.Minute
		}, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMeeting()
			n, now := meet(t, m)
			l := &lease{at: time.Hour + time.Second, held: true}
			port := n.router.Port("i", 3, 5).Within(l)
			done := make(chan error)
			go func() {
				_, err := port.Call(context.Background(), "kv", "get", []byte("|orders/1"))
				done <- err
			}()
			<-m.arrived
			c.meanwhile(n, port, l, now)
			close(m.proceed)
			err := <-done
			if c.want == nil && err != nil || m.effects.Load() != map[bool]int64{true: 1}[c.want == nil] {
				t.Fatalf("%d effects, %v", m.effects.Load(), err)
			}
			if c.want != nil {
				wantError(t, err, c.want, c.mentions, "")
			}
		})
	}
}

// The same for calls of another node, which are limited by this node's clock.
func TestALateCallOfAnotherNodeHasNoEffect(t *testing.T) {
	for name, c := range map[string]struct {
		notAfter  time.Duration
		meanwhile func(n *node, now *atomic.Int64)
		want      error
	}{
		"in time":  {time.Hour + time.Second, func(_ *node, now *atomic.Int64) { now.Add(int64(time.Second)) }, nil},
		"no limit": {0, func(_ *node, now *atomic.Int64) { now.Add(int64(time.Hour)) }, nil},
		"late":     {time.Hour + time.Second, func(_ *node, now *atomic.Int64) { now.Add(int64(time.Second) + 1) }, provider.ErrConflict},
		"moved on": {0, func(n *node, _ *atomic.Int64) {
			n.dir.PutInstance(provider.InstanceRecord{ID: "far", Name: "far", Node: "n3", Generation: 8})
		}, provider.ErrDenied},
		"it is off": {0, func(n *node, _ *atomic.Int64) { n.dir.RemoveRemoteInstance("far") }, provider.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMeeting()
			n, now := meet(t, m)
			done := make(chan error)
			go func() {
				_, err := n.router.Serve(context.Background(),
					provider.Caller{Instance: "far", Generation: 7, NodeEpoch: 2, Node: "n2", NotAfter: c.notAfter},
					provider.Request{Provider: "kv", Capability: "kv", Operation: "set", Payload: []byte("kv|x")})
				done <- err
			}()
			<-m.arrived
			c.meanwhile(n, now)
			close(m.proceed)
			err := <-done
			if c.want == nil && err != nil {
				t.Fatal(err)
			}
			if c.want != nil {
				wantError(t, err, c.want, "", "")
			}
		})
	}
}

// unsure is a remote whose calls get no answer.
type unsure struct{ calls []provider.RemoteCall }

func (*unsure) Probe(context.Context, string) error { return nil }

func (u *unsure) Invoke(_ context.Context, _ string, call provider.RemoteCall) ([]byte, error) {
	u.calls = append(u.calls, call)
	return nil, provider.Errorf(provider.ErrTimeout, "no answer").With(provider.DetailOutcome, provider.OutcomeUnknown)
}

// An instance has ended when none of its calls can have an effect any more.
func TestSettleWaitsForCallsWithoutAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := &unsure{}
		n := newNode(t, func(c *provider.RouterConfig) { c.Remote = remote })
		n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "there", Permissions: set(t, "kv:write"), Bucket: "b"})
		l := &lease{at: n.router.Now() + 2*time.Second, held: true}
		port := n.router.Port("i", 3, 5).Within(l)
		began := time.Now()
		if err := port.Settle(t.Context()); err != nil || time.Since(began) != 0 {
			t.Fatalf("nothing was called, and it took %s: %v", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		for _, ctx := range []context.Context{ctx, t.Context()} {
			if _, err := port.Call(ctx, "kv", "set", []byte("there|x")); err == nil {
				t.Fatal("it was answered")
			}
		}
		if a, b := remote.calls[0].NotAfter, remote.calls[1].NotAfter; a != l.at-500*time.Millisecond || b != l.at {
			t.Fatalf("limited to %s and %s, want the call's deadline and the end of the tenure, %s", a, b, l.at)
		}
		port.End()
		if _, err := port.Call(t.Context(), "kv", "set", []byte("there|x")); err == nil || len(remote.calls) != 2 {
			t.Fatal("it called after its end")
		}
		if err := port.Settle(t.Context()); err != nil || time.Since(began) != 2*time.Second {
			t.Fatalf("it settled after %s: %v", time.Since(began), err)
		}
		time.Sleep(time.Second) // virtual: what carried the calls ends
	})
}

func TestMarksOfAnInstanceThatCameLaterAreNewer(t *testing.T) {
	mark := func(created, generation uint64) provider.Mark {
		return provider.Mark{Created: created, Generation: generation}
	}
	for _, c := range []struct {
		a, b   provider.Mark
		before bool
	}{
		{mark(10, 1), mark(10, 2), true},
		{mark(10, 2), mark(10, 2), false},
		{mark(10, 3), mark(10, 2), false},
		{mark(10, 9), mark(20, 1), true},
		{mark(20, 1), mark(10, 9), false},
		{mark(0, 1), mark(10, 2), true},
		{mark(0, 2), mark(10, 1), false},
		{mark(0, 0), mark(10, 1), true},
	} {
		if got := c.a.Before(c.b); got != c.before {
			t.Errorf("%v before %v: %t", c.a, c.b, got)
		}
	}
	d := provider.NewDirectory("n1")
	d.PutInstance(provider.InstanceRecord{ID: "i", Node: "n1", Generation: 9, Created: 10})
	d.RemoveInstance("i")
	if d.PutInstance(provider.InstanceRecord{ID: "i", Node: "n1", Generation: 8, Created: 10}) {
		t.Error("an older generation was taken up")
	}
	if !d.PutInstance(provider.InstanceRecord{ID: "i", Node: "n1", Generation: 1, Created: 20}) {
		t.Error("a later instance of the same id was not taken up")
	}
}

func TestAFenceForgetsOnlyWhatHasNotCalledForLong(t *testing.T) {
	var f provider.Fence
	f.Raise("i", provider.Mark{Generation: 5})
	f.Raise("i", provider.Mark{Generation: 4})
	for n := range 100_000 {
		f.Raise(string(rune(n))+"x", provider.Mark{Generation: 1})
	}
	if got := f.Seen("i"); got.Generation != 5 {
		t.Errorf("the newest is %v", got)
	}
}

// hanging is a remote whose calls go on after their caller has gone, for a while.
type hanging struct{ until time.Time }

func (*hanging) Probe(context.Context, string) error { return nil }

func (h *hanging) Invoke(context.Context, string, provider.RemoteCall) ([]byte, error) {
	time.Sleep(time.Until(h.until))
	return nil, provider.Errorf(provider.ErrTimeout, "no answer").With(provider.DetailOutcome, provider.OutcomeUnknown)
}

func TestSettleWaitsForCallsThatAreUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, func(c *provider.RouterConfig) { c.Remote = &hanging{until: time.Now().Add(3 * time.Second)} })
		n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "there", Permissions: set(t, "kv:write"), Bucket: "b"})
		port, began := n.router.Port("i", 3, 5), time.Now()
		for range 2 {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				_, _ = port.Call(ctx, "kv", "set", []byte("there|x"))
			}()
		}
		synctest.Wait()
		port.End()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := port.Settle(short); err == nil {
			t.Fatal("it settled with calls under way")
		}
		if err := port.Settle(t.Context()); err != nil || time.Since(began) != 10*time.Second {
			t.Fatalf("it settled after %s, want the calls' deadline: %v", time.Since(began), err)
		}
	})
}

// answering is a remote that answers after a while, whether or not its caller waits.
type answering struct{ after time.Duration }

func (answering) Probe(context.Context, string) error { return nil }

func (a answering) Invoke(ctx context.Context, _ string, call provider.RemoteCall) ([]byte, error) {
	select {
	case <-time.After(a.after):
		return append([]byte("answer to "), call.Payload...), nil
	case <-ctx.Done():
		return nil, provider.Errorf(provider.ErrTimeout, "no answer").With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
}

// A guest that is ended in the middle of a call has settled once that is answered.
func TestSettleEndsWithTheAnswerOfACallWhoseCallerHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, func(c *provider.RouterConfig) { c.Remote = answering{after: 50 * time.Millisecond} })
		n.dir.PutAssignment(provider.Assignment{Instance: "i", Provider: "there", Permissions: set(t, "kv:write"), Bucket: "b"})
		port, began := n.router.Port("i", 3, 5), time.Now()
		if answer, err := port.Call(t.Context(), "kv", "set", []byte("there|x")); err != nil || string(answer) != "answer to there|x" {
			t.Fatalf("%q, %v", answer, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		stop, payload := time.AfterFunc(10*time.Millisecond, cancel), []byte("there|x")
		defer stop.Stop()
		_, err := port.Call(ctx, "kv", "set", payload)
		wantError(t, err, provider.ErrCommunication, "cancelled", "")
		clear(payload)
		port.End()
		if err := port.Settle(t.Context()); err != nil || time.Since(began) != 100*time.Millisecond {
			t.Fatalf("it settled after %s: %v", time.Since(began), err)
		}
		time.Sleep(time.Second) // virtual: what carried the calls ends
	})
}
