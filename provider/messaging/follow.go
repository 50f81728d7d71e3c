package messaging

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go"

	"github.com/wasmatrix/wasmatrix/provider"
)

// What may wait for a slow listener.
const (
	followMessages = 1024
	followBytes    = 16 << 20
)

// Follow passes every message on subject to sink, and requests too, until ctx
// ends, sink fails or the provider closes. See provider.Follower.
func (s *service) Follow(ctx context.Context, subject string, sink func(message []byte, dropped uint64) error) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.calls.Done()
	if err := checkSubject([]byte(subject), true); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-s.ends:
			cancel(errStopped())
		case <-ctx.Done():
		}
	}()
	messages := make(chan *nats.Msg, followMessages)
	f := &follower{held: budget{count: followMessages, bytes: followBytes}, messages: messages}
	wires := []string{s.link.prefix + subject}
	if s.link.requests != s.link.prefix {
		wires = append(wires, s.link.requests+subject)
	}
	for _, wire := range wires {
		sub, err := s.link.nc.Subscribe(wire, f.take)
		if err != nil {
			return natsError(err, false)
		}
		defer func() { _ = sub.Unsubscribe() }()
	}
	bounded, done := context.WithTimeout(ctx, apiTimeout)
	err := s.link.nc.FlushWithContext(bounded)
	done()
	if err != nil {
		return followEnd(ctx, natsError(err, false))
	}
	if err := sink(nil, 0); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return followEnd(ctx, nil)
		case raw := <-messages:
			f.held.give(raw.Size())
			name, ok := s.link.guestSubject(raw.Subject)
			if !ok {
				continue
			}
			m := message{subject: name, payload: raw.Data, headers: raw.Header, wantsReply: raw.Reply != "", delivery: 1}
			if err := sink(m.encode(nil, subject, s.id), f.lost()); err != nil {
				return err
			}
		}
	}
}

// followEnd says why a listener's stream ended: nil when the listener went away.
func followEnd(ctx context.Context, err error) error {
	var own *provider.Error
	if cause := context.Cause(ctx); errors.As(cause, &own) {
		return own
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// follower holds the messages of one listener.
type follower struct {
	held     budget
	messages chan<- *nats.Msg
	dropped  uint64 // guarded by held.mu
}

// take keeps a message for the listener or drops it; it never blocks.
func (f *follower) take(m *nats.Msg) {
	if f.held.take(m.Size()) {
		f.messages <- m // as many fit as the budget allows
		return
	}
	f.held.mu.Lock()
	f.dropped++
	f.held.mu.Unlock()
}

// lost returns how many were dropped since it was asked last.
func (f *follower) lost() uint64 {
	f.held.mu.Lock()
	defer f.held.mu.Unlock()
	n := f.dropped
	f.dropped = 0
	return n
}
