package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// OpenKV opens an empty key-value provider whose expiry goes by now. The suite
// closes it.
type OpenKV func(t *testing.T, now func() time.Time) provider.Provider

// KV runs the suite that every key-value driver passes.
func KV(t *testing.T, open OpenKV) {
	tests := []struct {
		name string
		run  func(*testing.T, *fixture)
	}{
		{"a key that was never set is not found", testMissing},
		{"what was set is got", testSetGet},
		{"any byte is allowed in keys and values", testAnyByte},
		{"the limits of a request hold", testLimits},
		{"values of every size replace one another", testSizes},
		{"the longest names work everywhere", testLongest},
		{"a deleted key is gone", testDelete},
		{"versions grow and never repeat", testVersions},
		{"cas stores only over the expected version", testCas},
		{"cas with version 0 stores only a new key", testCasNew},
		{"an expired key is gone for every operation", testExpiry},
		{"setting again replaces the expiry", testExpiryReplaced},
		{"list is in byte order and by prefix", testList},
		{"list pages hold every key once", testListPages},
		{"list pages are bounded in bytes", testListBytes},
		{"list skips expired keys", testListExpired},
		{"a cursor cannot leave its prefix", testListCursorPrefix},
		{"buckets never meet", testBuckets},
		{"a malformed request is refused", testMalformed},
		{"an ended context is refused", testEndedContext},
		{"concurrent increments by cas add up", testConcurrentCas},
		{"concurrent writers and readers see whole values", testConcurrentWhole},
		{"a random history agrees with a model", testModel},
		{"an older generation is refused once a newer one was let in", testGenerations},
		{"of two generations that race none comes back", testGenerationsRace},
		{"a closed provider is unavailable", testClosed},
		{"close waits for calls under way", testCloseUnderCalls},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clock := &clock{}
			clock.nanos.Store(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
			p := open(t, clock.now)
			t.Cleanup(func() {
				if err := p.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
			tt.run(t, &fixture{T: t, p: p, clock: clock, bucket: "bucket"})
		})
	}
}

type clock struct{ nanos atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(0, c.nanos.Load()) }
func (c *clock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

// fixture calls one provider in one bucket.
type fixture struct {
	*testing.T
	p      provider.Provider
	clock  *clock
	bucket string
}

func (f *fixture) in(bucket string) *fixture {
	other := *f
	other.bucket = bucket
	return &other
}

// try makes one call and decodes the answer. Nothing of the payload may be kept
// by the provider, so it is overwritten afterwards.
func (f *fixture) try(operation string, request, response proto.Message) error {
	payload, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	answer, err := f.p.Invoke(f.Context(), provider.Call{
		Instance: "i", Name: "n", Generation: 1, Bucket: f.bucket, Operation: operation, Payload: payload,
	})
	for i := range payload {
		payload[i] = 0xa5
	}
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer, response)
}

func (f *fixture) call(operation string, request, response proto.Message) {
	f.Helper()
	if err := f.try(operation, request, response); err != nil {
		f.Fatalf("%s %v: %v", operation, request, err)
	}
}

func (f *fixture) set(key, value string, ttl time.Duration) uint64 {
	f.Helper()
	var out pb.KvSetResponse
	f.call("set", &pb.KvSetRequest{Key: []byte(key), Value: []byte(value), TtlMs: uint64(ttl.Milliseconds())}, &out)
	return out.GetVersion()
}

func (f *fixture) get(key string) *pb.KvGetResponse {
	f.Helper()
	var out pb.KvGetResponse
	f.call("get", &pb.KvGetRequest{Key: []byte(key)}, &out)
	return &out
}

func (f *fixture) del(key string) bool {
	f.Helper()
	var out pb.KvDeleteResponse
	f.call("delete", &pb.KvDeleteRequest{Key: []byte(key)}, &out)
	return out.GetExisted()
}

func (f *fixture) cas(key string, expected uint64, value string) (bool, uint64) {
	f.Helper()
	var out pb.KvCasResponse
	f.call("cas", &pb.KvCasRequest{Key: []byte(key), ExpectedVersion: expected, Value: []byte(value)}, &out)
	return out.GetSwapped(), out.GetVersion()
}

func (f *fixture) list(request *pb.KvListRequest) *pb.KvListResponse {
	f.Helper()
	var out pb.KvListResponse
	f.call("list", request, &out)
	return &out
}

func (f *fixture) wantValue(key, want string) {
	f.Helper()
	if got := f.get(key); !got.GetFound() || string(got.GetValue()) != want {
		f.Fatalf("get %q = found %v %q, want %q", key, got.GetFound(), got.GetValue(), want)
	}
}

func (f *fixture) wantMissing(key string) {
	f.Helper()
	if got := f.get(key); got.GetFound() || len(got.GetValue()) != 0 || got.GetVersion() != 0 {
		f.Fatalf("get %q = %v, want not found", key, got)
	}
}

func keys(r *pb.KvListResponse) []string {
	var out []string
	for _, e := range r.GetEntries() {
		out = append(out, string(e.GetKey()))
	}
	return out
}

func testMissing(t *testing.T, f *fixture) {
	f.wantMissing("nothing")
	if f.del("nothing") {
		t.Error("a key that never was existed")
	}
	if got := f.list(&pb.KvListRequest{}); len(got.GetEntries()) != 0 || len(got.GetNextCursor()) != 0 {
		t.Errorf("list of an empty bucket = %v", got)
	}
}

func testSetGet(t *testing.T, f *fixture) {
	v1 := f.set("k", "one", 0)
	f.wantValue("k", "one")
	if got := f.get("k").GetVersion(); got != v1 {
		t.Errorf("version %d, want that of the set, %d", got, v1)
	}
	v2 := f.set("k", "two", 0)
	f.wantValue("k", "two")
	if v2 <= v1 {
		t.Errorf("version %d after %d", v2, v1)
	}
	f.set("k", "", 0)
	f.wantValue("k", "")
}

func testAnyByte(t *testing.T, f *fixture) {
	var every []byte
	for b := range 256 {
		every = append(every, byte(b))
		f.set(string([]byte{byte(b)}), string([]byte{byte(255 - b)}), 0)
	}
	f.set(string(every), string(every), 0)
	for b := range 256 {
		f.wantValue(string([]byte{byte(b)}), string([]byte{byte(255 - b)}))
	}
	f.wantValue(string(every), string(every))
	if got := f.list(&pb.KvListRequest{Limit: 1000}); len(got.GetEntries()) != 257 {
		t.Errorf("list has %d keys, want 257", len(got.GetEntries()))
	}
}

func testLimits(t *testing.T, f *fixture) {
	longest, largest := string(bytes.Repeat([]byte{0xff}, 1024)), string(bytes.Repeat([]byte{7}, 1<<20))
	f.set(longest, largest, 0)
	f.wantValue(longest, largest)
	refused := map[string]struct {
		operation string
		request   proto.Message
	}{
		"empty key":      {"get", &pb.KvGetRequest{}},
		"empty key set":  {"set", &pb.KvSetRequest{Value: []byte("x")}},
		"empty key del":  {"delete", &pb.KvDeleteRequest{}},
		"empty key cas":  {"cas", &pb.KvCasRequest{}},
		"long key":       {"get", &pb.KvGetRequest{Key: []byte(longest + "x")}},
		"large value":    {"set", &pb.KvSetRequest{Key: []byte("k"), Value: []byte(largest + "x")}},
		"large cas":      {"cas", &pb.KvCasRequest{Key: []byte("k"), Value: []byte(largest + "x")}},
		"long prefix":    {"list", &pb.KvListRequest{Prefix: []byte(longest + "x")}},
		"long cursor":    {"list", &pb.KvListRequest{Cursor: []byte(longest + "x")}},
		"large limit":    {"list", &pb.KvListRequest{Limit: 1001}},
		"long life":      {"set", &pb.KvSetRequest{Key: []byte("k"), TtlMs: 1 << 63}},
		"unknown":        {"drop", &pb.KvGetRequest{Key: []byte("k")}},
		"empty":          {"", &pb.KvGetRequest{Key: []byte("k")}},
		"operation case": {"GET", &pb.KvGetRequest{Key: []byte("k")}},
	}
	for name, r := range refused {
		if err := f.try(r.operation, r.request, &pb.KvGetResponse{}); !errors.Is(err, provider.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	for _, bucket := range []string{"", string(bytes.Repeat([]byte("b"), 129))} {
		if err := f.in(bucket).try("get", &pb.KvGetRequest{Key: []byte("k")}, &pb.KvGetResponse{}); !errors.Is(err, provider.ErrInvalid) {
			t.Errorf("bucket of %d bytes: %v, want ErrInvalid", len(bucket), err)
		}
	}
}

// testSizes goes through sizes where a driver may change how it stores a value.
func testSizes(t *testing.T, f *fixture) {
	const most = 1 << 20
	sizes := []int{most, 0, most - 1, 1, most / 2, most - 100, most - 1024, 4096, most - 4096, most, most, 0}
	for i, size := range sizes {
		value := string(bytes.Repeat([]byte{byte(i), 0, 0xff}, size/3+1)[:size])
		version := f.set("k", value, 0)
		got := f.get("k")
		if string(got.GetValue()) != value || got.GetVersion() != version {
			t.Fatalf("a value of %d bytes was got as %d bytes at version %d, want %d", size, len(got.GetValue()), got.GetVersion(), version)
		}
		entries := f.list(&pb.KvListRequest{}).GetEntries()
		if len(entries) != 1 || string(entries[0].GetValue()) != value || entries[0].GetVersion() != version {
			t.Fatalf("a value of %d bytes is not listed as it is", size)
		}
		if i%3 == 0 && !f.del("k") {
			t.Fatal("the key did not exist")
		}
	}
}

// testLongest uses the longest bucket and keys, of bytes that encodings dislike.
func testLongest(t *testing.T, f *fixture) {
	for _, fill := range []string{"\x00", "\xff", ".", "}", "{", "*", ">", "%", " ", "\r\n"} {
		g := f.in(strings.Repeat(fill, 128/len(fill)))
		long := strings.Repeat(fill, 1024/len(fill))
		v := g.set(long, "v", 0)
		if swapped, _ := g.cas(long, v, "w"); !swapped {
			t.Errorf("%q: cas over the version failed", fill)
		}
		g.wantValue(long, "w")
		g.set(long[:1023], "other", time.Hour)
		want := []string{long[:1023], long}
		if got := keys(g.list(&pb.KvListRequest{Prefix: []byte(long[:1022])})); !slices.Equal(got, want) {
			t.Errorf("%q: %d keys are listed, want 2", fill, len(got))
		}
		if got := keys(g.list(&pb.KvListRequest{Prefix: []byte(long)})); !slices.Equal(got, want[1:]) {
			t.Errorf("%q: %d keys are listed by the longest prefix, want 1", fill, len(got))
		}
		if got := keys(g.list(&pb.KvListRequest{Cursor: []byte(long[:1023])})); !slices.Equal(got, want[1:]) {
			t.Errorf("%q: %d keys are listed behind the first, want 1", fill, len(got))
		}
		if !g.del(long) || g.del(long) {
			t.Errorf("%q: delete did not find the key once", fill)
		}
	}
}

func testDelete(t *testing.T, f *fixture) {
	f.set("k", "v", 0)
	f.set("kk", "v", 0)
	if !f.del("k") {
		t.Error("the key did not exist")
	}
	f.wantMissing("k")
	f.wantValue("kk", "v")
	if f.del("k") {
		t.Error("a deleted key existed")
	}
	if got := keys(f.list(&pb.KvListRequest{})); fmt.Sprint(got) != "[kk]" {
		t.Errorf("list = %q", got)
	}
}

func testVersions(t *testing.T, f *fixture) {
	seen := map[uint64]bool{0: true}
	last := uint64(0)
	see := func(v uint64) {
		t.Helper()
		if seen[v] || v <= last {
			t.Fatalf("version %d came again or went down after %d", v, last)
		}
		seen[v], last = true, v
	}
	for range 3 {
		see(f.set("k", "v", 0))
		see(f.set("k", "v", time.Second))
		f.clock.advance(2 * time.Second)
		swapped, v := f.cas("k", 0, "again")
		if !swapped {
			t.Fatal("an expired key could not be made anew")
		}
		see(v)
		f.del("k")
	}
}

func testCas(t *testing.T, f *fixture) {
	v1 := f.set("k", "one", 0)
	if swapped, v := f.cas("k", v1+1, "wrong"); swapped || v != v1 {
		t.Errorf("cas over another version = %v, %d; want false, %d", swapped, v, v1)
	}
	f.wantValue("k", "one")
	swapped, v2 := f.cas("k", v1, "two")
	if !swapped || v2 <= v1 {
		t.Errorf("cas over the version = %v, %d", swapped, v2)
	}
	f.wantValue("k", "two")
	if swapped, v := f.cas("k", v1, "three"); swapped || v != v2 {
		t.Errorf("cas over the old version = %v, %d; want false, %d", swapped, v, v2)
	}
	if swapped, v := f.cas("none", v2, "x"); swapped || v != 0 {
		t.Errorf("cas of a missing key = %v, %d; want false, 0", swapped, v)
	}
	f.wantMissing("none")
}

func testCasNew(t *testing.T, f *fixture) {
	swapped, v1 := f.cas("k", 0, "one")
	if !swapped || v1 == 0 {
		t.Fatalf("cas of a new key = %v, %d", swapped, v1)
	}
	if swapped, v := f.cas("k", 0, "two"); swapped || v != v1 {
		t.Errorf("cas of an existing key as new = %v, %d", swapped, v)
	}
	f.wantValue("k", "one")
	f.del("k")
	swapped, v2 := f.cas("k", 0, "three")
	if !swapped || v2 <= v1 {
		t.Errorf("cas after delete = %v, %d after %d", swapped, v2, v1)
	}
}

func testExpiry(t *testing.T, f *fixture) {
	v := f.set("k", "v", time.Second)
	f.clock.advance(999 * time.Millisecond)
	f.wantValue("k", "v")
	f.clock.advance(time.Millisecond)
	f.wantMissing("k")
	if got := f.list(&pb.KvListRequest{}); len(got.GetEntries()) != 0 {
		t.Errorf("list shows an expired key: %v", got)
	}
	if swapped, current := f.cas("k", v, "x"); swapped || current != 0 {
		t.Errorf("cas over an expired key = %v, %d; want false, 0", swapped, current)
	}
	if f.del("k") {
		t.Error("delete of an expired key says that it existed")
	}
	f.set("k", "again", 0)
	f.clock.advance(time.Hour)
	f.wantValue("k", "again")
}

func testExpiryReplaced(_ *testing.T, f *fixture) {
	f.set("longer", "v", time.Second)
	f.set("longer", "v", time.Minute)
	f.set("forever", "v", time.Second)
	f.set("forever", "v", 0)
	f.set("shorter", "v", time.Minute)
	f.set("shorter", "v", time.Second)
	f.clock.advance(2 * time.Second)
	f.wantValue("longer", "v")
	f.wantValue("forever", "v")
	f.wantMissing("shorter")
}

func testEndedContext(t *testing.T, f *fixture) {
	payload, err := proto.Marshal(&pb.KvSetRequest{Key: []byte("k"), Value: []byte("v")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	_, err = f.p.Invoke(ctx, provider.Call{Bucket: f.bucket, Operation: "set", Payload: payload})
	if !errors.Is(err, provider.ErrTimeout) {
		t.Errorf("after the deadline: %v, want ErrTimeout", err)
	}
	f.wantMissing("k")
}

func testMalformed(t *testing.T, f *fixture) {
	for _, payload := range []string{"\xff", "\x12\x05a", "\x0a\x01\xff", "\x12", "\x00", "\x0b"} {
		for _, operation := range []string{"get", "set", "delete", "list", "cas"} {
			_, err := f.p.Invoke(t.Context(), provider.Call{Bucket: f.bucket, Operation: operation, Payload: []byte(payload)})
			if !errors.Is(err, provider.ErrInvalid) {
				t.Errorf("%s of %q: %v, want ErrInvalid", operation, payload, err)
			}
		}
	}
}

func testConcurrentCas(t *testing.T, f *fixture) {
	const workers, increments = 8, 25
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range increments {
				if err := f.increment("counter"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if got := f.get("counter"); len(got.GetValue()) != workers*increments {
		t.Errorf("the counter is at %d, want %d", len(got.GetValue()), workers*increments)
	}
}

// increment makes the value one byte longer.
func (f *fixture) increment(key string) error {
	for {
		var got pb.KvGetResponse
		if err := f.try("get", &pb.KvGetRequest{Key: []byte(key)}, &got); err != nil {
			return err
		}
		var out pb.KvCasResponse
		request := &pb.KvCasRequest{Key: []byte(key), ExpectedVersion: got.GetVersion(), Value: append(got.GetValue(), '+')}
		if err := f.try("cas", request, &out); err != nil {
			return err
		}
		if out.GetSwapped() {
			return nil
		}
	}
}

func testConcurrentWhole(t *testing.T, f *fixture) {
	f.set("k", "0000", 0)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		wg.Go(func() {
			for i := range 30 {
				value := bytes.Repeat([]byte{byte('a' + w)}, 1+i*97)
				if err := f.try("set", &pb.KvSetRequest{Key: []byte("k"), Value: value}, &pb.KvSetResponse{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				var got pb.KvGetResponse
				if err := f.try("get", &pb.KvGetRequest{Key: []byte("k")}, &got); err != nil {
					t.Error(err)
					return
				}
				value := got.GetValue()
				if len(bytes.Trim(value, string(value[:1]))) != 0 || got.GetVersion() < last {
					t.Errorf("read a torn value or an old version: %q at %d after %d", value, got.GetVersion(), last)
					return
				}
				last = got.GetVersion()
			}
		})
	}
	wg.Wait()
	close(stop)
	readers.Wait()
}

func testClosed(t *testing.T, f *fixture) {
	f.set("k", "v", 0)
	if err := f.p.Close(); err != nil {
		t.Fatal(err)
	}
	for _, operation := range []string{"get", "set", "delete", "cas", "list"} {
		if err := f.try(operation, &pb.KvGetRequest{Key: []byte("k")}, &pb.KvGetResponse{}); !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("%s after Close: %v, want ErrUnavailable", operation, err)
		}
	}
}

func testCloseUnderCalls(t *testing.T, f *fixture) {
	var wg sync.WaitGroup
	var closed atomic.Bool
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				late := closed.Load()
				err := f.try("set", &pb.KvSetRequest{Key: fmt.Appendf(nil, "%d/%d", w, i)}, &pb.KvSetResponse{})
				if errors.Is(err, provider.ErrUnavailable) {
					return
				}
				if err != nil || late {
					t.Errorf("write %d/%d: %v, begun after Close: %v", w, i, err, late)
					return
				}
			}
		})
	}
	f.set("k", "v", 0)
	if err := f.p.Close(); err != nil {
		t.Error(err)
	}
	closed.Store(true)
	wg.Wait()
}
