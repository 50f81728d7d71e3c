package kv

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// sweepEvery is how often expired keys are removed, sweepBatch how many at once.
const (
	sweepEvery = time.Second
	sweepBatch = 1000
)

// store is what a driver does. Times are in nanoseconds since 1970. Its errors
// wrap the sentinels of package provider. A call is admitted where its effect
// happens: by Call.Admit, and by the marks that the driver keeps.
type store interface {
	// get returns what encode makes of a key's value and version, or nil when
	// the key does not exist. encode must not keep the value.
	get(ctx context.Context, call provider.Call, key []byte, now int64, encode func(value []byte, version uint64) []byte) ([]byte, error)
	// write carries w out and fills in its result. It may still read w's slices
	// when it returns an error, so they must not be the caller's.
	write(ctx context.Context, w *write) error
	// list lets p visit the keys of the call's bucket in order.
	list(ctx context.Context, call provider.Call, now int64, p *page) error
	// sweep removes up to limit expired keys and returns how many it removed.
	sweep(ctx context.Context, now int64, limit int) (int, error)
	// close is called once, when no call is under way.
	close() error
}

// write is one set, cas or delete, and its result.
type write struct {
	call      provider.Call // without the payload
	operation string
	bucket    string
	key       []byte
	value     []byte
	now       int64
	expires   int64 // 0 is never
	expected  uint64

	done    bool   // set and cas: it was stored; delete: the key existed
	version uint64 // set and cas: the version now
	refused error  // the call was not admitted
}

// put decides on a set or cas of a key that has the given version now, 0 for
// none, and reports whether it is to be stored.
func (w *write) put(current uint64) bool {
	if w.operation == opCas && current != w.expected {
		w.version = current
		return false
	}
	w.done = true
	return true
}

// service is a provider over a store.
type service struct {
	store store
	now   func() time.Time
	log   *slog.Logger

	mu     sync.RWMutex
	closed bool
	calls  sync.WaitGroup // Add only under mu while not closed
	stop   context.CancelFunc
	swept  chan struct{} // closed when the sweeper has ended
	once   sync.Once
	err    error // of the first Close
}

func newService(s store, now func() time.Time, log *slog.Logger) *service {
	ctx, stop := context.WithCancel(context.Background()) //nolint:forbidigo // ends with Close, not with the call that opened it
	svc := &service{store: s, now: now, log: log, stop: stop, swept: make(chan struct{})}
	go func() {
		defer close(svc.swept)
		svc.sweep(ctx)
	}()
	return svc
}

// Invoke serves one call.
func (s *service) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	s.mu.RLock()
	closed := s.closed
	if !closed {
		s.calls.Add(1)
	}
	s.mu.RUnlock()
	if closed {
		return nil, provider.Errorf(provider.ErrUnavailable, "the key-value provider was stopped")
	}
	defer s.calls.Done()
	r, err := decode(call.Operation, call.Payload)
	if err == nil {
		err = r.check(call.Operation)
	}
	if err == nil {
		err = checkBucket(call.Bucket)
	}
	if err == nil && ctx.Err() != nil {
		err = provider.FromContext(ctx)
	}
	if err != nil {
		return nil, err
	}
	now := s.now().UnixNano()
	switch call.Operation {
	case opGet:
		return s.store.get(ctx, call, r.key, now, encodeFound)
	case opList:
		return s.list(ctx, call, &r, now)
	default:
		return s.write(ctx, &call, &r, now)
	}
}

func checkBucket(bucket string) error {
	if bucket == "" {
		return provider.Errorf(provider.ErrInvalid, "the call names no bucket").NextStep("name one with --bucket")
	}
	if len(bucket) > MaxBucket {
		return provider.Errorf(provider.ErrInvalid, "the bucket's name has %d bytes, the most is %d", len(bucket), MaxBucket)
	}
	return nil
}

func (s *service) list(ctx context.Context, call provider.Call, r *request, now int64) ([]byte, error) {
	p := page{prefix: r.key, cursor: r.cursor, limit: int(r.limit), keysOnly: r.keysOnly}
	if p.limit == 0 {
		p.limit = DefaultListLimit
	}
	if err := s.store.list(ctx, call, now, &p); err != nil {
		return nil, err
	}
	return p.encode(), nil
}

func (s *service) write(ctx context.Context, call *provider.Call, r *request, now int64) ([]byte, error) {
	// One copy for both: the payload is only valid during the call, and a write
	// may be under way when its caller has stopped waiting.
	kept := make([]byte, len(r.key)+len(r.value))
	copy(kept, r.key)
	copy(kept[len(r.key):], r.value)
	w := &write{
		call: *call, operation: call.Operation, bucket: call.Bucket, now: now, expected: r.expected,
		key: kept[:len(r.key):len(r.key)], value: kept[len(r.key):],
	}
	w.call.Payload = nil
	if r.ttl > 0 {
		w.expires = now + int64(r.ttl)*int64(time.Millisecond) //nolint:gosec // at most MaxTTL
	}
	if err := s.store.write(ctx, w); err != nil {
		return nil, err
	}
	switch call.Operation {
	case opDelete:
		return encodeExisted(w.done), nil
	case opCas:
		return encodeCas(w.done, w.version), nil
	default:
		return encodeVersion(w.version), nil
	}
}

// sweep removes expired keys until ctx ends.
func (s *service) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for ctx.Err() == nil {
			n, err := s.store.sweep(ctx, s.now().UnixNano(), sweepBatch)
			if err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "expired keys could not be removed", "error", err)
			}
			if err != nil || n < sweepBatch {
				break
			}
		}
	}
}

// Close waits for calls under way, ends the sweeper and closes the store. It may
// be called again and then returns the same.
func (s *service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.once.Do(func() {
		s.calls.Wait()
		s.stop()
		<-s.swept
		s.err = s.store.close()
	})
	return s.err
}
