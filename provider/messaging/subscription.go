package messaging

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	// logEvery is how often a subscription tells of one kind of trouble.
	logEvery = 10 * time.Second
	// reopenFirst and reopenMost pace the opening of a subscription that fails.
	reopenFirst = 50 * time.Millisecond
	reopenMost  = 5 * time.Second
	// holdFirst and holdMost pace the search for a replica that takes a message.
	holdFirst = 20 * time.Millisecond
	holdMost  = time.Second
	// maxRetryAfter is the longest delay that a handler can ask for.
	maxRetryAfter = 24 * time.Hour
)

// errEnded: the subscription or the provider ended before a replica took the message.
var errEnded = errors.New("the subscription has ended")

// errExpired: the sender of a request waits no longer.
var errExpired = errors.New("the sender waits no longer")

// subscription delivers the messages of one subject to one workload.
type subscription struct {
	hub *hub
	key key

	// taking ends when no new message is taken: it was revoked, or the hub closes.
	taking  context.Context //nolint:containedctx // the subscription's own life, not a call's
	stop    context.CancelFunc
	revoked chan struct{} // closed when it was revoked
	slots   chan struct{} // one token for each request, or message that nothing keeps, in flight
	retries budget
	memory  memory

	handlers sync.WaitGroup // Add only under mu while not ended

	mu      sync.Mutex
	members []*member
	turn    int
	moved   chan struct{} // closed when the members change
	active  bool
	ended   bool
	trouble error // why it is not active

	sayDropped, sayRejected, sayGivenUp, sayHeld rate.Sometimes
}

// member is one replica of the workload.
type member struct {
	provider.Subscription

	local bool
	busy  int // messages in its handler
}

func newSubscription(h *hub, k key) *subscription {
	s := &subscription{
		hub: h, key: k, revoked: make(chan struct{}), moved: make(chan struct{}),
		slots:   make(chan struct{}, h.link.deliver.inFlight),
		retries: budget{count: h.link.deliver.pending, bytes: maxWaitingBytes},
	}
	for _, say := range []*rate.Sometimes{&s.sayDropped, &s.sayRejected, &s.sayGivenUp, &s.sayHeld} {
		say.First, say.Interval = 1, logEvery
	}
	s.taking, s.stop = context.WithCancel(h.watch)
	return s
}

// setMembers takes up which replicas there are. Those that stay keep their count.
func (s *subscription) setMembers(list []provider.Subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.EqualFunc(s.members, list, func(m *member, sub provider.Subscription) bool { return m.Subscription == sub }) {
		return
	}
	next := make([]*member, len(list))
	for i, sub := range list {
		next[i] = &member{Subscription: sub, local: sub.Node == s.hub.node && sub.Node != ""}
		for _, m := range s.members {
			if m.Instance == sub.Instance && m.Generation == sub.Generation && m.Created == sub.Created {
				m.Subscription, m.local = next[i].Subscription, next[i].local
				next[i] = m
			}
		}
	}
	s.members = next
	close(s.moved)
	s.moved = make(chan struct{})
}

// serves reports whether messages go to an instance, and what stands against it.
func (s *subscription) serves(instance string) (has bool, trouble error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	has = slices.ContainsFunc(s.members, func(m *member) bool { return m.Instance == instance })
	if !s.active {
		trouble = s.trouble
		if trouble == nil {
			trouble = errors.New("it is being set up")
		}
	}
	return has, trouble
}

// revoke ends the subscription: no delivery begins afterwards.
func (s *subscription) revoke() {
	close(s.revoked)
	s.stop()
}

// run keeps the subscription at the server until it ends.
func (s *subscription) run() {
	for tries := 0; s.taking.Err() == nil; tries++ {
		began := time.Now()
		err := s.serve()
		if s.taking.Err() != nil {
			break
		}
		if time.Since(began) > reopenMost {
			tries = 0
		}
		s.setState(false, err)
		s.hub.log.Warn("a subscription does not stand; trying again", "workload", s.key.name, "subject", s.key.subject, "error", err)
		select {
		case <-time.After(backoff(reopenFirst, reopenMost, tries)):
		case <-s.taking.Done():
		}
	}
	s.mu.Lock()
	s.ended, s.active = true, false
	s.mu.Unlock()
	s.hub.tell()
	s.handlers.Wait()
}

