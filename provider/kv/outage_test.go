package kv_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// invoke makes one call of generation 1 of instance i.
func invoke(ctx context.Context, p provider.Provider, operation string, request, response proto.Message) error {
	payload, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	answer, err := p.Invoke(ctx, provider.Call{
		Instance: "i", Generation: 1, Created: 5, Bucket: "b", Operation: operation, Payload: payload,
	})
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer, response)
}

// callTime is the deadline of a call of these tests.
const callTime = 3 * time.Second

// load writes and reads while a server comes and goes, and remembers what was
// acknowledged and what may have happened.
type load struct {
	t       *testing.T
	p       provider.Provider
	ok      atomic.Int64 // calls since the counter was last cleared
	failed  atomic.Int64
	slowest atomic.Int64
}

// call makes one call and checks how it fails.
func (l *load) call(operation string, request, response proto.Message) (done, unknown bool) {
	ctx, cancel := context.WithTimeout(l.t.Context(), callTime)
	defer cancel()
	begin := time.Now()
	err := invoke(ctx, l.p, operation, request, response)
	took := time.Since(begin)
	if took > callTime+time.Second {
		l.t.Errorf("%s took %v, its deadline was after %v", operation, took, callTime)
	}
	if l.t.Context().Err() != nil {
		return false, true
	}
	if err == nil {
		l.ok.Add(1)
		return true, false
	}
	l.failed.Add(1)
	l.slowest.Store(max(l.slowest.Load(), int64(took)))
	var e *provider.Error
	if !errors.As(err, &e) {
		l.t.Errorf("%s failed without a code: %v", operation, err)
		return false, true
	}
	unknown = e.Details[provider.DetailOutcome] == provider.OutcomeUnknown
	switch {
	case !errors.Is(e, provider.ErrCommunication) && !errors.Is(e, provider.ErrUnavailable) && !errors.Is(e, provider.ErrTimeout):
		l.t.Errorf("%s failed with %v: %v", operation, e.Kind, e)
	case unknown && operation == "get":
		l.t.Errorf("a read failed with an unknown outcome: %v", e)
	case unknown && errors.Is(e, provider.ErrUnavailable):
		l.t.Errorf("the server was not there, and the outcome is unknown: %v", e)
	}
	return false, unknown
}

// count counts one key up by compare-and-set, which shows every write that is
// lost, made twice, or acknowledged without being made.
func (l *load) count(key string, until <-chan struct{}) {
	var at, version uint64 // as of the last call that was certain
	certain := true
	for {
		select {
		case <-until:
			return
		default:
		}
		if !certain {
			var got pb.KvGetResponse
			if done, _ := l.call("get", &pb.KvGetRequest{Key: []byte(key)}, &got); !done {
				continue
			}
			now := uint64(0)
			if got.GetFound() {
				now = binary.BigEndian.Uint64(got.GetValue())
			}
			if now != at && now != at+1 {
				l.t.Errorf("%s is at %d, and was acknowledged at %d", key, now, at)
				return
			}
			if now != at && got.GetVersion() <= version {
				l.t.Errorf("%s has version %d after %d", key, got.GetVersion(), version)
			}
			at, version, certain = now, got.GetVersion(), true
		}
		request := &pb.KvCasRequest{Key: []byte(key), ExpectedVersion: version, Value: binary.BigEndian.AppendUint64(nil, at+1)}
		var out pb.KvCasResponse
		done, unknown := l.call("cas", request, &out)
		switch {
		case done && !out.GetSwapped():
			l.t.Errorf("%s: cas over version %d found %d at %d; a failure with a known outcome had an effect, or a write was lost", key, version, out.GetVersion(), at)
			return
		case done:
			at, version = at+1, out.GetVersion()
		case unknown:
			certain = false
		}
	}
}

// until waits for a condition.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	limit := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-limit:
			t.Fatalf("waited in vain: %s", what)
		case <-tick.C:
		}
	}
}

// surviveOutages kills a server, starts it again, and holds it, under load.
func surviveOutages(t *testing.T, s *process, p provider.Provider) {
	l := &load{t: t, p: p}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() { l.count(fmt.Sprint("counter-", i), stop) })
	}
	some := func(what string, n *atomic.Int64) {
		t.Helper()
		n.Store(0)
		until(t, what, func() bool { return n.Load() >= 20 })
	}
	some("calls before anything happens", &l.ok)
	for range 3 {
		s.kill()
		some("calls fail while the server is down", &l.failed)
		s.start()
		back := time.Now()
		some("calls work after the server came back", &l.ok)
		t.Logf("20 calls worked %v after the server was ready", time.Since(back).Round(time.Millisecond))
	}
	s.signal(syscall.SIGSTOP)
	l.slowest.Store(0)
	some("calls fail while the server stands still", &l.failed)
	s.signal(syscall.SIGCONT)
	some("calls work after the server went on", &l.ok)
	close(stop)
	wg.Wait()
}

func TestRedisKilledAndStartedUnderLoad(t *testing.T) {
	t.Parallel()
	s := redisServer(t)
	p := open(t, nil, provider.Config{ID: "kv", Driver: "redis", Settings: map[string]string{"url": "redis://" + s.address, "timeout": "500ms"}})
	surviveOutages(t, s, p)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestNatsKilledAndStartedUnderLoad(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	p := open(t, nil, provider.Config{ID: "kv", Driver: "nats", Settings: map[string]string{"url": "nats://" + s.address, "timeout": "500ms"}})
	surviveOutages(t, s, p)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
