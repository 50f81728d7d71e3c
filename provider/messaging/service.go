package messaging

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wasmatrix/wasmatrix/provider"
)

// closeGrace is how long handlers may go on when the provider closes.
const closeGrace = 8 * time.Second

// service is a messaging provider.
type service struct {
	id      string
	link    *link
	replies *replies
	hub     *hub // nil where the node gives no Messages
	meter   *meter
	gate    gate
	grace   time.Duration

	mu     sync.RWMutex
	closed bool
	calls  sync.WaitGroup // Add only under mu while not closed
	ends   chan struct{}  // closed when the provider closes
	once   sync.Once
}

func errStopped() error {
	return provider.Errorf(provider.ErrUnavailable, "the messaging provider was stopped")
}

func (s *service) enter() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return errStopped()
	}
	s.calls.Add(1)
	return nil
}

// Invoke serves one call.
func (s *service) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	r, err := decode(call.Operation, call.Payload)
	if err == nil {
		err = r.check(call.Operation)
	}
	if err == nil && ctx.Err() != nil {
		err = provider.FromContext(ctx)
	}
	if err != nil {
		return nil, err
	}
	switch call.Operation {
	case opPublish:
		return s.publish(ctx, &call, &r)
	case opRequest:
		return s.request(ctx, &call, &r)
	default:
		return s.subscribe(ctx, call, string(r.subject), call.Operation == opSubscribe)
	}
}

// publish hands a message to the server, and waits until it is stored where
// messages are kept.
func (s *service) publish(ctx context.Context, call *provider.Call, r *request) ([]byte, error) {
	wire := s.link.prefix + string(r.subject)
	if subject := wire[len(s.link.prefix):]; s.link.keeps(subject) {
		return s.store(ctx, call, r, subject)
	}
	if err := s.gate.enter(call); err != nil {
		return nil, err
	}
	var err error
	if len(r.headers) == 0 {
		err = s.link.nc.Publish(wire, r.payload)
	} else {
		err = s.link.nc.PublishMsg(&nats.Msg{Subject: wire, Data: r.payload, Header: headersOf(r.headers)})
	}
	s.gate.leave()
	if err != nil {
		return nil, natsError(err, false)
	}
	s.meter.published.Inc()
	return []byte{}, nil
}

// headerID is the field by which a publisher names a message, so that it is stored
// once however often it is sent.
const headerID = "Message-Id"

func (s *service) store(ctx context.Context, call *provider.Call, r *request, subject string) ([]byte, error) {
	// The payload is only valid during the call, and the client may send it again.
	m := &nats.Msg{Subject: s.link.prefix + subject, Data: bytes.Clone(r.payload), Header: headersOf(r.headers)}
	for i := range r.headers {
		if bytes.EqualFold(r.headers[i].name, []byte(headerID)) {
			// One workload must not keep another's messages out.
			m.Header[nats.MsgIdHdr] = []string{call.Name + "\x1f" + subject + "\x1f" + string(r.headers[i].value)}
		}
	}
	if err := s.gate.enter(call); err != nil {
		return nil, err
	}
	stored, err := s.link.js.PublishMsgAsync(m, jetstream.WithStallWait(time.Second))
	s.gate.leave()
	switch {
	case errors.Is(err, jetstream.ErrTooManyStalledMsgs):
		return nil, storeError(err)
	case err != nil:
		return nil, natsError(err, false)
	}
	select {
	case ack := <-stored.Ok():
		s.meter.published.Inc()
		return encodeSequence(ack.Sequence), nil
	case err := <-stored.Err():
		if errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) {
			_ = s.link.ensureStream(ctx) // somebody deleted it; the caller may try again
		}
		return nil, storeError(err)
	case <-ctx.Done():
		return nil, provider.Errorf(provider.ErrTimeout, "the message was not confirmed before the call ended; it may have been stored").
			With(provider.DetailOutcome, provider.OutcomeUnknown).Because(ctx.Err())
	}
}

func headersOf(fields []header) nats.Header {
	if len(fields) == 0 {
		return nil
	}
	h := make(nats.Header, len(fields)+1)
	for i := range fields {
		name := string(fields[i].name)
		h[name] = append(h[name], string(fields[i].value))
	}
	return h
}

