package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestARenewalCountsFromWhenItWasSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, changes := time.Now(), 0
		l := newLease(func() time.Duration { return time.Since(began) }, false, func() { changes++ })
		if l.alive() {
			t.Fatal("a lease lives that was never granted")
		}
		sent := l.now()
		<-time.After(2 * time.Second) // the answer takes its time
		l.renew(sent, 3*time.Second)
		if left, _ := l.remaining(); left != 700*time.Millisecond || !l.alive() || changes != 1 {
			t.Fatalf("%s are left", left)
		}
		l.renew(sent-time.Second, 3*time.Second)
		if left, _ := l.remaining(); left != 700*time.Millisecond {
			t.Fatalf("an older renewal took the deadline back to %s", left)
		}
		<-time.After(700 * time.Millisecond)
		if l.alive() || changes != 2 {
			t.Fatal("it lives past its deadline")
		}
		l.renew(l.now()-3*time.Second, 3*time.Second)
		if l.alive() || changes != 2 {
			t.Fatal("a renewal that comes too late revived it")
		}
	})
}

// TestALeaseEndsByItsClock lets the lease's clock run ahead of the timers, as
// after a suspend of the machine.
func TestALeaseEndsByItsClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, lost := time.Now(), make(chan struct{}, 2)
		var asleep atomic.Int64
		l := newLease(func() time.Duration { return time.Since(began) + time.Duration(asleep.Load()) }, false, func() { lost <- struct{}{} })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.run(ctx) }()
		l.renew(l.now(), 4*time.Second)
		<-lost // it came to life
		synctest.Wait()
		asleep.Store(int64(time.Hour))
		slept := time.Now()
		<-lost
		if took := time.Since(slept); took > time.Second {
			t.Fatalf("it was noticed %s after waking up", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestBoundContextsEndWithTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		l := newLease(func() time.Duration { return time.Since(began) }, false, func() {})
		if _, _, err := l.bind(t.Context(), 0); !errors.Is(err, errLeaseEnded) {
			t.Fatalf("bound to a lease that is not held: %v", err)
		}
		l.renew(l.now(), 3*time.Second)
		ctx, release, err := l.bind(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		_, other, err := l.bind(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		other()
		if len(l.calls) != 1 {
			t.Fatalf("%d calls are bound after one was released", len(l.calls))
		}
		l.drop()
		if !errors.Is(context.Cause(ctx), errLeaseEnded) {
			t.Fatalf("the cause is %v", context.Cause(ctx))
		}
	})
}
