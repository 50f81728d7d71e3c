package kv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	bolt "go.etcd.io/bbolt"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func nothing(txn) error { return nil }

// Writes that arrive while a commit is under way share the next one.
func TestWritesDuringACommitShareTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var batches []int
		release := make(chan struct{})
		c := newCommitter(func(batch []*job) {
			batches = append(batches, len(batch))
			<-release
		})
		go c.run()
		var wg sync.WaitGroup
		write := func() {
			wg.Go(func() {
				if err := c.do(t.Context(), 1, nothing); err != nil {
					t.Error(err)
				}
			})
		}
		write()
		synctest.Wait() // an idle committer does not wait for more
		if fmt.Sprint(batches) != "[1]" {
			t.Fatalf("batches %v, want the first write at once", batches)
		}
		for range 100 {
			write()
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		c.close()
		if fmt.Sprint(batches) != "[1 100]" {
			t.Errorf("batches %v, want [1 100]", batches)
		}
	})
}

func TestWriteThatWaitsIsWithdrawnAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var committed []*job
		release := make(chan struct{})
		c := newCommitter(func(batch []*job) {
			committed = append(committed, batch...)
			<-release
		})
		go c.run()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		var underWay, waiting error
		wg.Go(func() { underWay = c.do(short, 1, nothing) })
		synctest.Wait()
		wg.Go(func() { waiting = c.do(short, 1, nothing) })
		wg.Wait()
		var e *provider.Error
		if !errors.As(underWay, &e) || !errors.Is(e, provider.ErrTimeout) || e.Details["outcome"] != "unknown" {
			t.Errorf("a write under way: %v, want ErrTimeout with an unknown outcome", underWay)
		}
		if !errors.As(waiting, &e) || !errors.Is(e, provider.ErrTimeout) || e.Details["outcome"] != "" {
			t.Errorf("a write that waited: %v, want ErrTimeout", waiting)
		}
		close(release)
		c.close()
		if len(committed) != 1 {
			t.Errorf("%d writes committed, want 1: the other was withdrawn", len(committed))
		}
		if err := c.do(t.Context(), 1, nothing); !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("after close: %v, want ErrUnavailable", err)
		}
	})
}

func TestWaitingWritesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		c := newCommitter(func([]*job) { <-release })
		go c.run()
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.do(t.Context(), 1, nothing) })
		synctest.Wait()
		for range maxWaiting / MaxValue {
			wg.Go(func() {
				if err := c.do(t.Context(), MaxValue, nothing); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if err := c.do(t.Context(), 1, nothing); !errors.Is(err, provider.ErrExhausted) {
			t.Errorf("one write too many: %v, want ErrExhausted", err)
		}
		close(release)
		wg.Wait()
		c.close()
	})
}

