package kv

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// reference is decode by way of the generated code.
func reference(operation string, payload []byte) (request, error) {
	switch operation {
	case opGet:
		var m pb.KvGetRequest
		err := proto.Unmarshal(payload, &m)
		return request{provider: []byte(m.GetProvider()), key: m.GetKey()}, err
	case opDelete:
		var m pb.KvDeleteRequest
		err := proto.Unmarshal(payload, &m)
		return request{provider: []byte(m.GetProvider()), key: m.GetKey()}, err
	case opSet:
		var m pb.KvSetRequest
		err := proto.Unmarshal(payload, &m)
		return request{provider: []byte(m.GetProvider()), key: m.GetKey(), value: m.GetValue(), ttl: m.GetTtlMs()}, err
	case opList:
		var m pb.KvListRequest
		err := proto.Unmarshal(payload, &m)
		return request{
			provider: []byte(m.GetProvider()), key: m.GetPrefix(), limit: m.GetLimit(), cursor: m.GetCursor(), keysOnly: m.GetKeysOnly(),
		}, err
	default:
		var m pb.KvCasRequest
		err := proto.Unmarshal(payload, &m)
		return request{
			provider: []byte(m.GetProvider()), key: m.GetKey(), expected: m.GetExpectedVersion(), value: m.GetValue(), ttl: m.GetTtlMs(),
		}, err
	}
}

func equal(a, b request) bool {
	return bytes.Equal(a.provider, b.provider) && bytes.Equal(a.key, b.key) && bytes.Equal(a.value, b.value) &&
		bytes.Equal(a.cursor, b.cursor) && a.ttl == b.ttl && a.expected == b.expected && a.limit == b.limit && a.keysOnly == b.keysOnly
}

