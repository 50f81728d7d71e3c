package outbound

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/provider"
)

// service is a provider of outbound HTTP.
type service struct {
	id        string
	kind      *Kind
	settings  settings
	transport *http.Transport
	pool      pool

	mu     sync.Mutex
	closed bool
	total  int
	each   map[string]int // calls under way by caller
	fence  provider.Fence
	calls  sync.WaitGroup // Add only under mu while not closed

	stop   context.CancelFunc
	reaped chan struct{} // closed when the reaper has ended
	once   sync.Once
}

func newService(id string, k *Kind, s settings) *service {
	ctx, stop := context.WithCancel(context.Background()) //nolint:forbidigo // ends with Close, not with the call that opened it
	svc := &service{
		id: id, kind: k, settings: s, transport: newTransport(k.dial, s), pool: pool{conns: map[connKey][]*conn{}},
		each: map[string]int{}, stop: stop, reaped: make(chan struct{}),
	}
	go func() {
		defer close(svc.reaped)
		svc.reap(ctx)
	}()
	return svc
}

// Invoke carries out one request.
func (s *service) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	r, err := decode(call.Operation, call.Payload)
	if err != nil {
		return nil, err
	}
	to, err := r.check()
	if err != nil {
		return nil, err
	}
	who := &caller{instance: call.Instance, name: call.Name, provider: s.id, set: call.Permissions}
	if err := s.enter(who); err != nil {
		return nil, err
	}
	defer s.leave(who)
	if err := who.mayRequest(to); err != nil {
		s.kind.metrics.requests.WithLabelValues(s.id, outcome(0, err)).Inc()
		return nil, err
	}
	timeout := DefaultTimeout
	if r.timeout > 0 {
		timeout = time.Duration(r.timeout) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	x := newExchange(s, &call, who, r, to)
	answer, err := x.run(ctx, !r.noRedirects)
	s.kind.metrics.requests.WithLabelValues(s.id, outcome(answer.GetStatus(), err)).Inc()
	if err != nil {
		return nil, x.complete(err)
	}
	b, err := proto.Marshal(answer)
	if err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "the answer cannot be encoded: %s", err).Because(err)
	}
	return b, nil
}

// enter counts a call, and refuses it when too many are under way.
func (s *service) enter(who *caller) error {
	key := who.key()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return provider.Errorf(provider.ErrUnavailable, "the http provider %s was stopped", s.id).With("provider", s.id)
	case s.each[key] >= s.settings.maxEach:
		return s.tooMany(who, setMaxEach, s.settings.maxEach)
	case s.total >= s.settings.maxInFlight:
		return s.tooMany(who, setMaxInFlight, s.settings.maxInFlight)
	}
	s.calls.Add(1)
	s.kind.metrics.inFlight.WithLabelValues(s.id).Inc()
	s.total++
	s.each[key]++
	return nil
}

func (s *service) tooMany(who *caller, setting string, limit int) error {
	of := "provider " + s.id
	if setting == setMaxEach {
		of = who.name
	}
	return provider.Errorf(provider.ErrExhausted, "%s has %d requests under way, the most is %d", of, limit, limit).
		With("provider", s.id).With("setting", setting).With("limit", strconv.Itoa(limit)).
		NextStep("send it again when others have ended, or raise %s of provider %s", setting, s.id)
}

func (s *service) leave(who *caller) {
	key := who.key()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.each[key]--; s.each[key] == 0 {
		delete(s.each, key)
	}
	s.kind.metrics.inFlight.WithLabelValues(s.id).Dec()
	s.calls.Done()
}

// admit lets a request be written: the caller may still have an effect, and no newer
// generation of it was let in.
func (s *service) admit(call *provider.Call) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := call.Admit(); err != nil {
		return err
	}
	if call.Instance == "" {
		return nil
	}
	if newest := s.fence.Seen(call.Instance); call.Mark().Before(newest) {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	s.fence.Raise(call.Instance, call.Mark())
	return nil
}

// reap closes connections that nobody uses until ctx ends.
func (s *service) reap(ctx context.Context) {
	ticker := time.NewTicker(reapEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			s.pool.reap(now)
		}
	}
}

// Close waits for calls under way and closes every connection. It may be called again.
func (s *service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.once.Do(func() {
		s.calls.Wait()
		s.stop()
		<-s.reaped
		s.pool.close()
	})
	return nil
}