// count returns the number of records that are really in the file.
func (s *boltStore) count(t *testing.T) (data, expiry int) {
	t.Helper()
	err := s.db.View(func(tx *bolt.Tx) error {
		data, expiry = tx.Bucket(dataBucket()).Stats().KeyN, tx.Bucket(expiryBucket()).Stats().KeyN
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return data, expiry
}

func TestSweepRemovesExpiredKeysOnly(t *testing.T) {
	bbolt, err := openBolt(boltOptions{dir: t.TempDir(), verify: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	mem := newMemory(1 << 20)
	for name, s := range map[string]store{"bbolt": bbolt, "memory": mem} {
		t.Run(name, func(t *testing.T) {
			set := func(key string, expires int64) {
				t.Helper()
				w := &write{operation: opSet, bucket: "b", key: []byte(key), value: []byte("v"), now: 1, expires: expires}
				if err := s.write(t.Context(), w); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 10 {
				set(fmt.Sprint("short", i), 100)
			}
			set("long", 1000)
			set("never", 0)
			set("renewed", 100)
			set("renewed", 1000)
			set("kept", 100)
			set("kept", 0)
			for _, step := range []struct {
				now  int64
				want int
			}{{99, 0}, {100, 4}, {100, 4}, {100, 2}, {100, 0}, {1000, 2}, {1 << 40, 0}} {
				n, err := s.sweep(t.Context(), step.now, 4)
				if err != nil || n != step.want {
					t.Errorf("sweep at %d removed %d, %v; want %d", step.now, n, err, step.want)
				}
			}
			for key, want := range map[string]bool{"short1": false, "long": false, "never": true, "renewed": false, "kept": true} {
				got, err := s.get(t.Context(), provider.Call{Bucket: "b"}, []byte(key), 1, encodeFound)
				if err != nil || (got != nil) != want {
					t.Errorf("%s is there: %v, %v; want %v", key, got != nil, err, want)
				}
			}
		})
	}
	if data, expiry := bbolt.count(t); data != 2 || expiry != 0 {
		t.Errorf("the file holds %d records and %d expiries, want 2 and 0", data, expiry)
	}
	if n := len(mem.buckets["b"].items); n != 2 || mem.expiry.Len() != 0 {
		t.Errorf("memory holds %d items and %d expiries, want 2 and 0", n, mem.expiry.Len())
	}
	if err := errors.Join(bbolt.close(), mem.close()); err != nil {
		t.Error(err)
	}
}

func TestExpiredKeysVanishFromMemoryByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := newMemory(1 << 20)
		svc := newService(mem, time.Now, New(Options{}).log)
		payload := marshal(t, &pb.KvSetRequest{Key: []byte("k"), Value: []byte("v"), TtlMs: 1500})
		if _, err := svc.Invoke(t.Context(), provider.Call{Bucket: "b", Operation: opSet, Payload: payload}); err != nil {
			t.Fatal(err)
		}
		used := func() int64 {
			mem.mu.RLock()
			defer mem.mu.RUnlock()
			return mem.used
		}
		time.Sleep(1200 * time.Millisecond) // virtual
		synctest.Wait()
		if used() == 0 {
			t.Error("swept before its time")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if used() != 0 {
			t.Error("not swept within a second of its expiry")
		}
		if err := svc.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Several writers over a slow disk: throughput must come from shared commits.
func BenchmarkBboltSync(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprint("writers=", writers), func(b *testing.B) {
			c := mustOpen(b, b.TempDir(), nil)
			value := bytes.Repeat([]byte("x"), 100)
			b.SetParallelism(writers)
			b.RunParallel(func(pbb *testing.PB) {
				for i := 0; pbb.Next(); i++ {
					if err := c.set(fmt.Sprint(i%1000), value); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// slowStore is a store whose reads wait.
type slowStore struct {
	store
	entered, release chan struct{}
	reading          atomic.Int32
}

func (s *slowStore) get(context.Context, provider.Call, []byte, int64, func([]byte, uint64) []byte) ([]byte, error) {
	s.reading.Add(1)
	defer s.reading.Add(-1)
	close(s.entered)
	<-s.release
	return nil, nil
}

func (s *slowStore) close() error {
	if n := s.reading.Load(); n != 0 {
		return fmt.Errorf("closed under %d calls", n)
	}
	return nil
}

func TestCloseWaitsForCallsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStore{entered: make(chan struct{}), release: make(chan struct{})}
		svc := newService(s, time.Now, New(Options{}).log)
		payload := marshal(t, &pb.KvGetRequest{Key: []byte("k")})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := svc.Invoke(t.Context(), provider.Call{Bucket: "b", Operation: opGet, Payload: payload}); err != nil {
				t.Error(err)
			}
		})
		<-s.entered
		wg.Go(func() {
			if err := svc.Close(); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if _, err := svc.Invoke(t.Context(), provider.Call{Bucket: "b", Operation: opGet, Payload: payload}); !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("a call after Close began: %v, want ErrUnavailable", err)
		}
		close(s.release)
		wg.Wait()
	})
}