// FuzzDecode holds the hand-written decoder to the generated one.
func FuzzDecode(f *testing.F) {
	operations := []string{opGet, opSet, opDelete, opList, opCas}
	for _, m := range []proto.Message{
		&pb.KvGetRequest{Provider: "kv", Key: []byte("k")},
		&pb.KvSetRequest{Key: []byte("k"), Value: []byte("v"), TtlMs: 1 << 40},
		&pb.KvListRequest{Prefix: []byte("p"), Limit: 7, Cursor: []byte("c"), KeysOnly: true},
		&pb.KvCasRequest{Key: []byte("k"), ExpectedVersion: 9, Value: []byte("v"), TtlMs: 3},
	} {
		for op := range operations {
			f.Add(byte(op), marshal(f, m))
		}
	}
	for _, s := range []string{
		"\x0a\x01\xff", "\x12\x01a\x12\x00", "\x10\x07", "\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "\x13\x14", "\x13", "\x14",
		"\x00", "\x2a\x01a", "\x92\x80\x80\x80\x80\x00\x01a", "\x0a\x01\xff\x0a\x01a", "\xfa\xff\xff\xff\x0f\x00", "\x15\x01\x02\x03\x04",
	} {
		for op := range operations {
			f.Add(byte(op), []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, op byte, payload []byte) {
		operation := operations[int(op)%len(operations)]
		got, err := decode(operation, payload)
		want, wantErr := reference(operation, payload)
		if (err != nil) != (wantErr != nil) {
			t.Fatalf("%s of %q: %v, proto says %v", operation, payload, err, wantErr)
		}
		if err == nil && !equal(got, want) {
			t.Fatalf("%s of %q: %+v, proto says %+v", operation, payload, got, want)
		}
	})
}

func TestAnswersAreThoseOfTheGeneratedCode(t *testing.T) {
	large := bytes.Repeat([]byte("x"), 300)
	tests := []struct {
		got  []byte
		want proto.Message
	}{
		{encodeFound(nil, 0), &pb.KvGetResponse{Found: true}},
		{encodeFound(large, 1<<63), &pb.KvGetResponse{Found: true, Value: large, Version: 1 << 63}},
		{nil, &pb.KvGetResponse{}},
		{encodeVersion(300), &pb.KvSetResponse{Version: 300}},
		{encodeExisted(true), &pb.KvDeleteResponse{Existed: true}},
		{encodeExisted(false), &pb.KvDeleteResponse{}},
		{encodeCas(true, 7), &pb.KvCasResponse{Swapped: true, Version: 7}},
		{encodeCas(false, 0), &pb.KvCasResponse{}},
	}
	for _, tt := range tests {
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(tt.want)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(tt.got, want) {
			t.Errorf("%T: %x, want %x", tt.want, tt.got, want)
		}
	}
	p := page{limit: 2}
	p.visit([]byte("a"), large, 1, true)
	p.visit([]byte("b"), nil, 1<<40, true)
	p.visit([]byte("c"), nil, 1, true)
	want := marshal(t, &pb.KvListResponse{
		Entries:    []*pb.KvEntry{{Key: []byte("a"), Value: large, Version: 1}, {Key: []byte("b"), Version: 1 << 40}},
		NextCursor: []byte("b"),
	})
	if got := p.encode(); !bytes.Equal(got, want) {
		t.Errorf("list: %x, want %x", got, want)
	}
}

// A page passes over a bounded number of expired keys and then names a cursor.
func TestPageIsBoundedInWhatItExamines(t *testing.T) {
	p := page{limit: 10}
	n := 0
	for p.visit([]byte{byte(n >> 16), byte(n >> 8), byte(n)}, nil, 1, false) {
		n++
	}
	var got pb.KvListResponse
	if err := proto.Unmarshal(p.encode(), &got); err != nil {
		t.Fatal(err)
	}
	if n >= maxExamined || len(got.GetEntries()) != 0 || len(got.GetNextCursor()) != 3 {
		t.Errorf("%d keys examined, page %v", n, &got)
	}
}

// FuzzKeys shows that a record's key tells bucket and key apart, and that no key
// of one bucket lies in the range of another.
func FuzzKeys(f *testing.F) {
	f.Add("a", []byte("bc"), "ab", []byte("c"))
	f.Add("\x01", []byte("a"), "", []byte("\x01a"))
	f.Fuzz(func(t *testing.T, bucketA string, keyA []byte, bucketB string, keyB []byte) {
		if len(bucketA) > MaxBucket || len(bucketB) > MaxBucket {
			return
		}
		a, b := encodeKey(bucketA, keyA), encodeKey(bucketB, keyB)
		bucket, key, ok := splitKey(a)
		if !ok || bucket != bucketA || !bytes.Equal(key, keyA) {
			t.Fatalf("split(%q) = %q, %q, %v", a, bucket, key, ok)
		}
		if bytes.Equal(a, b) != (bucketA == bucketB && bytes.Equal(keyA, keyB)) {
			t.Fatalf("%q %q and %q %q meet", bucketA, keyA, bucketB, keyB)
		}
		if bucketA != bucketB && bytes.HasPrefix(a, encodeKey(bucketB, nil)) {
			t.Fatalf("key %q of bucket %q is listed in bucket %q", keyA, bucketA, bucketB)
		}
	})
}

// FuzzRecord shows that no damage to a record goes unnoticed and that nothing
// that is read from a file makes the decoder panic.
func FuzzRecord(f *testing.F) {
	key := encodeKey("b", []byte("k"))
	f.Add(encodeRecord(key, &record{version: 1, expires: 5, value: []byte("v")}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := decodeRecord(key, b)
		if ok && !bytes.Equal(encodeRecord(key, &r), b) {
			t.Fatalf("%x decodes to %+v and back to something else", b, r)
		}
		if _, ok := decodeRecord(append(key, 'x'), b); ok && r.version != 0 {
			t.Fatalf("%x is valid under two keys", b)
		}
		_, _, _ = splitKey(b)
		_, _, _ = splitExpiry(b)
	})
}

func TestEveryFlippedBitOfARecordIsNoticed(t *testing.T) {
	key := encodeKey("bucket", []byte("key"))
	good := encodeRecord(key, &record{version: 7, expires: 9, value: []byte("some value")})
	for bit := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if _, ok := decodeRecord(key, bad); ok {
			t.Errorf("bit %d flipped and not noticed", bit)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	get := marshal(b, &pb.KvGetRequest{Key: []byte("orders/000017")})
	set := marshal(b, &pb.KvSetRequest{Key: []byte("orders/000017"), Value: make([]byte, 1024)})
	for name, c := range map[string]struct {
		operation string
		payload   []byte
	}{"get": {opGet, get}, "set": {opSet, set}} {
		b.Run(name+"/scan", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := decode(c.operation, c.payload); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/proto", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := reference(c.operation, c.payload); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
