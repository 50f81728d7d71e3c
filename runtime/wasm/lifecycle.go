package wasm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// Wait implements runtime.Instance.
func (i *instance) Wait(ctx context.Context) (runtime.Exit, error) {
	if err := runtime.Await(ctx, i.done, i.spec.InstanceID); err != nil {
		return runtime.Exit{}, err
	}
	i.state.mu.Lock()
	defer i.state.mu.Unlock()
	return i.state.exit, nil
}

// end ends the instance unless it has ended: no call begins any more, those under
// way are cut off, and when the last of them is out Wait has its answer.
func (i *instance) end(exit runtime.Exit) {
	st := &i.state
	st.mu.Lock()
	if st.phase == ended {
		st.mu.Unlock()
		return
	}
	i.closeLocked()
	st.phase, st.exit = ended, exit
	close(i.dying)
	idle := st.idle
	st.idle = nil
	st.out += len(idle)
	for _, cut := range st.calls {
		cut(errEnded)
	}
	st.mu.Unlock()
	for _, s := range idle {
		s.close()
	}
	st.mu.Lock()
	st.out -= len(idle)
	last := st.out == 0
	st.mu.Unlock()
	i.runtime.metrics.exits.WithLabelValues(exit.Reason.String()).Inc()
	i.logger().Debug("guest ended", "reason", exit.Reason.String(), "message", exit.Message)
	if last {
		i.finish()
		return
	}
	st.mu.Lock()
	if !st.finished {
		st.abandoning = time.AfterFunc(patience, i.abandon)
	}
	st.mu.Unlock()
}

// closeLocked lets no new call begin.
func (i *instance) closeLocked() {
	if i.state.phase < stopping {
		close(i.closing)
	}
}

// finish gives Wait its answer.
func (i *instance) finish() {
	st := &i.state
	st.mu.Lock()
	if !st.finished {
		st.finished = true
		if st.abandoning != nil {
			st.abandoning.Stop()
		}
		close(i.done)
	}
	free := st.closed && st.out == 0 && !st.unitFreed
	st.unitFreed = st.unitFreed || free
	st.mu.Unlock()
	if free {
		i.runtime.loader.release(i.entry)
	}
}

// abandon gives Wait its answer while a call of the host has not returned.
func (i *instance) abandon() {
	select {
	case <-i.done:
	default:
		i.logger().Warn("instance has ended but a capability call of it did not return", "waited", patience)
		i.finish()
	}
}

// Stop implements runtime.Instance. A command has no calls to drain: the grace is
// for its run to come to an end.
func (i *instance) Stop(ctx context.Context, grace time.Duration) error {
	st := &i.state
	st.mu.Lock()
	before := st.phase
	if before < stopping {
		i.closeLocked()
		st.phase = stopping
	}
	st.mu.Unlock()
	exit := runtime.Exit{Reason: runtime.Stopped, Message: "stopped"}
	if before == running || before == stopping {
		bounded, cancel := context.WithTimeout(ctx, grace)
		exit.Message = i.drain(bounded, before == running, grace)
		cancel()
	}
	i.end(exit)
	<-i.done
	return nil
}

// drain waits until the calls under way are over and runs the drain handlers; it
// returns what to say about it. A second Stop only waits.
func (i *instance) drain(ctx context.Context, first bool, grace time.Duration) string {
	forced := fmt.Sprintf("stopped by force after %s", grace)
	if !first || i.unit.shape.command {
		select {
		case <-i.done:
			return "stopped"
		case <-ctx.Done():
			return forced
		}
	}
	for range cap(i.tokens) {
		select {
		case i.tokens <- struct{}{}:
			defer func() { <-i.tokens }()
		case <-i.dying:
			return "stopped"
		case <-ctx.Done():
			return forced
		}
	}
	if !i.unit.shape.drain {
		return "stopped"
	}
	for {
		s := i.takeIdle()
		if s == nil {
			return "stopped"
		}
		message := i.drainSlot(ctx, s)
		i.untakeIdle(s)
		if message != "" {
			return message
		}
	}
}

// takeIdle takes a slot that has not been drained.
func (i *instance) takeIdle() *slot {
	st := &i.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase == ended || len(st.idle) == 0 {
		return nil
	}
	s := st.idle[0]
	st.idle = st.idle[1:]
	st.out++
	return s
}

// untakeIdle frees a drained slot: it takes no calls any more.
func (i *instance) untakeIdle(s *slot) {
	s.close()
	st := &i.state
	st.mu.Lock()
	st.out--
	last := st.phase == ended && st.out == 0
	st.mu.Unlock()
	if last {
		i.finish()
	}
}

// drainSlot runs the drain handler in a slot and returns how it failed, if it did.
// The instance is stopped, whatever the handler does.
func (i *instance) drainSlot(ctx context.Context, s *slot) string {
	if !s.ready {
		return ""
	}
	deadline, _ := ctx.Deadline()
	c := call{caller: ctx, done: ctx.Done(), deadline: deadline}
	err := i.inGuest(s, c, func(ctx context.Context) error { return s.run(ctx, guestabi.Drain) })
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errEnded):
		return "stopped"
	case s.cause != nil:
		return "stopped by force, the drain handler did not return in time"
	default:
		return "stopped, the drain handler failed: " + s.exitOf(err).Message
	}
}

// Close implements runtime.Instance.
func (i *instance) Close(context.Context) error {
	i.end(runtime.Exit{Reason: runtime.Stopped, Message: "closed"})
	<-i.done
	i.state.mu.Lock()
	i.state.closed = true
	i.state.mu.Unlock()
	i.finish()
	return nil
}
