package cli

import (
	"strings"
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestKeyValue(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}
	if got := b.want("kv", "put", "a/1", "one", "--ttl", "2s", "--bucket", "hello"); got != "a/1 stored, version 2001\n" {
		t.Errorf("put: %q", got)
	}
	b.want("kv", "put", "a/2", "@"+b.file("value", "two\n\x00"), "--bucket", "hello")
	if got := b.want("kv", "get", "a/2", "--bucket", "hello"); got != "two\n\x00" {
		t.Errorf("get: %q", got)
	}
	want := `KEY  VERSION  SIZE  VALUE
a/1  3        3 B   one
a/2  3        5 B   two\n\x00
`
	if got := b.want("kv", "list", "a/", "--bucket", "hello"); got != want {
		t.Errorf("list:\n%s\nwant\n%s", got, want)
	}
	if got := b.want("kv", "ls", "--bucket", "hello", "-o", "name", "--limit", "1"); got != "a/1\n" {
		t.Errorf("limit: %q", got)
	}
	if got := b.want("kv", "ls", "--bucket", "other"); got != "no keys\n" {
		t.Errorf("another bucket: %q", got)
	}
	if code, _, stderr := b.run("kv", "get", "zzz"); code != 3 || !strings.Contains(stderr, "there is no key \"zzz\"") || !strings.Contains(stderr, "not found · exit 3") {
		t.Errorf("missing: exit %d\n%s", code, stderr)
	}
	if code, _, stderr := b.run("kv", "put", "a/1", "x", "--if-version", "9"); code != 4 || !strings.Contains(stderr, "  version  3\n") {
		t.Errorf("cas: exit %d\n%s", code, stderr)
	}
	if got := b.want("kv", "del", "a/1", "zzz", "--bucket", "hello"); got != "a/1 removed\nzzz did not exist\n" {
		t.Errorf("del: %q", got)
	}
	b.fake.providers = append(b.fake.providers, newProvider("kv2", "kv", 0))
	if code, _, stderr := b.run("kv", "ls"); code != 2 || !strings.Contains(stderr, "choose with --provider") {
		t.Errorf("two providers: exit %d\n%s", code, stderr)
	}
}
