package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// sayEvery is how often a wait says what it waits for.
	sayEvery = 5 * time.Second
	// lookEvery is how often a wait looks without being told by an event, because
	// not every change is one.
	lookEvery = time.Second
	// lookFor bounds one look, so that a wait can say what it waits for also while
	// the control plane does not answer.
	lookFor = 4 * time.Second
	// defaultWait bounds waits unless a flag says otherwise.
	defaultWait = time.Minute
)

// steps writes what was done on one line, " ✓ stored 2 ms  ✓ hello-k3f9x n2
// running", and breaks the line when something else must be said. It is safe
// for concurrent use.
type steps struct {
	mu   sync.Mutex
	w    io.Writer
	open bool
}

// done adds a step to the line.
func (s *steps) done(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open {
		fmt.Fprint(s.w, " ")
	}
	s.open = true
	fmt.Fprint(s.w, " ✓ "+cleanLine(fmt.Sprintf(format, args...)))
}

// end ends the line, with how long all of it took unless that is 0.
func (s *steps) end(all time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.open && all > 0:
		fmt.Fprintf(s.w, "    %s\n", took(all))
	case s.open:
		fmt.Fprintln(s.w)
	}
	s.open = false
}

// say writes a line of its own.
func (s *steps) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open {
		fmt.Fprintln(s.w)
	}
	s.open = false
	fmt.Fprintln(s.w, clean(fmt.Sprintf(format, args...)))
}

func (a *app) steps() *steps { return &steps{w: a.env.Stderr} }

// wait is something that is to come true.
type wait struct {
	// what is waited for, as in "hello to be RUNNING".
	what string
	// subject is whose events may bring it about; empty means all.
	subject string
	// limit is how long to wait.
	limit time.Duration
	// look returns whether it is true, and what it found otherwise.
	look func(ctx context.Context) (done bool, found string, err error)
}

// waitFor looks at once, after each event of the subject and every second until
// look is done, and says every 5 s what it waits for. Passing failures of look
// are ridden through; running out of time is a TIMEOUT that tells what was found.
func (a *app) waitFor(ctx context.Context, c *client.Client, s *steps, w wait) error {
	began := a.env.Now()
	ctx, cancel := context.WithTimeout(ctx, w.limit)
	defer cancel()
	var events sync.WaitGroup
	defer events.Wait()
	defer cancel()
	wake := make(chan struct{}, 1)
	events.Go(func() { wakeOnEvents(ctx, c, w.subject, wake) })

	look, say := time.NewTicker(lookEvery), time.NewTicker(sayEvery)
	defer look.Stop()
	defer say.Stop()
	found := "nothing yet"
	for fresh := true; ; {
		if fresh {
			lookCtx, cancel := context.WithTimeout(ctx, lookFor)
			done, now, err := w.look(lookCtx)
			cancel()
			switch {
			case err == nil && done:
				return nil
			case err == nil:
				found = now
			case ctx.Err() != nil:
			case !passes(err):
				return err
			default:
				found = err.Error()
			}
		}
		fresh = true
		select {
		case <-wake:
		case <-look.C:
		case <-say.C:
			fresh = false
			s.say("waiting for %s: %s (%s)", w.what, found, humanDuration(a.env.Now().Sub(began)))
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			return apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "gave up waiting for %s after %s", w.what, limitText(w.limit)).
				With("found", found)
		}
	}
}

// limitText tells a limit; one below a second is no 0s.
func limitText(d time.Duration) string {
	if d < time.Second {
		return d.String()
	}
	return humanDuration(d)
}

func wakeOnEvents(ctx context.Context, c *client.Client, subject string, wake chan<- struct{}) {
	for _, err := range c.WatchEvents(ctx, &pb.WatchEventsRequest{Follow: true, Subject: subject}) {
		if err != nil {
			return // looking every second goes on
		}
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

// passes reports whether a failure may be over at the next look.
func passes(err error) bool {
	switch apierror.CodeOf(err) {
	case pb.ErrorCode_ERROR_CODE_NO_LEADER, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, pb.ErrorCode_ERROR_CODE_TIMEOUT:
		return true
	default:
		return false
	}
}
