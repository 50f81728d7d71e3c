package messaging

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const benchPayload = 1 << 10

// silent is a node whose guests acknowledge everything at once.
type silent struct {
	*desk

	taken atomic.Int64
}

func (s *silent) Deliver(context.Context, provider.Subscription, []byte) ([]byte, error) {
	s.taken.Add(1)
	return nil, nil
}

// guestPort is a guest's way to an embedded provider, with every check on it.
func guestPort(b *testing.B, node provider.Messages, settings map[string]string) *provider.Port {
	b.Helper()
	kind, err := New(Options{})
	if err != nil {
		b.Fatal(err)
	}
	permissions, err := permission.ParseSet([]string{"msg:publish:bench.>", "msg:subscribe:bench.>"})
	if err != nil {
		b.Fatal(err)
	}
	d := provider.NewDirectory(testNode)
	d.Replace(provider.Records{
		Instances:   []provider.InstanceRecord{{ID: "s-1", Name: "s", Node: testNode, Generation: 1, Created: 1}},
		Providers:   []provider.ProviderRecord{{ID: testProvider, Type: "messaging", Node: testNode, Generation: 1, Running: true}},
		Assignments: []provider.Assignment{{Instance: "s-1", Provider: testProvider, Permissions: permissions}},
	})
	host := provider.NewHost(slog.New(slog.DiscardHandler), kind)
	router, err := provider.NewRouter(provider.RouterConfig{Directory: d, Host: host, Kinds: []provider.Kind{kind}})
	if err != nil {
		b.Fatal(err)
	}
	cfg := provider.Config{ID: testProvider, Node: testNode, Messages: node, Dir: b.TempDir(), Settings: settings}
	if err := host.Start(b.Context(), "messaging", cfg); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = host.Close(context.Background()) })
	return router.Port("s-1", 1, 0)
}

// client is a connection of nats.go to an embedded server of its own.
func client(b *testing.B) *nats.Conn {
	b.Helper()
	s, err := startServer(&options{}, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	nc, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		nc.Close()
		stopServer(s)
	})
	return nc
}

func perSecond(b *testing.B) {
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
	b.SetBytes(benchPayload)
}

func encoded(b *testing.B, req proto.Message) []byte {
	payload, err := proto.Marshal(req)
	if err != nil {
		b.Fatal(err)
	}
	return payload
}

// BenchmarkPublish compares a guest's publish, all checks included, with the bare client's.
func BenchmarkPublish(b *testing.B) {
	b.Run("client", func(b *testing.B) {
		nc, payload := client(b), make([]byte, benchPayload)
		for b.Loop() {
			if err := nc.Publish("bench.x", payload); err != nil {
				b.Fatal(err)
			}
		}
		if err := nc.Flush(); err != nil {
			b.Fatal(err)
		}
		perSecond(b)
	})
	b.Run("guest", func(b *testing.B) {
		port := guestPort(b, nil, nil)
		payload := encoded(b, &pb.MsgPublishRequest{Subject: "bench.x", Payload: make([]byte, benchPayload)})
		for b.Loop() {
			if _, err := port.Call(b.Context(), permission.Messaging, opPublish, payload); err != nil {
				b.Fatal(err)
			}
		}
		perSecond(b)
	})
	b.Run("guest durable", func(b *testing.B) {
		port := guestPort(b, nil, map[string]string{"durable": "true", "fsync": "false"})
		payload := encoded(b, &pb.MsgPublishRequest{Subject: "bench.x", Payload: make([]byte, benchPayload)})
		b.SetParallelism(32)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := port.Call(b.Context(), permission.Messaging, opPublish, payload); err != nil {
					b.Fatal(err)
				}
			}
		})
		perSecond(b)
	})
	b.Run("guest durable fsync", func(b *testing.B) {
		port := guestPort(b, nil, map[string]string{"durable": "true"})
		payload := encoded(b, &pb.MsgPublishRequest{Subject: "bench.x", Payload: make([]byte, benchPayload)})
		b.SetParallelism(32)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := port.Call(b.Context(), permission.Messaging, opPublish, payload); err != nil {
					b.Fatal(err)
				}
			}
		})
		perSecond(b)
	})
}

// BenchmarkDelivery compares the way from publish to the handler with that from
// the client to its callback. Not more than a window is under way, as for a guest
// that must lose nothing.
func BenchmarkDelivery(b *testing.B) {
	const window = 4096
	pace := func(b *testing.B, publish func(), taken *atomic.Int64) {
		sent := int64(0)
		for b.Loop() {
			for sent-taken.Load() >= window {
				<-time.After(20 * time.Microsecond)
			}
			publish()
			sent++
		}
		for taken.Load() < sent {
			<-time.After(20 * time.Microsecond)
		}
		perSecond(b)
	}
	b.Run("client", func(b *testing.B) {
		nc, payload := client(b), make([]byte, benchPayload)
		var taken atomic.Int64
		if _, err := nc.QueueSubscribe("bench.x", "q", func(*nats.Msg) { taken.Add(1) }); err != nil {
			b.Fatal(err)
		}
		_ = nc.Flush()
		pace(b, func() { _ = nc.Publish("bench.x", payload) }, &taken)
	})
	for name, settings := range map[string]map[string]string{
		"guest": nil, "guest durable": {"durable": "true", "fsync": "false"},
	} {
		b.Run(name, func(b *testing.B) {
			node := &silent{desk: newDesk()}
			port := guestPort(b, node, settings)
			subscribe := encoded(b, &pb.MsgSubscribeRequest{Subject: "bench.x"})
			if _, err := port.Call(b.Context(), permission.Messaging, opSubscribe, subscribe); err != nil {
				b.Fatal(err)
			}
			payload := encoded(b, &pb.MsgPublishRequest{Subject: "bench.x", Payload: make([]byte, benchPayload)})
			pace(b, func() {
				if _, err := port.Call(b.Context(), permission.Messaging, opPublish, payload); err != nil {
					b.Fatal(err)
				}
			}, &node.taken)
		})
	}
}