// serve opens the sources and waits until the subscription ends or one fails.
func (s *subscription) serve() error {
	l := s.hub.link
	if problem := subjectProblem([]byte(s.key.subject), true); problem != "" {
		return s.hopeless(errors.New("the subject " + problem))
	}
	if err := l.checkPattern(s.key.subject); err != nil {
		return s.hopeless(err)
	}
	plain, err := s.openPlain(l.requestPrefix(s.key.subject) + s.key.subject)
	if err != nil {
		return err
	}
	defer plain.close()
	var kept *keptSource
	if l.keeps(s.key.subject) {
		if kept, err = s.openKept(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(s.taking, apiTimeout)
	err = l.nc.FlushWithContext(ctx)
	cancel()
	if err != nil {
		return err
	}
	s.setState(true, nil)
	if kept != nil {
		return kept.pull()
	}
	<-s.taking.Done()
	return nil
}

// hopeless waits for the end of a subscription that can never stand.
func (s *subscription) hopeless(err error) error {
	s.setState(false, err)
	s.hub.log.Warn("a subscription cannot stand", "workload", s.key.name, "subject", s.key.subject, "error", err)
	<-s.taking.Done()
	return err
}

func (s *subscription) setState(active bool, trouble error) {
	s.mu.Lock()
	s.active, s.trouble = active, trouble
	s.mu.Unlock()
	s.hub.tell()
}

// begin counts a handler; false when the subscription has ended.
func (s *subscription) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.handlers.Add(1)
	s.hub.meter.inFlight.Inc()
	return true
}

func (s *subscription) end() {
	s.hub.meter.inFlight.Dec()
	s.handlers.Done()
}

// pick takes the replica with the fewest messages in its handler, of those the
// ones on this node first, then in turn. It returns nil when all were tried; moved
// is closed at the next change of the replicas.
func (s *subscription) pick(tried []*member) (best *member, moved <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := 0
	for i := range s.members {
		j := (s.turn + i) % len(s.members)
		m := s.members[j]
		if slices.Contains(tried, m) {
			continue
		}
		if best == nil || m.busy < best.busy || m.busy == best.busy && m.local && !best.local {
			best, at = m, j
		}
	}
	if best != nil {
		best.busy++
		s.turn = at + 1
	}
	return best, s.moved
}

func (s *subscription) free(m *member) {
	s.mu.Lock()
	m.busy--
	s.mu.Unlock()
}

// verdict is what became of one delivery.
type verdict struct {
	pb.MessageVerdict

	reply  []byte
	after  time.Duration // until the next delivery; 0 is the provider's backoff
	reason string
	// blameless: whether the handler got the message is not known, or it failed for
	// no fault of the message. Such deliveries never lead to giving up.
	blameless bool
}

// deliver hands a message to one replica, and waits while none takes it. It fails
// with errEnded or errExpired.
func (s *subscription) deliver(ctx context.Context, m *message) (verdict, error) {
	encoded := takeBuffer()
	defer giveBuffer(encoded)
	*encoded = m.encode((*encoded)[:0], s.key.subject, s.hub.id)
	return s.handOver(ctx, *encoded)
}

func (s *subscription) handOver(ctx context.Context, encoded []byte) (verdict, error) {
	for round := 0; ; round++ {
		var moved <-chan struct{}
		var tried []*member
		var last error
		for {
			if isClosed(s.revoked) {
				return verdict{}, errEnded
			}
			to, changes := s.pick(tried)
			if moved == nil {
				moved = changes
			}
			if to == nil {
				break
			}
			answer, err := s.hub.messages.Deliver(ctx, to.Subscription, encoded)
			s.free(to)
			if err == nil {
				return readResult(answer), nil
			}
			if v, taken := failed(err); taken {
				return v, nil
			}
			tried, last = append(tried, to), err
		}
		if last != nil {
			s.sayHeld.Do(func() {
				s.hub.log.Info("no replica takes a message; it waits", "workload", s.key.name, "subject", s.key.subject, "error", last)
			})
		}
		pause := time.NewTimer(backoff(holdFirst, holdMost, round))
		select {
		case <-pause.C:
		case <-moved:
		case <-s.taking.Done():
			pause.Stop()
			return verdict{}, errEnded
		case <-ctx.Done():
			pause.Stop()
			return verdict{}, errExpired
		}
		pause.Stop()
	}
}

// failed reads an error of Deliver: whether the handler may have got the message,
// and what is to happen then.
func failed(err error) (v verdict, taken bool) {
	switch {
	case errors.Is(err, provider.ErrTimeout), errors.Is(err, provider.ErrInternal):
		return verdict{MessageVerdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, reason: err.Error()}, true
	case errors.Is(err, provider.ErrCommunication):
		return verdict{MessageVerdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, reason: err.Error(), blameless: true}, true
	default:
		// Not known there, not running, busy, not allowed, without a handler: it was
		// not taken.
		return verdict{}, false
	}
}

// readResult reads a handler's MessageResult.
func readResult(answer []byte) verdict {
	if len(answer) == 0 {
		return verdict{MessageVerdict: pb.MessageVerdict_MESSAGE_VERDICT_ACKNOWLEDGE}
	}
	var r pb.MessageResult
	if err := proto.Unmarshal(answer, &r); err != nil {
		return verdict{
			MessageVerdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, reason: "the handler answered with something that is not a MessageResult",
		}
	}
	v := verdict{MessageVerdict: r.GetVerdict(), reply: r.GetReply(), reason: oneLine(r.GetReason())}
	switch v.MessageVerdict {
	case pb.MessageVerdict_MESSAGE_VERDICT_RETRY:
		v.after = maxRetryAfter
		if ms := r.GetRetryAfterMs(); ms < uint64(maxRetryAfter.Milliseconds()) {
			v.after = time.Duration(ms) * time.Millisecond //nolint:gosec // less than a day
		}
	case pb.MessageVerdict_MESSAGE_VERDICT_REJECT:
	default:
		v.MessageVerdict = pb.MessageVerdict_MESSAGE_VERDICT_ACKNOWLEDGE
	}
	return v
}

// judge counts a delivery, and turns a retry of a message that failed often enough
// into giving up. failures counts those that the handler is to blame for.
func (s *subscription) judge(v *verdict, m *message, failures uint32) (giveUp bool) {
	meter, most := s.hub.meter, s.hub.link.deliver.most
	switch v.MessageVerdict {
	case pb.MessageVerdict_MESSAGE_VERDICT_RETRY:
		if most != 0 && failures >= most && !v.blameless {
			meter.givenUp.Inc()
			s.sayGivenUp.Do(func() {
				s.hub.log.Warn("a message is given up", "workload", s.key.name, "subject", m.subject,
					"sequence", m.sequence, "deliveries", m.delivery, "reason", v.reason)
			})
			return true
		}
		meter.retried.Inc()
	case pb.MessageVerdict_MESSAGE_VERDICT_REJECT:
		meter.rejected.Inc()
		s.sayRejected.Do(func() {
			s.hub.log.Warn("a message was rejected", "workload", s.key.name, "subject", m.subject,
				"sequence", m.sequence, "reason", v.reason)
		})
	default:
		meter.acknowledged.Inc()
	}
	return false
}

// delay is how long a message waits for its next delivery.
func (s *subscription) delay(v *verdict, failures uint32) time.Duration {
	if v.after > 0 {
		return v.after
	}
	return backoff(s.hub.link.deliver.backoff, s.hub.link.deliver.maxBackoff, int(failures)-1)
}

func (s *subscription) drop(reason string, n int) {
	if n <= 0 {
		return
	}
	s.hub.meter.dropped(reason).Add(float64(n))
	s.sayDropped.Do(func() {
		s.hub.log.Warn("messages are dropped", "workload", s.key.name, "subject", s.key.subject, "reason", reason, "count", n)
	})
}

// backoff doubles with each try and varies by a fifth to either side.
func backoff(first, most time.Duration, tries int) time.Duration {
	d := most
	if tries = max(tries, 0); tries < 32 && first<<tries > 0 && first<<tries < most {
		d = first << tries
	}
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
