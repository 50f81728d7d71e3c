package kv_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// shared are the drivers of which several providers can share one server.
func shared(t *testing.T) map[string]func() provider.Provider {
	r, n := redisServer(t, "--appendonly", "no"), natsServer(t)
	return map[string]func() provider.Provider{
		"redis": func() provider.Provider { return open(t, nil, redisConfig(r, nil)) },
		"nats": func() provider.Provider {
			return open(t, nil, provider.Config{ID: "kv", Driver: "nats", Settings: map[string]string{"url": "nats://" + n.address}})
		},
	}
}

func as(t *testing.T, p provider.Provider, instance string, m provider.Mark, operation string, request proto.Message) error {
	t.Helper()
	_, err := p.Invoke(t.Context(), provider.Call{
		Instance: instance, Generation: m.Generation, Created: m.Created, Bucket: "b", Operation: operation, Payload: payload(t, request),
	})
	return err
}

// Generations write at the same time, each at a provider of its own. The versions
// show the order in which they were let in: it must never go back.
func TestOfTwoGenerationsAtTwoReplicasNoneComesBack(t *testing.T) {
	for driver, open := range shared(t) {
		t.Run(driver, func(t *testing.T) {
			const generations, writes = 3, 60
			var wg sync.WaitGroup
			replicas := make([]provider.Provider, generations)
			for g := range generations {
				replicas[g] = open()
				wg.Go(func() {
					mark := provider.Mark{Created: 3, Generation: uint64(g + 1)} //nolint:gosec // small
					for n := range writes {
						set := &pb.KvSetRequest{Key: fmt.Appendf(nil, "%d/%d", g, n), Value: []byte{byte(g)}}
						if err := as(t, replicas[g], "racer", mark, "set", set); err != nil && !errors.Is(err, provider.ErrDenied) {
							t.Errorf("write %d of generation %d: %v", n, g+1, err)
						}
					}
				})
			}
			wg.Wait()
			var page pb.KvListResponse
			if err := invoke(t.Context(), replicas[0], "list", &pb.KvListRequest{Limit: 1000}, &page); err != nil {
				t.Fatal(err)
			}
			byVersion := map[uint64]byte{}
			for _, e := range page.GetEntries() {
				byVersion[e.GetVersion()] = e.GetValue()[0]
			}
			newest, let := byte(0), 0
			for _, v := range slices.Sorted(maps.Keys(byVersion)) {
				if byVersion[v] < newest {
					t.Fatalf("generation %d was let in at version %d, after %d", byVersion[v]+1, v, newest+1)
				}
				if newest = byVersion[v]; newest == generations-1 {
					let++
				}
			}
			if let != writes {
				t.Errorf("%d writes of the newest generation were let in, want %d", let, writes)
			}
			for _, p := range replicas {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}
			p := open() // what was marked is on the server
			defer p.Close()
			if err := as(t, p, "racer", provider.Mark{Created: 3, Generation: 2}, "get", &pb.KvGetRequest{Key: []byte("k")}); !errors.Is(err, provider.ErrDenied) {
				t.Errorf("an old generation at a provider that never saw the new one: %v, want ErrDenied", err)
			}
		})
	}
}

// What one replica acknowledged, another has: also when it decides, and when it
// only looks.
func TestReplicasAgree(t *testing.T) {
	for driver, open := range shared(t) {
		t.Run(driver, func(t *testing.T) {
			one, other := open(), open()
			defer one.Close()
			defer other.Close()
			version := uint64(0)
			for n := range 40 {
				key := fmt.Appendf(nil, "%03d", n)
				var set pb.KvSetResponse
				if err := invoke(t.Context(), one, "set", &pb.KvSetRequest{Key: key}, &set); err != nil {
					t.Fatal(err)
				}
				var page pb.KvListResponse
				if err := invoke(t.Context(), other, "list", &pb.KvListRequest{KeysOnly: true}, &page); err != nil || len(page.GetEntries()) != n+1 {
					t.Fatalf("the other replica lists %d keys of %d: %v", len(page.GetEntries()), n+1, err)
				}
				var cas pb.KvCasResponse
				request := &pb.KvCasRequest{Key: []byte("shared"), ExpectedVersion: version, Value: key}
				if err := invoke(t.Context(), []provider.Provider{one, other}[n%2], "cas", request, &cas); err != nil || !cas.GetSwapped() {
					t.Fatalf("cas %d over version %d found %d: %v", n, version, cas.GetVersion(), err)
				}
				version = cas.GetVersion()
				request.ExpectedVersion--
				if err := invoke(t.Context(), []provider.Provider{other, one}[n%2], "cas", request, &cas); err != nil || cas.GetSwapped() || cas.GetVersion() != version {
					t.Fatalf("cas %d over an old version = %v, %d, %v; want false, %d", n, cas.GetSwapped(), cas.GetVersion(), err, version)
				}
				if err := invoke(t.Context(), other, "delete", &pb.KvDeleteRequest{Key: []byte("shared")}, &pb.KvDeleteResponse{}); err != nil {
					t.Fatal(err)
				}
				version = 0
			}
		})
	}
}

// Replicas that write at the same time lose no write of one another, also where
// each sends several at once.
func TestReplicasCountTogether(t *testing.T) {
	for driver, open := range shared(t) {
		t.Run(driver, func(t *testing.T) {
			const replicas, workers, each = 3, 4, 20
			counters := [][]byte{[]byte("even"), []byte("odd")}
			var wg sync.WaitGroup
			for range replicas {
				p := open()
				defer p.Close()
				for w := range workers {
					wg.Go(func() {
						for n := 0; n < each; {
							swapped, err := lengthen(t, p, counters[w%2])
							if err != nil {
								t.Error(err)
								return
							}
							if swapped {
								n++
							}
						}
					})
				}
			}
			wg.Wait()
			p := open()
			defer p.Close()
			for _, key := range counters {
				var got pb.KvGetResponse
				want := replicas * workers / len(counters) * each
				if err := invoke(t.Context(), p, "get", &pb.KvGetRequest{Key: key}, &got); err != nil || len(got.GetValue()) != want {
					t.Errorf("the counter is at %d, want %d: %v", len(got.GetValue()), want, err)
				}
			}
		})
	}
}

// lengthen makes a value one byte longer, unless somebody else comes before.
func lengthen(t *testing.T, p provider.Provider, key []byte) (swapped bool, err error) {
	var got pb.KvGetResponse
	if err := invoke(t.Context(), p, "get", &pb.KvGetRequest{Key: key}, &got); err != nil {
		return false, err
	}
	var out pb.KvCasResponse
	request := &pb.KvCasRequest{Key: key, ExpectedVersion: got.GetVersion(), Value: append(got.GetValue(), '+')}
	err = invoke(t.Context(), p, "cas", request, &out)
	return out.GetSwapped(), err
}
