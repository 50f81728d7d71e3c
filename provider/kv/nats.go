package kv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wasmatrix/wasmatrix/provider"
)

// natsStore is the driver that keeps everything in a JetStream stream.
//
// The stream is a log that is the same for all who write it. Each keeps an index
// of it, decides on it, and appends what follows on the condition that the log
// still ends where the decision was made; otherwise it takes up what others wrote
// and decides anew. So a write is one step with the look at the version and at
// the mark, whoever else writes.
type natsStore struct {
	conn     *nats.Conn
	js       jetstream.JetStream
	stream   jetstream.Stream
	created  time.Time // the stream
	subjects natsSubjects
	address  string // for messages
	timeout  time.Duration
	log      *slog.Logger
	commits  *committer
	wave     *natsWave     // of the commit under way
	keep     time.Duration // for how long a deleted or expired key stays in the stream
	behind   atomic.Bool   // the index may lack what others wrote

	link natsLink
	stop context.CancelFunc
	done sync.WaitGroup
}

// natsLink is the state of the connection.
type natsLink struct {
	mu      sync.Mutex
	index   *natsIndex    // nil while it may not be that of the stream
	problem error         // why there is none
	changed chan struct{} // closed when any of these changes
	broke   chan struct{} // closed when the connection breaks
	restart chan struct{} // holds a token when the follower is to begin anew
	kept    *natsIndex    // the last index, for after a reconnection
}

// How many keys of a listing are read at once, how many deletions are under way
// at once, and how many marks there may be.
const (
	natsReads   = 32
	natsDeletes = 16
	natsMarks   = 1 << 16
)

// natsKeep is how long a deleted or expired key stays in the stream, hidden. The
// server drops the message that it replaced lazily: after a crash an older value
// could be there again, if what hides it were gone.
const natsKeep = 10 * time.Minute

var errNatsBroke = errors.New("the connection was lost")

// oldest returns the n instances that are longest in the cluster.
func oldest(marks map[string]natsMark, n int) []string {
	ids := slices.Collect(maps.Keys(marks))
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(cmp.Compare(marks[a].Created, marks[b].Created), cmp.Compare(a, b))
	})
	return ids[:n]
}

// bound limits a request in time, and to the life of the connection: nothing will
// answer it on the next one.
func (s *natsStore) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, expire := context.WithTimeout(ctx, s.timeout)
	ctx, cancel := context.WithCancelCause(ctx)
	s.link.mu.Lock()
	broke := s.link.broke
	s.link.mu.Unlock()
	go func() {
		select {
		case <-broke:
			cancel(errNatsBroke)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil); expire() }
}

// ready returns the index once it is that of the stream. It fails at once while
// there is no connection.
func (s *natsStore) ready(ctx context.Context) (*natsIndex, error) {
	for {
		s.link.mu.Lock()
		index, problem, changed := s.link.index, s.link.problem, s.link.changed
		s.link.mu.Unlock()
		if index != nil {
			return index, nil
		}
		if problem != nil {
			return nil, problem
		}
		if !s.conn.IsConnected() {
			return nil, broken("nats at "+s.address, s.lastError(), false, false)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, s.failure(ctx, ctx.Err(), false, false)
		}
	}
}

func (s *natsStore) lastError() error {
	if err := s.conn.LastError(); err != nil {
		return err
	}
	return errNatsBroke
}

