package kv_test

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	bolt "go.etcd.io/bbolt"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
)

// benchPort returns the port of an instance on the node of a provider.
func benchPort(b *testing.B, cfg provider.Config) *provider.Port {
	b.Helper()
	kind := kv.New(kv.Options{})
	host := provider.NewHost(slog.New(slog.DiscardHandler), kind)
	b.Cleanup(func() { _ = host.Close(context.Background()) })
	dir := provider.NewDirectory("n")
	router, err := provider.NewRouter(provider.RouterConfig{Directory: dir, Host: host, Kinds: []provider.Kind{kind}})
	if err != nil {
		b.Fatal(err)
	}
	allowed, err := permission.ParseSet([]string{"kv:read", "kv:write"})
	if err != nil {
		b.Fatal(err)
	}
	dir.Replace(provider.Records{
		Instances:   []provider.InstanceRecord{{ID: "i", Name: "w", Node: "n", NodeEpoch: 1, Generation: 1, Created: 5}},
		Providers:   []provider.ProviderRecord{{ID: "kv", Type: "kv", Node: "n", Generation: 1, Running: true}},
		Assignments: []provider.Assignment{{Instance: "i", Provider: "kv", Permissions: allowed, Bucket: "b"}},
	})
	cfg.ID = "kv"
	if err := host.Start(b.Context(), "kv", cfg); err != nil {
		b.Fatal(err)
	}
	return router.Port("i", 1, 1)
}

// measure runs one call after the other and reports what they took.
func measure(b *testing.B, call func() error) {
	b.Helper()
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		if err := call(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	for name, part := range map[string]int{"p50-ns": 50, "p99-ns": 99} {
		b.ReportMetric(float64(took[(len(took)-1)*part/100].Nanoseconds()), name)
	}
}

// measurePort measures get and set of 1 KiB through a port, one call at a time.
func measurePort(b *testing.B, cfg provider.Config) {
	b.Helper()
	port := benchPort(b, cfg)
	payloads := map[string][]byte{
		"set": encoded(b, &pb.KvSetRequest{Key: []byte("k"), Value: bytes.Repeat([]byte("x"), 1024)}),
		"get": encoded(b, &pb.KvGetRequest{Key: []byte("k")}),
	}
	for _, operation := range []string{"set", "get"} {
		b.Run("port-"+operation, func(b *testing.B) {
			measure(b, func() error {
				_, err := port.Call(b.Context(), "kv", operation, payloads[operation])
				return err
			})
		})
	}
}

// BenchmarkDrivers measures each driver through a port, beside its bare client on
// the same server in the same run.
func BenchmarkDrivers(b *testing.B) {
	value := bytes.Repeat([]byte("x"), 1024)
	b.Run("memory", func(b *testing.B) { measurePort(b, provider.Config{Driver: "memory"}) })
	b.Run("bbolt", func(b *testing.B) {
		measurePort(b, provider.Config{Driver: "bbolt", Dir: b.TempDir()})
		db, err := bolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer db.Close()
		bucket := []byte("b")
		b.Run("bare-set", func(b *testing.B) {
			measure(b, func() error {
				return db.Update(func(tx *bolt.Tx) error {
					t, err := tx.CreateBucketIfNotExists(bucket)
					if err != nil {
						return err
					}
					return t.Put([]byte("k"), value)
				})
			})
		})
		b.Run("bare-get", func(b *testing.B) {
			measure(b, func() error {
				return db.View(func(tx *bolt.Tx) error {
					_ = bytes.Clone(tx.Bucket(bucket).Get([]byte("k")))
					return nil
				})
			})
		})
	})
	b.Run("redis", func(b *testing.B) {
		s := redisServer(b, "--appendfsync", "everysec")
		measurePort(b, provider.Config{Driver: "redis", Settings: map[string]string{"url": "redis://" + s.address}})
		c := redisClient(b, s)
		b.Run("bare-set", func(b *testing.B) {
			measure(b, func() error { return c.Set(b.Context(), "k", value, 0).Err() })
		})
		b.Run("bare-get", func(b *testing.B) {
			measure(b, func() error { return c.Get(b.Context(), "k").Err() })
		})
	})
	b.Run("nats", func(b *testing.B) {
		s := natsServer(b)
		measurePort(b, provider.Config{Driver: "nats", Settings: map[string]string{"url": "nats://" + s.address}})
		bucket := bareNats(b, s)
		b.Run("bare-set", func(b *testing.B) {
			measure(b, func() error {
				_, err := bucket.Put(b.Context(), "k", value)
				return err
			})
		})
		b.Run("bare-get", func(b *testing.B) {
			measure(b, func() error {
				_, err := bucket.Get(b.Context(), "k")
				return err
			})
		})
	})
}

// bareNats returns a key-value bucket of the NATS client itself.
func bareNats(b *testing.B, s *process) jetstream.KeyValue {
	b.Helper()
	conn, err := nats.Connect("nats://" + s.address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		b.Fatal(err)
	}
	bucket, err := js.CreateKeyValue(b.Context(), jetstream.KeyValueConfig{Bucket: "bare"})
	if err != nil {
		b.Fatal(err)
	}
	return bucket
}