// request publishes a message and waits for the first reply.
func (s *service) request(ctx context.Context, call *provider.Call, r *request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, r.wait())
	defer cancel()
	wait := r.wait()
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	subject := string(r.subject)
	m := nats.Msg{Subject: s.link.requestPrefix(subject) + subject, Data: r.payload, Header: headersOf(r.headers)}
	if m.Header == nil {
		m.Header = nats.Header{}
	}
	m.Header[headerTimeout] = []string{strconv.FormatInt(max(wait.Milliseconds(), 1), 10)}
	var answer <-chan *nats.Msg
	answer, m.Reply = s.replies.expect()
	defer s.replies.forget(m.Reply)
	if err := s.gate.enter(call); err != nil {
		return nil, err
	}
	err := s.link.nc.PublishMsg(&m)
	s.gate.leave()
	if err != nil {
		return nil, natsError(err, false)
	}
	s.meter.published.Inc()
	select {
	case reply, ok := <-answer:
		return s.replied(reply, ok, subject)
	case <-ctx.Done():
		return nil, provider.Errorf(provider.ErrTimeout, "nobody replied on %s within %s", subject, wait.Round(time.Millisecond)).
			With("subject", subject).With(provider.DetailOutcome, provider.OutcomeUnknown).Because(ctx.Err())
	case <-s.ends:
		return nil, provider.Errorf(provider.ErrUnavailable, "the messaging provider was stopped before the reply came").
			With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
}

func (s *service) replied(reply *nats.Msg, ok bool, subject string) ([]byte, error) {
	switch {
	case !ok:
		return nil, natsError(nats.ErrDisconnected, true)
	case noResponders(reply):
		return nil, provider.Errorf(provider.ErrUnavailable, "nobody listens on %s", subject).
			With("subject", subject).NextStep("run a workload that subscribes to %s", subject)
	case reply.Header.Get(headerError) != "":
		return nil, provider.Errorf(provider.ErrConflict, "the subscriber refused the request: %s", oneLine(reply.Header.Get(headerError))).
			With("subject", subject)
	case len(reply.Data) > maxForeign:
		return nil, provider.Errorf(provider.ErrExhausted, "the reply has %d bytes, the most is %d", len(reply.Data), maxForeign).
			With("subject", subject)
	}
	return encodeReply(reply), nil
}

// subscribe records that a subscription begins or ends, and waits until it does.
func (s *service) subscribe(ctx context.Context, call provider.Call, subject string, subscribed bool) ([]byte, error) {
	switch {
	case call.Instance == "":
		return nil, provider.Errorf(provider.ErrInvalid, "only an instance can subscribe").
			NextStep("wasmatrix msg sub %s --provider %s", subject, s.id)
	case s.hub == nil:
		return nil, provider.Errorf(provider.ErrUnavailable, "this node cannot record subscriptions")
	}
	if subscribed {
		if err := s.link.checkPattern(subject); err != nil {
			return nil, err
		}
	}
	// The record itself is fenced where it is committed.
	if err := s.gate.enter(&call); err != nil {
		return nil, err
	}
	s.gate.leave()
	call.Payload = nil
	existed, err := s.hub.messages.Record(ctx, call, s.id, subject, subscribed)
	if err != nil {
		return nil, err
	}
	k := key{name: call.Name, subject: subject}
	if err := s.hub.await(ctx, k, call.Instance, subscribed); err != nil {
		return nil, err
	}
	if subscribed {
		return []byte{}, nil
	}
	s.hub.forget(ctx, k)
	return encodeExisted(existed), nil
}

// Close refuses further calls and takes no further messages, gives handlers under
// way up to closeGrace, and ends the connection. Requests that wait for a reply
// fail. It may be called again.
func (s *service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.once.Do(func() {
		close(s.ends)
		s.calls.Wait()
		if s.hub != nil {
			s.hub.close(s.grace)
		}
		// What was answered or acknowledged last is still in the client's buffer.
		_ = s.link.nc.FlushTimeout(time.Second)
		s.link.close()
	})
	return nil
}
