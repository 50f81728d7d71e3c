package kv

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wasmatrix/wasmatrix/provider"
)

// How long the follower waits after a failure.
const natsFollowAgain = 100 * time.Millisecond

var errNatsAgain = errors.New("the stream is to be followed anew")

// setIndex makes an index the one to decide upon, or nil none, and says why.
func (s *natsStore) setIndex(index *natsIndex, problem error) {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	s.link.index, s.link.problem = index, problem
	if index != nil {
		s.link.kept = index
	}
	close(s.link.changed)
	s.link.changed = make(chan struct{})
}

// lost is called when the connection broke. What is there behind the next one is
// not known: the server may have been set back.
func (s *natsStore) lost(*nats.Conn, error) {
	s.setIndex(nil, nil)
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	close(s.link.broke)
	s.link.broke = make(chan struct{})
}

// begin makes the follower begin anew.
func (s *natsStore) begin() {
	select {
	case s.link.restart <- struct{}{}:
	default:
	}
}

// follow keeps the index up to date until ctx ends.
func (s *natsStore) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.session(ctx)
		if errors.Is(err, errNatsAgain) {
			continue
		}
		s.log.DebugContext(ctx, "the stream is not followed", "error", err)
		timer := time.NewTimer(natsFollowAgain)
		select {
		case <-ctx.Done():
		case <-s.link.restart:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// session follows the stream until something is wrong.
func (s *natsStore) session(ctx context.Context) error {
	if !s.conn.IsConnected() {
		return errNatsBroke
	}
	bounded, cancel := s.bound(ctx)
	defer cancel()
	info, err := s.stream.Info(bounded)
	if errors.Is(err, jetstream.ErrStreamNotFound) || err == nil && !info.Created.Equal(s.created) {
		err := provider.Errorf(provider.ErrUnavailable, "the stream on nats at %s was deleted", s.address).
			With("address", s.address).NextStep("put it back, or restart the provider to begin with an empty one")
		s.setIndex(nil, err)
		return err
	}
	if err != nil {
		return err
	}
	index := s.known(bounded, info)
	from, _ := index.position()
	consumer, err := s.stream.CreateConsumer(bounded, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from + 1, AckPolicy: jetstream.AckNonePolicy,
		HeadersOnly: true, MemoryStorage: true, Replicas: 1, InactiveThreshold: 30 * time.Second,
	})
	if err != nil {
		return err
	}
	defer func() {
		cleanup, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		_ = s.stream.DeleteConsumer(cleanup, consumer.CachedInfo().Name) // it ends by itself otherwise
	}()
	messages, err := consumer.Messages(jetstream.PullMaxMessages(1024), jetstream.PullHeartbeat(time.Second), jetstream.PullExpiry(5*time.Second))
	if err != nil {
		return err
	}
	defer messages.Stop()
	if consumer.CachedInfo().NumPending == 0 {
		index.reach(info.State.LastSeq)
	}
	ended, again := make(chan struct{}), make(chan bool, 1)
	go func() {
		select {
		case <-ctx.Done():
		case <-ended:
		case <-s.link.restart:
			again <- true
		}
		messages.Stop()
		close(again)
	}()
	err = s.take(index, messages, info.State.LastSeq)
	close(ended)
	if <-again {
		return errNatsAgain
	}
	return err
}

// known returns the index from before, if the stream goes on where it ended, or a
// new one. A server that lost its last writes may have others in their place.
func (s *natsStore) known(ctx context.Context, info *jetstream.StreamInfo) *natsIndex {
	s.link.mu.Lock()
	current, kept := s.link.index, s.link.kept
	s.link.mu.Unlock()
	if current != nil {
		if applied, _ := current.position(); applied <= info.State.LastSeq {
			return current
		}
	}
	if kept != nil {
		applied, id := kept.position()
		if applied > 0 && id != "" && applied <= info.State.LastSeq {
			if m, err := s.stream.GetMsg(ctx, applied); err == nil && m.Header.Get(natsMsgID) == id {
				return kept
			}
		}
	}
	s.setIndex(nil, nil)
	return newNatsIndex()
}

// take takes up messages as they come. The index can be decided upon once it is
// as far as the stream was at the beginning.
func (s *natsStore) take(index *natsIndex, messages jetstream.MessagesContext, last uint64) error {
	ready := false
	for received := uint64(1); ; received++ {
		if applied, _ := index.position(); !ready && applied >= last && s.conn.IsConnected() {
			s.setIndex(index, nil)
			ready = true
		}
		m, err := messages.Next()
		if err != nil {
			return err
		}
		meta, err := m.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Consumer != received {
			return errors.New("messages were lost on the way")
		}
		change, ok := s.subjects.read(m.Subject(), m.Headers())
		if !ok {
			s.log.Warn("a message in the stream is not of this driver", "subject", m.Subject(), "sequence", meta.Sequence.Stream)
		}
		index.apply(meta.Sequence.Stream, m.Headers().Get(natsMsgID), meta.Timestamp.UnixNano(), change)
	}
}
