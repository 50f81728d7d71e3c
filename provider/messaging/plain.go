package messaging

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// maxWaitingBytes bounds the messages of one subscription that wait for a slot,
	// and those that wait for another delivery.
	maxWaitingBytes = 64 << 20
	// maxForeign is the largest message of others that is passed on.
	maxForeign = 3 << 20
	// headerTimeout tells for how many milliseconds the sender of a request waits.
	headerTimeout = "Wasmatrix-Timeout"
	// foreignPatience is how long a request is tried that does not say.
	foreignPatience = 30 * time.Second
	// headerError and headerErrorCode tell the sender of a request that it failed, as
	// services of NATS do.
	headerError     = "Nats-Service-Error"
	headerErrorCode = "Nats-Service-Error-Code"
)

// budget bounds what waits in memory.
type budget struct {
	mu    sync.Mutex
	count int
	bytes int
}

func (b *budget) take(size int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count < 1 || b.bytes < size {
		return false
	}
	b.count--
	b.bytes -= size
	return true
}

func (b *budget) give(size int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count++
	b.bytes += size
}

// plainSource takes messages that nothing keeps, and requests. Workers take them one
// after the other and run the handler themselves: handing each message on to another
// goroutine would cost more than all else that is done for it here.
type plainSource struct {
	s       *subscription
	sub     *nats.Subscription
	workers sync.WaitGroup
	count   atomic.Int32 // workers there are
	idle    atomic.Int32 // of these, those that wait for a message
	lost    int          // of its losses, those counted
	mu      sync.Mutex
}

// openPlain subscribes, as one of the workload's, to a subject or pattern of the wire.
func (s *subscription) openPlain(wire string) (*plainSource, error) {
	p := &plainSource{s: s}
	group := "wasmatrix-" + s.hub.id + "-" + s.key.name
	sub, err := s.hub.link.nc.QueueSubscribeSync(wire, group)
	if err != nil {
		return nil, err
	}
	p.sub = sub
	p.more()
	return p, sub.SetPendingLimits(s.hub.link.deliver.pending, maxWaitingBytes)
}

// more adds a worker unless there are as many as handlers may run.
func (p *plainSource) more() {
	if int(p.count.Add(1)) > cap(p.s.slots) {
		p.count.Add(-1)
		return
	}
	p.workers.Add(1)
	p.s.hub.crew.Run(p.work)
}

// maxIdle is how many workers wait for messages at most.
const maxIdle = 2

// work takes messages until the source is closed, or enough others wait for them.
func (p *plainSource) work() {
	defer p.workers.Done()
	defer p.count.Add(-1)
	for p.idle.Load() < maxIdle {
		p.idle.Add(1)
		raw, err := p.sub.NextMsgWithContext(p.s.hub.work)
		left := p.idle.Add(-1)
		if errors.Is(err, nats.ErrSlowConsumer) {
			p.countLost()
			continue
		}
		if err != nil {
			return
		}
		if left == 0 {
			p.more() // somebody has to wait for the next message while this one is handled
		}
		p.take(raw)
	}
}

// close ends the source. What it has taken in is delivered if the provider
// closes, within the grace, and dropped if the subscription was revoked.
func (p *plainSource) close() {
	p.countLost()
	if !isClosed(p.s.revoked) && p.s.taking.Err() != nil && p.sub.Drain() == nil {
		p.workers.Wait() // they end with the last message, or with the hub's work
	}
	left, _, _ := p.sub.Pending()
	_ = p.sub.Unsubscribe() // it may have ended with the connection
	p.s.drop(droppedUndelivered, left)
}

// countLost counts the messages that came while too many waited.
func (p *plainSource) countLost() {
	lost, err := p.sub.Dropped()
	if err != nil {
		return
	}
	p.mu.Lock()
	n := lost - p.lost
	p.lost = lost
	p.mu.Unlock()
	p.s.drop(droppedFull, n)
}

// take waits for a slot; meanwhile others wait in the client's buffer.
func (p *plainSource) take(raw *nats.Msg) {
	s := p.s
	if !s.takeSlot() {
		s.drop(droppedUndelivered, 1)
		return
	}
	m, ok := s.read(raw.Subject, raw.Header, raw.Data)
	if !ok || !s.begin() {
		<-s.slots
		return
	}
	m.wantsReply, m.delivery = raw.Reply != "", 1
	s.handlePlain(raw, &m, 0)
}

// takeSlot waits for a slot; it reports false when the subscription ends first.
func (s *subscription) takeSlot() bool {
	select {
	case s.slots <- struct{}{}:
		return true
	default: // most of the time there is one, and this costs less
	}
	select {
	case s.slots <- struct{}{}:
		return true
	case <-s.revoked:
	case <-s.hub.work.Done():
	}
	return false
}