// admit refuses a call that cannot be let in any more.
func (s *natsStore) admit(index *natsIndex, call *provider.Call) error {
	if newest := index.seen(call.Instance); call.Instance != "" && call.Mark().Before(newest) {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	return call.Admit()
}

// enter lets a read in. The first one of a placement raises the mark before it.
func (s *natsStore) enter(ctx context.Context, call *provider.Call) (*natsIndex, error) {
	index, err := s.ready(ctx)
	if err != nil {
		return nil, err
	}
	if call.Instance != "" && index.seen(call.Instance).Before(call.Mark()) {
		kept := *call
		kept.Payload = nil
		if err := s.do(ctx, &write{call: kept, operation: opEnter}); err != nil {
			if e, ok := errors.AsType[*provider.Error](err); ok {
				delete(e.Details, detailOutcome) // it is a read
			}
			return nil, err
		}
		if index, err = s.ready(ctx); err != nil {
			return nil, err
		}
	}
	return index, s.admit(index, call)
}

func (s *natsStore) get(ctx context.Context, call provider.Call, key []byte, now int64, encode func([]byte, uint64) []byte) ([]byte, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	if _, err := s.enter(ctx, &call); err != nil {
		return nil, err
	}
	value, e, err := s.read(ctx, call.Bucket, string(key))
	if err != nil || e == nil || !e.alive(now) {
		return nil, err
	}
	return encode(value, e.sequence), nil
}

// read reads a key from the stream; nil when there is none.
func (s *natsStore) read(ctx context.Context, bucket, key string) ([]byte, *natsEntry, error) {
	for {
		m, err := s.stream.GetLastMsgForSubject(ctx, s.subjects.key(bucket, key))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, s.failure(ctx, err, true, false)
		}
		c, ok := s.subjects.read(m.Subject, m.Header)
		if !ok || c.entry == nil {
			return nil, nil, provider.Errorf(provider.ErrInternal, "key %q of bucket %q on nats at %s is not as it was written", key, bucket, s.address).
				With("bucket", bucket).NextStep("delete or overwrite the key; let nobody else publish to %s", s.subjects.all())
		}
		c.entry.sequence = m.Sequence
		if c.entry.tail == "" || c.entry.deleted {
			return m.Data, c.entry, nil
		}
		rest, err := s.stream.GetLastMsgForSubject(ctx, s.subjects.tail(c.entry.tail))
		switch {
		case err == nil:
			return append(slices.Clip(m.Data), rest.Data...), c.entry, nil
		case !errors.Is(err, jetstream.ErrMsgNotFound):
			return nil, nil, s.failure(ctx, err, true, false)
		}
		// The key was overwritten in between, unless its rest is lost.
		if again, err := s.stream.GetLastMsgForSubject(ctx, s.subjects.key(bucket, key)); err == nil && again.Sequence == m.Sequence {
			return nil, nil, provider.Errorf(provider.ErrInternal, "the rest of key %q of bucket %q on nats at %s is missing", key, bucket, s.address).
				With("bucket", bucket).NextStep("delete or overwrite the key")
		}
	}
}

// list walks the index, and reads the values from the stream.
func (s *natsStore) list(ctx context.Context, call provider.Call, now int64, p *page) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	index, err := s.enter(ctx, &call)
	if err != nil {
		return err
	}
	if err := s.catchUp(ctx, index); err != nil {
		return err
	}
	if err := s.admit(index, &call); err != nil {
		return err
	}
	for seek := p.seek(); ; {
		entries := index.next(call.Bucket, seek, min(natsReads, p.limit-p.entries+1), maxPageBytes)
		if len(entries) == 0 {
			return nil
		}
		values, found, err := s.values(ctx, entries, p, now)
		if err != nil {
			return err
		}
		for i, e := range entries {
			if !strings.HasPrefix(e.key, string(p.prefix)) {
				return nil
			}
			if found[i] == nil { // deleted meanwhile
				continue
			}
			if !p.visit([]byte(e.key), values[i], found[i].sequence, found[i].alive(now)) {
				return nil
			}
		}
		seek = append([]byte(entries[len(entries)-1].key), 0)
	}
}

// values reads the values of some keys, all at once, where the page wants them.
func (s *natsStore) values(ctx context.Context, entries []*natsEntry, p *page, now int64) ([][]byte, []*natsEntry, error) {
	values, found, failed := make([][]byte, len(entries)), slices.Clone(entries), make([]error, len(entries))
	if p.keysOnly {
		return values, found, nil
	}
	var wg sync.WaitGroup
	for i, e := range entries {
		if !e.alive(now) || !strings.HasPrefix(e.key, string(p.prefix)) {
			continue
		}
		wg.Go(func() {
			values[i], found[i], failed[i] = s.read(ctx, e.bucket, e.key)
			if found[i] != nil && found[i].deleted {
				found[i] = nil
			}
		})
	}
	wg.Wait()
	return values, found, errors.Join(failed...)
}

// catchUp waits until the index holds all that was acknowledged to anybody.
func (s *natsStore) catchUp(ctx context.Context, index *natsIndex) error {
	had, _ := index.position() // before asking: it grows
	info, err := s.stream.Info(ctx)
	if err != nil {
		return s.failure(ctx, err, true, false)
	}
	if !info.Created.Equal(s.created) || info.State.LastSeq < had {
		s.begin()
		return provider.Errorf(provider.ErrUnavailable, "the stream on nats at %s was set back; it is read anew", s.address).With("address", s.address)
	}
	if err := index.wait(ctx, info.State.LastSeq); err != nil {
		s.begin()
		return s.failure(ctx, err, true, false)
	}
	return nil
}

