package kv

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"github.com/wasmatrix/wasmatrix/provider"
)

// opEnter is a write that only raises the caller's mark.
const opEnter = "enter"

// natsWave is some writes that are decided upon together and sent without waiting
// for one another. Each message is stored only directly behind the one before it:
// the first names the stream's last sequence number, the others also the id of
// their predecessor. So when one is refused, all behind it are.
type natsWave struct {
	store    *natsStore
	index    *natsIndex
	base     uint64 // the stream's last sequence number, as far as is known
	prefix   string // of the ids
	limit    int    // bytes of a value that one message can hold
	steps    []natsStep
	messages []natsMessage
	entries  map[[2]string]*natsEntry // as the wave leaves them
	marks    map[string]provider.Mark
}

// natsStep is one write of a wave. It is done when its messages and all before
// them are stored.
type natsStep struct {
	job      *job
	from, to int  // its messages
	settled  bool // refused: it does not depend on the stream
}

type natsMessage struct {
	msg    *nats.Msg
	id     string
	change natsChange
	future jetstream.PubAckFuture
	err    error // why it was not stored, or why that is not known
	stored bool
	doubt  bool // it may be stored
}

// do queues a write and waits until it is done.
func (s *natsStore) do(ctx context.Context, w *write) error {
	return s.commits.do(ctx, len(w.key)+len(w.value), func(txn) error { return s.wave.decide(w) })
}

func (s *natsStore) write(ctx context.Context, w *write) error {
	bounded, cancel := s.bound(ctx)
	index, err := s.ready(bounded)
	cancel()
	if err != nil {
		return err
	}
	if err := s.admit(index, &w.call); err != nil {
		return err
	}
	return s.do(ctx, w)
}

// commit carries a batch out. What others came before with is tried again.
func (s *natsStore) commit(batch []*job) {
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout) //nolint:forbidigo // several calls share it
	defer cancel()
	for len(batch) > 0 {
		if batch = s.attempt(ctx, batch); len(batch) > 0 && ctx.Err() != nil {
			for _, j := range batch {
				j.err = provider.Errorf(provider.ErrTimeout, "others wrote to nats at %s all the time", s.address).With("address", s.address)
			}
			return
		}
	}
}

// attempt makes one wave of jobs and returns those that are to be tried again.
func (s *natsStore) attempt(ctx context.Context, jobs []*job) (again []*job) {
	fail := func(err error) []*job {
		for _, j := range jobs {
			j.err = err
		}
		return nil
	}
	bounded, cancel := s.bound(ctx)
	defer cancel()
	index, err := s.ready(bounded)
	if err == nil && s.behind.Load() {
		if err = s.catchUp(bounded, index); err == nil {
			s.behind.Store(false)
		}
	}
	if err != nil {
		return fail(err)
	}
	w := s.newWave(index)
	for _, j := range jobs {
		from := len(w.messages)
		s.wave = w
		j.err = j.run(txn{})
		w.steps = append(w.steps, natsStep{job: j, from: from, to: len(w.messages), settled: j.err != nil})
	}
	s.wave = nil
	if len(w.messages) == 0 {
		return s.confirm(bounded, w)
	}
	w.send(bounded)
	return w.finish(bounded)
}

func (s *natsStore) newWave(index *natsIndex) *natsWave {
	base, _ := index.position()
	return &natsWave{
		store: s, index: index, base: base, prefix: nuid.Next(), limit: int(s.conn.MaxPayload()) - natsOverhead,
		entries: map[[2]string]*natsEntry{}, marks: map[string]provider.Mark{},
	}
}

// confirm is for a wave that changes nothing, such as a cas that found another
// version: it holds if the index is not behind.
func (s *natsStore) confirm(ctx context.Context, w *natsWave) (again []*job) {
	depends := false
	for _, step := range w.steps {
		depends = depends || !step.settled
	}
	if !depends {
		return nil
	}
	err := s.catchUp(ctx, w.index)
	if now, _ := w.index.position(); err == nil && now == w.base {
		return nil
	}
	for _, step := range w.steps {
		if !step.settled && err != nil {
			step.job.err = err
		} else if !step.settled {
			again = append(again, step.job)
		}
	}
	return again
}

// decide decides on a write, after those before it in the wave.
func (w *natsWave) decide(op *write) error {
	op.done, op.version = false, 0
	if err := w.admit(&op.call); err != nil || op.operation == opEnter {
		return err
	}
	e := w.find(op.bucket, string(op.key))
	current := uint64(0)
	if e != nil && e.alive(op.now) {
		current = e.sequence
	}
	next := &natsEntry{bucket: op.bucket, key: string(op.key), expires: op.expires, size: len(op.value)}
	head, tail := op.value, []byte(nil)
	switch {
	case op.operation == opDelete:
		op.done = current != 0
		if e == nil || e.deleted {
			return nil
		}
		next.deleted, next.expires, head = true, 0, nil
	case !op.put(current):
		return nil
	case len(head) > w.limit:
		head, tail = head[:w.limit], head[w.limit:]
		next.tail = w.prefix + strconv.Itoa(len(w.messages))
		w.add(w.store.subjects.tail(next.tail), "tail", tail, natsChange{tail: next.tail})
	}
	w.add(w.store.subjects.key(op.bucket, next.key), next.describe(), head, natsChange{entry: next})
	next.sequence = w.base + uint64(len(w.messages)) //nolint:gosec // a length
	w.entries[[2]string{next.bucket, next.key}] = next
	if op.operation != opDelete {
		op.version = next.sequence
	}
	return nil
}

