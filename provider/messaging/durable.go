package messaging

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// consumerPrefix begins the names of the durable consumers that are the hub's.
const consumerPrefix = "wasmatrix-"

// waitingAcks is how many messages of a subscription may wait for another delivery
// before it gets no others.
const waitingAcks = 1000

// pullHeartbeat is how often the server says that it still has the question. After
// twice that in silence, as when it was killed and came back, it is asked anew.
const pullHeartbeat = time.Second

// consumerName names the durable consumer of a subscription: whoever delivers for
// the provider next goes on with it.
func consumerName(k key) string {
	sum := sha256.Sum256([]byte(k.name + "\x00" + k.subject))
	return consumerPrefix + hex.EncodeToString(sum[:16])
}

// keptSource takes the messages of a stream.
type keptSource struct {
	s        *subscription
	consumer jetstream.Consumer
	// taken has one token for each message in flight or asked for; requests have
	// theirs, for a question to the server may take all of these.
	taken chan struct{}
}

// openKept makes the durable consumer, or goes on with the one there is.
func (s *subscription) openKept() (*keptSource, error) {
	l := s.hub.link
	ctx, cancel := context.WithTimeout(s.taking, 2*apiTimeout)
	defer cancel()
	cfg := jetstream.ConsumerConfig{
		Durable: consumerName(s.key), Description: "workload " + s.key.name + ", subject " + s.key.subject,
		FilterSubject: l.prefix + s.key.subject, DeliverPolicy: jetstream.DeliverNewPolicy,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: l.stream.ackWait,
		// The hub gives up itself: a delivery that no replica took must not count.
		MaxDeliver: -1, MaxAckPending: l.deliver.inFlight + waitingAcks,
	}
	consumer, err := l.js.CreateOrUpdateConsumer(ctx, l.stream.name, cfg)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if err = l.ensureStream(ctx); err == nil {
			consumer, err = l.js.CreateOrUpdateConsumer(ctx, l.stream.name, cfg)
		}
	}
	if err != nil {
		return nil, err
	}
	return &keptSource{s: s, consumer: consumer, taken: make(chan struct{}, l.deliver.inFlight)}, nil
}

// pull takes messages, as many as there are free slots, until the subscription
// ends or the server fails.
func (k *keptSource) pull() error {
	for {
		n := k.slots()
		if n == 0 {
			return nil
		}
		batch, err := k.consumer.Fetch(n, jetstream.FetchContext(k.s.taking), jetstream.FetchHeartbeat(pullHeartbeat))
		if err != nil {
			k.release(n)
			return err
		}
		for m := range batch.Messages() {
			n--
			k.take(m)
		}
		k.release(n)
		if err := batch.Error(); err != nil && k.s.taking.Err() == nil {
			return err
		}
	}
}

// slots waits for a free slot and takes all there are; 0 when the subscription ends.
func (k *keptSource) slots() int {
	select {
	case k.taken <- struct{}{}:
	case <-k.s.taking.Done():
		return 0
	}
	for n := 1; ; n++ {
		select {
		case k.taken <- struct{}{}:
		default:
			return n
		}
	}
}

func (k *keptSource) release(n int) {
	for range n {
		<-k.taken
	}
}

func (k *keptSource) take(raw jetstream.Msg) {
	if m, id, ok := k.read(raw); ok && k.s.begin() {
		k.s.hub.crew.Run(func() { k.handle(raw, m, id) })
		return
	}
	<-k.taken
}

// read checks that a message is to be delivered, and tells the server when not.
func (k *keptSource) read(raw jetstream.Msg) (*message, storedID, bool) {
	s := k.s
	meta, err := raw.Metadata()
	if err != nil || s.taking.Err() != nil {
		_ = raw.Nak() // for whoever comes next; without it, after the time to acknowledge
		return nil, storedID{}, false
	}
	m, ok := s.read(raw.Subject(), raw.Headers(), raw.Data())
	if !ok {
		_ = raw.Term()
		return nil, storedID{}, false
	}
	id := storedID{sequence: meta.Sequence.Stream, at: meta.Timestamp}
	delivery, settled := s.memory.begin(id, uint32(meta.NumDelivered)) //nolint:gosec // counts deliveries
	if settled {
		_ = raw.Ack() // the server has forgotten the first
		return nil, storedID{}, false
	}
	m.sequence, m.delivery = meta.Sequence.Stream, delivery
	return &m, id, true
}

// handle delivers a message and does what the handler says. It holds a slot.
func (k *keptSource) handle(raw jetstream.Msg, m *message, id storedID) {
	s := k.s
	defer s.end()
	defer func() { <-k.taken }()
	stop := k.keepAlive(raw)
	v, err := s.deliver(s.hub.work, m)
	stop()
	if err != nil {
		s.memory.unseen(id)
		_ = raw.Nak()
		return
	}
	failures := uint32(0)
	retry := v.MessageVerdict == pb.MessageVerdict_MESSAGE_VERDICT_RETRY
	if retry {
		failures = s.memory.failed(id, v.blameless)
	}
	giveUp := s.judge(&v, m, failures)
	switch {
	case giveUp, v.MessageVerdict == pb.MessageVerdict_MESSAGE_VERDICT_REJECT:
		s.memory.settle(id)
		err = raw.Term()
	case retry:
		err = raw.NakWithDelay(s.delay(&v, max(failures, m.delivery)))
	default:
		s.memory.settle(id)
		err = raw.Ack()
	}
	if err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		s.hub.log.Debug("what became of a message could not be told; it comes again",
			"workload", s.key.name, "sequence", m.sequence, "error", err)
	}
}

// keepAlive tells the server that a message is being handled, until the returned
// function is called.
func (k *keptSource) keepAlive(raw jetstream.Msg) (stop func()) {
	every := k.s.hub.link.stream.ackWait / 3
	var mu sync.Mutex
	done := false
	var timer *time.Timer
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(every, func() {
		mu.Lock()
		defer mu.Unlock()
		if !done {
			_ = raw.InProgress()
			timer.Reset(every)
		}
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		done = true
		timer.Stop()
	}
}
