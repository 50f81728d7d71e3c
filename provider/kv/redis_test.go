package kv_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

func TestRedisConforms(t *testing.T) {
	s := redisServer(t, "--appendonly", "no")
	var n atomic.Int64
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{ID: "kv", Driver: "redis", Settings: map[string]string{
			"url": "redis://" + s.address, "namespace": fmt.Sprintf("test-%d", n.Add(1)), "pool_size": "8",
		}})
	})
}

func redisConfig(s *process, more map[string]string) provider.Config {
	settings := map[string]string{"url": "redis://" + s.address}
	maps.Copy(settings, more)
	return provider.Config{ID: "kv", Driver: "redis", Settings: settings}
}

// One bucket's keys are in one slot of a cluster, also for a script that lists.
func TestRedisClusterConforms(t *testing.T) {
	s := redisServer(t, "--appendonly", "no", "--cluster-enabled", "yes")
	c := redisClient(t, s)
	if err := c.ClusterAddSlotsRange(t.Context(), 0, 16383).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, "the cluster is up", func() bool { return strings.Contains(c.ClusterInfo(t.Context()).Val(), "cluster_state:ok") })
	var n atomic.Int64
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		if strings.HasSuffix(t.Name(), "/a_random_history_agrees_with_a_model") {
			t.Skip("TestRedisConforms runs it")
		}
		return open(t, now, redisConfig(s, map[string]string{"cluster": "true", "namespace": fmt.Sprintf("test-%d", n.Add(1))}))
	})
}

func TestRedisRemovesExpiredKeys(t *testing.T) {
	t.Parallel()
	s := redisServer(t, "--appendonly", "no")
	c := redisClient(t, s)
	var nanos atomic.Int64
	nanos.Store(time.Now().UnixNano())
	p := open(t, func() time.Time { return time.Unix(0, nanos.Load()) }, redisConfig(s, nil))
	defer p.Close()
	for i := range 3 {
		set := &pb.KvSetRequest{Key: []byte{byte(i)}, Value: []byte("v"), TtlMs: uint64(i) * 1000} //nolint:gosec // small
		if err := invoke(t.Context(), p, "set", set, &pb.KvSetResponse{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Del(t.Context(), "wasmatrix:buckets").Err(); err != nil { // as a server that lost its latest writes
		t.Fatal(err)
	}
	nanos.Add(int64(time.Minute))
	until(t, "two keys are removed from the server", func() bool { return c.HLen(t.Context(), "wasmatrix:{1:b}:data").Val() == 1 })
	for key, want := range map[string]int64{"meta": 1, "index": 1, "expiry": 0} {
		name := "wasmatrix:{1:b}:" + key
		if got := c.HLen(t.Context(), name).Val() + c.ZCard(t.Context(), name).Val(); got != want {
			t.Errorf("%s has %d members, want %d", name, got, want)
		}
	}
}

// A server that lost everything gives no version again.
func TestRedisVersionsGrowOnAServerThatForgot(t *testing.T) {
	s := redisServer(t, "--appendonly", "no")
	p := open(t, nil, redisConfig(s, nil))
	defer p.Close()
	last := uint64(0)
	for range 5 {
		var out pb.KvSetResponse
		if err := invoke(t.Context(), p, "set", &pb.KvSetRequest{Key: []byte("k")}, &out); err != nil {
			t.Fatal(err)
		}
		if out.GetVersion() <= last {
			t.Errorf("version %d after %d", out.GetVersion(), last)
		}
		last = out.GetVersion()
		if err := redisClient(t, s).FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRedisFull(t *testing.T) {
	s := redisServer(t, "--appendonly", "no", "--maxmemory", "16mb")
	p := open(t, nil, redisConfig(s, nil))
	defer p.Close()
	value := bytes.Repeat([]byte("x"), 1<<20)
	n := 0
	for {
		err := invoke(t.Context(), p, "set", &pb.KvSetRequest{Key: []byte{byte(n)}, Value: value}, &pb.KvSetResponse{})
		if errors.Is(err, provider.ErrExhausted) {
			break
		}
		if n++; err != nil || n > 16 {
			t.Fatalf("write %d to a full server: %v, want ErrExhausted", n, err)
		}
	}
	for i := range n {
		var got pb.KvGetResponse
		if err := invoke(t.Context(), p, "get", &pb.KvGetRequest{Key: []byte{byte(i)}}, &got); err != nil || len(got.GetValue()) != len(value) {
			t.Errorf("key %d of a full server: %v", i, err)
		}
	}
	// Also for who was never seen before: the mark must not stand in the way.
	payload, err := proto.Marshal(&pb.KvDeleteRequest{Key: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Invoke(t.Context(), provider.Call{Instance: "new", Generation: 1, Bucket: "b", Operation: "delete", Payload: payload}); err != nil {
		t.Errorf("delete on a full server: %v", err)
	}
	if err := invoke(t.Context(), p, "set", &pb.KvSetRequest{Key: []byte("small")}, &pb.KvSetResponse{}); err != nil {
		t.Errorf("write after a delete: %v", err)
	}
}
