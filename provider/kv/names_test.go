package kv

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
)

// addresses are where each driver that has names to make keeps a key.
func addresses(bucket string, key []byte) []string {
	redis := (&redisStore{namespace: "n"}).keys(bucket, "data")[0]
	return []string{
		string(encodeKey(bucket, key)),
		redis + "\x00" + string(key), // the key is a field of its own
		newNatsSubjects("n").key(bucket, string(key)),
	}
}

// FuzzBucketsNeverMeet looks for two keys of different buckets that meet, or of
// which one is in the listing of the other's bucket.
func FuzzBucketsNeverMeet(f *testing.F) {
	f.Add("a", []byte("bc"), "ab", []byte("c"))
	f.Add("a}", []byte("c"), "a", []byte("}c"))
	f.Add("%61", []byte("c"), "a", []byte("c"))
	f.Add("a.b", []byte("c"), "a", []byte("b.c"))
	f.Add("1:a", []byte("c"), "a", []byte("c"))
	f.Add("a:data", []byte("c"), "a", []byte("c"))
	f.Fuzz(func(t *testing.T, bucket1 string, key1 []byte, bucket2 string, key2 []byte) {
		if len(bucket1) == 0 || len(bucket2) == 0 || len(bucket1) > MaxBucket || len(bucket2) > MaxBucket ||
			len(key1) == 0 || len(key2) == 0 || len(key1) > MaxKey || len(key2) > MaxKey {
			t.Skip()
		}
		same := bucket1 == bucket2 && bytes.Equal(key1, key2)
		one, other := addresses(bucket1, key1), addresses(bucket2, key2)
		for i := range one {
			if (one[i] == other[i]) != same {
				t.Errorf("%q %q and %q %q are at %q and %q", bucket1, key1, bucket2, key2, one[i], other[i])
			}
		}
		if bucket1 != bucket2 {
			listed(t, bucket1, bucket2, key2)
		}
		checkRedisNames(t, bucket1, bucket2)
		checkNatsSubject(t, bucket1, key1)
	})
}

// listed checks that the listing of one bucket shows no key of another.
func listed(t *testing.T, bucket, foreign string, key []byte) {
	t.Helper()
	if bytes.HasPrefix(encodeKey(foreign, key), encodeKey(bucket, nil)) {
		t.Errorf("bbolt lists %q of %q in %q", key, foreign, bucket)
	}
	index := newNatsIndex()
	c, ok := newNatsSubjects("n").read(newNatsSubjects("n").key(foreign, string(key)), nats.Header{natsHeader: {"set 0 -"}})
	if !ok {
		t.Fatalf("the subject of %q %q is not read", foreign, key)
	}
	index.apply(1, "", 0, c)
	if found := index.next(bucket, nil, 10, 10); len(found) != 0 {
		t.Errorf("nats lists %q of %q in %q", key, foreign, bucket)
	}
	if found := index.next(foreign, nil, 10, 10); len(found) != 1 || found[0].key != string(key) {
		t.Errorf("nats does not list %q in %q", key, foreign)
	}
}

// checkRedisNames checks that no key of a bucket is any of another, and that the
// hash tag is the bucket's and not empty.
func checkRedisNames(t *testing.T, bucket1, bucket2 string) {
	t.Helper()
	kinds := []string{"marks", "meta", "data", "index", "expiry", "version"}
	s := &redisStore{namespace: "n", cluster: true}
	one, other := s.keys(bucket1, kinds...), s.keys(bucket2, kinds...)
	for i, name := range one {
		if bucket1 != bucket2 && slices.Contains(other, name) || slices.Index(one, name) != i || name == s.buckets() {
			t.Errorf("%q is a key of %q and of %q", name, bucket1, bucket2)
		}
		tag := name[strings.IndexByte(name, '{')+1 : strings.IndexByte(name, '}')]
		if tag == "" || tag != redisTag(bucket1) {
			t.Errorf("the hash tag of %q is %q", name, tag)
		}
	}
}

// checkNatsSubject checks that a subject is one that a server takes, and that it
// means what it was made of.
func checkNatsSubject(t *testing.T, bucket string, key []byte) {
	t.Helper()
	const longest = 4096 - 256 // max_control_line, less what else is on the line
	subject := newNatsSubjects(strings.Repeat("n", 32)).key(bucket, string(key))
	if len(subject) > longest || strings.ContainsAny(subject, " *>\t\r\n") || strings.Contains(subject, "..") || strings.HasSuffix(subject, ".") {
		t.Errorf("%q %q has the subject %q", bucket, key, subject)
	}
	c, ok := newNatsSubjects(strings.Repeat("n", 32)).read(subject, nats.Header{natsHeader: {"set 7 x"}})
	if !ok || c.entry.bucket != bucket || c.entry.key != string(key) || c.entry.expires != 7 || c.entry.tail != "x" {
		t.Errorf("%q %q was read as %+v, %v", bucket, key, c.entry, ok)
	}
}

// FuzzNatsSubject reads subjects and headers of strangers.
func FuzzNatsSubject(f *testing.F) {
	f.Add("$WASMATRIX.KV.n.k.00.00", "set 1 -")
	f.Add("$WASMATRIX.KV.n.m.00", "mark 1 2")
	f.Add("$WASMATRIX.KV.n.t.00", "tail")
	f.Fuzz(func(t *testing.T, subject, says string) {
		c, ok := newNatsSubjects("n").read(subject, nats.Header{natsHeader: {says}})
		if ok && c.entry != nil && newNatsSubjects("n").key(c.entry.bucket, c.entry.key) != subject {
			t.Errorf("%q was read as %+v, which has another subject", subject, c.entry)
		}
	})
}
