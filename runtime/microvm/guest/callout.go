package guest

import (
	"context"
	"errors"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

// errGone: the host has gone.
var errGone = errors.New("the host has gone")

// invocationKey finds the id of the exchange that a guest works on in its context.
type invocationKey struct{}

// host is the instance's runtime.Host: it hands every call on to the host.
type host struct{ server *server }

var _ runtime.Host = (*host)(nil)

// Call implements runtime.Host.
func (h *host) Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	id, _ := ctx.Value(invocationKey{}).(uint64)
	call := channel.CapabilityCall{Invocation: id, Capability: capability, Operation: operation}
	f, err := h.server.ask(ctx, channel.Call, call.Encode(), payload)
	if err != nil {
		return nil, err
	}
	if f.Kind == channel.Refusal {
		failure, err := channel.DecodeRefusal(f.Payload)
		if err != nil {
			return nil, err
		}
		return nil, failure
	}
	return f.Payload, nil
}

// ask opens an exchange with the host and waits for its end, or until ctx ends;
// then the host is told that nobody waits.
func (s *server) ask(ctx context.Context, kind channel.Kind, parts ...[]byte) (channel.Frame, error) {
	reply := make(chan channel.Frame, 1)
	s.mu.Lock()
	s.next++
	id := s.next
	s.replies[id] = reply
	s.mu.Unlock()
	forget := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.replies, id)
	}
	if err := s.conn.Send(kind, id, parts...); err != nil {
		forget()
		return channel.Frame{}, err
	}
	select {
	case f := <-reply:
		return f, nil
	case <-ctx.Done():
		forget()
		return channel.Frame{}, errors.Join(ctx.Err(), s.conn.Send(channel.Abandon, id))
	case <-s.over.Done():
		forget()
		return channel.Frame{}, errGone
	}
}

// output is one of the instance's output streams. A write returns when the host
// has taken it, so that a guest cannot flood the channel.
type output struct {
	server *server
	stream channel.Stream
}

// Write hands p on. It fails only when the host has gone.
func (o *output) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		piece := p[n:min(len(p), n+channel.MaxOutput)]
		if _, err := o.server.ask(o.server.over, channel.Output, []byte{byte(o.stream)}, piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return len(p), nil
}