// read checks that a message can be passed on. Publishers outside of wasmatrix
// are not bound to its limits.
func (s *subscription) read(wire string, headers nats.Header, data []byte) (message, bool) {
	subject, ok := s.hub.link.guestSubject(wire)
	if !ok {
		if utf8.ValidString(wire) && !strings.HasPrefix(wire, "$") && !strings.HasPrefix(wire, "_") {
			s.drop(droppedInvalid, 1)
		}
		return message{}, false // a pattern that begins with a wildcard matches NATS's own subjects
	}
	size := len(data)
	for name, values := range headers {
		for _, v := range values {
			size += len(name) + len(v)
		}
	}
	if size > maxForeign {
		s.drop(droppedInvalid, 1)
		return message{}, false
	}
	return message{subject: subject, payload: data, headers: headers}, true
}

// handlePlain delivers a message and does what the handler says. It holds a slot.
func (s *subscription) handlePlain(raw *nats.Msg, m *message, failures uint32) {
	defer s.end()
	ctx, cancel := s.hub.work, context.CancelFunc(func() {})
	if m.wantsReply {
		ctx, cancel = context.WithTimeout(ctx, patience(raw))
	}
	v, err := s.deliver(ctx, m)
	cancel()
	<-s.slots
	if err != nil {
		reason := droppedUndelivered
		if errors.Is(err, errExpired) && m.wantsReply {
			reason = droppedExpired
		}
		s.drop(reason, 1)
		return
	}
	if !v.blameless {
		failures++
	}
	giveUp := s.judge(&v, m, failures)
	switch v.MessageVerdict {
	case pb.MessageVerdict_MESSAGE_VERDICT_RETRY:
		if giveUp {
			s.refuse(raw, v.reason)
			return
		}
		s.again(raw, m, failures, s.delay(&v, max(failures, m.delivery)))
	case pb.MessageVerdict_MESSAGE_VERDICT_REJECT:
		s.refuse(raw, v.reason)
	default:
		// A publisher outside that wants the confirmation of a stream waits like one
		// that wants a reply: an empty one would confuse it.
		if m.wantsReply && (len(v.reply) > 0 || raw.Header.Get(headerTimeout) != "") {
			s.respond(&nats.Msg{Subject: raw.Reply, Data: v.reply})
		}
	}
}

// again delivers a message once more after a while, if there is room to keep it.
func (s *subscription) again(raw *nats.Msg, m *message, failures uint32, after time.Duration) {
	size := raw.Size()
	if !s.retries.take(size) {
		s.drop(droppedFull, 1)
		return
	}
	if !s.begin() {
		s.retries.give(size)
		s.drop(droppedUndelivered, 1)
		return
	}
	held := *m
	go func() {
		wait := time.NewTimer(after)
		defer wait.Stop()
		taken := false
		select {
		case <-wait.C:
			select {
			case s.slots <- struct{}{}:
				taken = true
			case <-s.taking.Done():
			}
		case <-s.taking.Done():
		}
		s.retries.give(size)
		if !taken {
			s.drop(droppedUndelivered, 1)
			s.end()
			return
		}
		held.delivery++
		s.handlePlain(raw, &held, failures)
	}()
}

// refuse tells the sender of a request that it failed.
func (s *subscription) refuse(raw *nats.Msg, reason string) {
	if raw.Reply == "" || raw.Header.Get(headerTimeout) == "" {
		return
	}
	if reason == "" {
		reason = "no reason was given"
	}
	s.respond(&nats.Msg{Subject: raw.Reply, Header: nats.Header{headerError: {reason}, headerErrorCode: {"400"}}})
}

func (s *subscription) respond(m *nats.Msg) {
	if err := s.hub.link.nc.PublishMsg(m); err != nil {
		s.hub.log.Debug("a reply could not be sent", "workload", s.key.name, "error", err)
	}
}

// patience is how long the sender of a request waits.
func patience(raw *nats.Msg) time.Duration {
	ms, err := strconv.ParseUint(raw.Header.Get(headerTimeout), 10, 32)
	if err != nil {
		return foreignPatience
	}
	return time.Duration(ms) * time.Millisecond //nolint:gosec // 32 bits
}

// maxReason bounds a handler's reason, in bytes: it goes into logs.
const maxReason = 512

// oneLine returns text without control characters and of at most maxReason bytes.
func oneLine(text string) string {
	text = strings.ToValidUTF8(text[:min(len(text), maxReason)], "")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}