// admit admits a call and raises its instance's mark.
func (w *natsWave) admit(call *provider.Call) error {
	if call.Instance != "" {
		newest, raised := w.marks[call.Instance]
		if !raised {
			newest = w.index.seen(call.Instance)
		}
		have := call.Mark()
		if have.Before(newest) {
			return provider.Superseded(call.Instance, have, newest)
		}
		if err := call.Admit(); err != nil {
			return err
		}
		if newest.Before(have) {
			w.marks[call.Instance] = have
			says := "mark " + strconv.FormatUint(have.Created, 10) + " " + strconv.FormatUint(have.Generation, 10)
			w.add(w.store.subjects.mark(call.Instance), says, nil, natsChange{instance: call.Instance, mark: have})
		}
		return nil
	}
	return call.Admit()
}

func (w *natsWave) find(bucket, key string) *natsEntry {
	if e, ok := w.entries[[2]string{bucket, key}]; ok {
		return e
	}
	w.index.mu.RLock()
	defer w.index.mu.RUnlock()
	return w.index.find(bucket, key)
}

func (w *natsWave) add(subject, says string, data []byte, change natsChange) {
	n := len(w.messages)
	m := natsMessage{id: w.prefix + "." + strconv.Itoa(n), change: change}
	m.msg = &nats.Msg{Subject: subject, Data: data, Header: nats.Header{
		natsHeader:  {says},
		natsMsgID:   {m.id},
		natsLastSeq: {strconv.FormatUint(w.base+uint64(n), 10)}, //nolint:gosec // a length
	}}
	if n > 0 {
		m.msg.Header[natsLastID] = []string{w.messages[n-1].id}
	}
	w.messages = append(w.messages, m)
}

// send publishes the messages and waits for what becomes of them.
func (w *natsWave) send(ctx context.Context) {
	for i := range w.messages {
		m := &w.messages[i]
		if m.future, m.err = w.store.js.PublishMsgAsync(m.msg, jetstream.WithRetryAttempts(0)); m.err != nil {
			for j := i + 1; j < len(w.messages); j++ {
				w.messages[j].err = m.err
			}
			break
		}
	}
	for i := range w.messages {
		m := &w.messages[i]
		if m.future == nil {
			break
		}
		select {
		case ack := <-m.future.Ok():
			m.took(ack, w.base+uint64(i)+1) //nolint:gosec // an index
		case m.err = <-m.future.Err():
			m.doubt = !certain(m.err)
		case <-ctx.Done():
			select {
			case ack := <-m.future.Ok():
				m.took(ack, w.base+uint64(i)+1) //nolint:gosec // an index
			default:
				m.err, m.doubt = context.Cause(ctx), true
			}
		}
	}
}

// took takes up an acknowledgement; one of another place in the stream is none.
func (m *natsMessage) took(ack *jetstream.PubAck, want uint64) {
	m.stored = ack.Sequence == want
	if !m.stored {
		m.err, m.doubt = fmt.Errorf("stored at %d instead of %d", ack.Sequence, want), true
	}
}

// certain reports whether an error says that the message was not stored.
func certain(err error) bool {
	_, refused := errors.AsType[*jetstream.APIError](err)
	return refused || errors.Is(err, jetstream.ErrNoStreamResponse)
}

// outrun reports whether a message was refused because the stream had grown.
func outrun(err error) bool {
	api, refused := errors.AsType[*jetstream.APIError](err)
	if !refused {
		return false
	}
	switch api.ErrorCode {
	case jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant, natsWrongLastID:
		return true
	default:
		return false
	}
}

// finish takes up what was stored, and returns the jobs that are to be tried again.
func (w *natsWave) finish(ctx context.Context) (again []*job) {
	stored := 0 // messages, all from the first on: one behind another shows that that one is
	for i := range w.messages {
		if w.messages[i].stored {
			stored = i + 1
		}
	}
	now := time.Now().UnixNano()
	for i := range stored {
		m := &w.messages[i]
		w.index.apply(w.base+uint64(i)+1, m.id, now, m.change) //nolint:gosec // an index
	}
	if stored < len(w.messages) {
		w.store.behind.Store(true)
	}
	for _, step := range w.steps {
		switch {
		case step.settled || stored > 0 && stored >= step.to:
			continue // done, whatever it was
		case step.from == step.to || step.to <= stored:
			again = append(again, step.job) // it looked at what is not so
			continue
		}
		if err := w.verdict(ctx, step); err != nil {
			step.job.err = err
		} else {
			again = append(again, step.job)
		}
	}
	return again
}

// verdict returns how a step ended whose messages are not all stored, or nil when
// it is certain that it had no effect and it can be tried again.
func (w *natsWave) verdict(ctx context.Context, step natsStep) error {
	last := &w.messages[step.to-1]
	switch {
	case last.future == nil: // it was never sent
		return w.store.failure(ctx, last.err, false, true)
	case last.doubt:
		return w.store.failure(ctx, last.err, true, true)
	case !outrun(last.err):
		return w.store.failure(ctx, last.err, false, true)
	}
	// It was refused for what came before it: if that is another message of this
	// step, that one says why.
	for i := step.from; i < step.to-1; i++ {
		if m := &w.messages[i]; !m.stored && !m.doubt && m.err != nil && !outrun(m.err) {
			return w.store.failure(ctx, m.err, false, true)
		}
	}
	return nil
}
