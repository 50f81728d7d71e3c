package microvm

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

const (
	// patience is how long an instance that has ended waits for a call of the host
	// that ignores its context, before the instance counts as ended all the same.
	// Its machine is gone by then.
	patience = 5 * time.Second
	// stopSlack is how much longer than the grace a machine may take to tell how the
	// guest ended, before it is killed.
	stopSlack = time.Second
	// maxMessage bounds what a guest's machine says about its end, in bytes.
	maxMessage = 1 << 10
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
// way are cut off, the machine is killed. When all that is over, Wait has its
// answer. It does not wait itself.
func (i *instance) end(exit runtime.Exit) {
	s := &i.state
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase == ended {
		return
	}
	if s.phase < stopping {
		close(i.closing)
	}
	if s.run != nil {
		s.usage.GuestTime += s.run.stop()
	}
	s.phase, s.exit = ended, exit
	for _, cut := range s.calls {
		cut()
	}
	for _, v := range s.invocations {
		v.stop()
	}
	go i.finish()
}

// finish sees the machine and the calls of the host to their end.
func (i *instance) finish() {
	i.link.machine.Kill()
	over := make(chan struct{})
	go func() {
		defer close(over)
		i.work.Wait()
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-over:
	case <-timer.C:
		i.logger.Warn("instance has ended but a capability call or a write of output did not return", "waited", patience)
	}
	i.memory.Store(0)
	i.runtime.metrics.exits.WithLabelValues(i.state.exit.Reason.String()).Inc()
	i.logger.Debug("guest ended", "reason", i.state.exit.Reason.String(), "message", i.state.exit.Message)
	close(i.done)
}

// lost implements owner: the machine has ended. Where the host did not end it, it
// failed or was killed from outside.
func (i *instance) lost(ending vmm.Ending) {
	exit := runtime.Exit{Reason: runtime.Internal, Message: ending.Message}
	if ending.OutOfMemory {
		exit.Reason = runtime.MemoryLimit
	}
	i.end(exit)
}

// ended implements owner: the guest has ended in its machine.
func (i *instance) ended(payload []byte) error {
	exit, err := channel.DecodeExit(payload)
	if err != nil {
		return err
	}
	if exit.Reason < runtime.Completed || exit.Reason > runtime.InvalidGuest && exit.Reason != runtime.Internal {
		return fmt.Errorf("%w: reason %d", channel.ErrMalformed, exit.Reason)
	}
	exit.Message = oneLine(exit.Message)
	i.end(exit)
	return nil
}

// oneLine makes what a machine says fit for a line of a log.
func oneLine(text string) string {
	text = strings.ToValidUTF8(text[:min(len(text), maxMessage)], "")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}

// Stop implements runtime.Instance.
func (i *instance) Stop(ctx context.Context, grace time.Duration) error {
	s := &i.state
	s.mu.Lock()
	before := s.phase
	if before < stopping {
		close(i.closing)
		s.phase, s.until = stopping, time.Now().Add(grace)
	}
	s.mu.Unlock()
	if before == prepared {
		i.end(runtime.Exit{Reason: runtime.Stopped, Message: "stopped"})
	}
	if before == running {
		// A machine that is gone, or takes nothing more, is killed below.
		_ = i.link.conn.Send(channel.Stop, 0, channel.EncodeNumber(uint64(max(grace, 0))))
	}
	timer := time.NewTimer(grace + stopSlack)
	defer timer.Stop()
	select {
	case <-i.done:
		return nil
	case <-timer.C:
	case <-ctx.Done():
	}
	i.end(runtime.Exit{Reason: runtime.Stopped, Message: fmt.Sprintf("stopped by force after %s", grace)})
	<-i.done
	return nil
}

// Close implements runtime.Instance.
func (i *instance) Close(context.Context) error {
	i.end(runtime.Exit{Reason: runtime.Stopped, Message: "closed"})
	<-i.done
	return nil
}