// sweep removes messages from the stream that are needed no more.
func (s *natsStore) sweep(ctx context.Context, now int64, limit int) (int, error) {
	s.link.mu.Lock()
	index := s.link.index
	s.link.mu.Unlock()
	if index == nil {
		return 0, nil // there is no connection, as calls tell
	}
	garbage := index.garbage(now, time.Now().Add(-s.keep).UnixNano(), limit)
	if len(garbage) == 0 {
		garbage = index.oldMarks(natsMarks)
	}
	ctx, cancel := s.bound(ctx)
	defer cancel()
	var failed atomic.Pointer[error]
	var removed atomic.Int64
	var wg sync.WaitGroup
	turns := make(chan struct{}, natsDeletes)
	for _, g := range garbage {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			if err := s.remove(ctx, g.sequence); err != nil {
				failed.Store(&err)
				return
			}
			g.forget()
			removed.Add(1)
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return int(removed.Load()), s.failure(ctx, *err, true, false)
	}
	return int(removed.Load()), nil
}

// remove removes a message, if it is still there.
func (s *natsStore) remove(ctx context.Context, sequence uint64) error {
	err := s.stream.DeleteMsg(ctx, sequence)
	if errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) {
		if _, err := s.stream.GetMsg(ctx, sequence); errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil
		}
	}
	return err
}

// failure gives an error of the client our shape.
func (s *natsStore) failure(ctx context.Context, err error, sent, writes bool) error {
	name := "nats at " + s.address
	api, refused := errors.AsType[*jetstream.APIError](err)
	own, ours := errors.AsType[*provider.Error](err)
	switch {
	case ours:
		return own
	case errors.Is(err, nats.ErrConnectionClosed):
		return provider.Errorf(provider.ErrUnavailable, "the key-value provider was stopped")
	case errors.Is(err, nats.ErrReconnectBufExceeded), errors.Is(err, nats.ErrConnectionReconnecting):
		return broken(name, s.lastError(), false, writes)
	case errors.Is(err, errNatsBroke), errors.Is(context.Cause(ctx), errNatsBroke), errors.Is(err, nats.ErrDisconnected):
		return broken(name, errNatsBroke, sent, writes)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, jetstream.ErrStreamNotFound):
		return provider.Errorf(provider.ErrUnavailable, "%s has no stream that answers; it may have no leader at the moment", name).
			With("address", s.address).NextStep("nats stream info").Because(err)
	case refused:
		return s.refusal(api)
	case errors.Is(err, nats.ErrMaxPayload):
		return provider.Errorf(provider.ErrUnavailable, "max_payload of %s is %d bytes now, which is too little", name, s.conn.MaxPayload()).
			NextStep("raise max_payload in the configuration of the NATS server").Because(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, nats.ErrTimeout):
		return ended(ctx, name, sent, writes).Because(err)
	default:
		return broken(name, err, sent, writes)
	}
}

// Codes of the JetStream API that the client has no names for.
const (
	natsInsufficient  jetstream.ErrorCode = 10023 // resources
	natsWrongLastID   jetstream.ErrorCode = 10070
	natsStoreFailed   jetstream.ErrorCode = 10077
	natsNoStorage     jetstream.ErrorCode = 10047
	natsNoMemory      jetstream.ErrorCode = 10028
	natsAccountLimits jetstream.ErrorCode = 10002
	natsNotAvailable  jetstream.ErrorCode = 10008
	natsStreamOffline jetstream.ErrorCode = 10118
	natsNoPeers       jetstream.ErrorCode = 10005
	natsNoReplicas    jetstream.ErrorCode = 10074
)

// refusal gives an error that the server answered with our shape.
func (s *natsStore) refusal(api *jetstream.APIError) error {
	kind, next := provider.ErrInternal, "look at the log of the NATS server"
	switch api.ErrorCode {
	case natsInsufficient, natsStoreFailed, natsNoStorage, natsNoMemory, natsAccountLimits:
		kind, next = provider.ErrExhausted, "give JetStream more room (max_file_store, max_memory_store, the account's limits), or delete keys"
	case natsNotAvailable, natsStreamOffline, jetstream.JSErrCodeJetStreamNotEnabled:
		kind, next = provider.ErrUnavailable, "nats server report jetstream"
	case natsNoPeers, natsNoReplicas:
		kind, next = provider.ErrInvalid, "choose the provider's replicas after the size of the NATS cluster"
	default:
	}
	return provider.Errorf(kind, "nats at %s refused: %s", s.address, api.Description).With("address", s.address).
		With("nats_code", fmt.Sprint(api.ErrorCode)).NextStep("%s", next).Because(api)
}

func (s *natsStore) close() error {
	s.commits.close()
	s.stop()
	s.done.Wait()
	s.conn.Close()
	return nil
}
