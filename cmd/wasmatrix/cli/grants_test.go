package cli

import (
	"strings"
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestGrantRevokeAndCan(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", 0), newProvider("bus", "messaging", 0)}
	want := `INSTANCE  PROVIDER  BUCKET  PERMISSIONS
hello     kv        shared  kv:read kv:write:a/
hello     bus               msg:publish:x
`
	if got := b.want("grant", "hello", "kv:read", "msg:publish:x", "kv:write:a/", "--bucket", "shared"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	b.want("revoke", "hello", "kv:read")
	if req := request[*pb.RevokeCapabilityRequest](b.fake); req.GetProviderId() != "kv" || len(req.GetPermissions()) != 1 {
		t.Errorf("revoke: %v", req)
	}
	if got := b.want("revoke", "hello", "--all", "--provider", "bus"); got != "nothing is granted any more\n" {
		t.Errorf("revoke --all: %q", got)
	}
	if req := request[*pb.RevokeCapabilityRequest](b.fake); req.GetProviderId() != "bus" || len(req.GetPermissions()) != 0 {
		t.Errorf("revoke --all: %v", req)
	}

	threeInstances(b.fake)
	b.fake.grants = []*pb.CapabilityAssignment{
		{InstanceId: "hello-aaaaa", ProviderId: "kv", Permissions: []string{"kv:read:a/"}},
		{InstanceId: "hello-aaaaa", ProviderId: "kv2", Permissions: []string{"kv:read"}},
		{InstanceId: "hello-bbbbb", ProviderId: "kv", Permissions: []string{"kv:read:a/"}},
		{InstanceId: "hello-bbbbb", ProviderId: "bus", Permissions: []string{"msg:publish:orders.*"}},
		{InstanceId: "hello-bbbbb", ProviderId: "web", Permissions: []string{"http:request", "http:domain:10.0.0.0/8"}},
		{InstanceId: "hello-bbbbb", ProviderId: "billing", Permissions: []string{"provider:billing:*"}},
	}
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"hello", "kv:read:a/1"}, 0, `hello-aaaaa  allowed: kv:read:a/1 by kv:read:a/ on kv
hello-aaaaa  allowed: kv:read:a/1 by kv:read on kv2
hello-bbbbb  allowed: kv:read:a/1 by kv:read:a/ on kv
`},
		{[]string{"hello-aaaaa", "kv:read:b"}, 0, `hello-aaaaa  denied on kv: kv:read:b: not covered by kv:read:a/; it takes kv:read:b
hello-aaaaa  allowed: kv:read:b by kv:read on kv2
`},
		{[]string{"hello", "kv:read:b"}, 5, "hello-bbbbb  denied: kv:read:b: not covered by kv:read:a/; it takes kv:read:b\n"},
		{[]string{"hello-aaaaa", "kv:read:b", "--provider", "kv"}, 5, "hello-aaaaa  denied: kv:read:b: not covered by kv:read:a/; it takes kv:read:b\n"},
		{[]string{"other-ccccc", "kv:read"}, 5, "other-ccccc  denied: kv:read: no permission for kv was granted; it takes kv:read\n"},
		{[]string{"hello-bbbbb", "msg:publish:orders.stored"}, 0, "hello-bbbbb  allowed: msg:publish:orders.stored by msg:publish:orders.* on bus\n"},
		{[]string{"hello-bbbbb", "http:domain:example.com:443"}, 5, "denied: http:domain:example.com:443: not covered by"},
		{[]string{"hello-bbbbb", "provider:billing:charge"}, 0, "hello-bbbbb  allowed: provider:billing:charge by provider:billing:* on billing\n"},
		{[]string{"hello", "kv:read:b", "-o", "name"}, 5, "hello-aaaaa\n"},
		{[]string{"hello-bbbbb", "provider:billing:charge", "-o", "json"}, 0, `"rule":"provider:billing:*"`},
	} {
		code, stdout, stderr := b.run(append([]string{"can"}, tt.args...)...)
		if code != tt.code || !strings.HasSuffix(stdout, tt.want) && !strings.Contains(stdout, tt.want) || stderr != "" {
			t.Errorf("can %v: exit %d, %q, %q", tt.args, code, stdout, stderr)
		}
	}
}

func TestPermissionsFindTheirProviders(t *testing.T) {
	b := newBench(t)
	replica := newProvider("web", "http", 0)
	replica.Replica = 1
	b.fake.providers = []*pb.Provider{
		newProvider("bus", "messaging", 0), newProvider("kv", "kv", 0), newProvider("web", "http", 0), replica,
		newProvider("billing", "external", 0), newProvider("stock", "external", 0),
	}
	want := `INSTANCE  PROVIDER  BUCKET  PERMISSIONS
hello     web               http:request http:domain:example.com
hello     bus               msg:subscribe:a.*
hello     billing           provider:billing:charge
hello     stock             provider:stock:*
`
	got := b.want("grant", "hello", "http:request", "msg:subscribe:a.*", "http:domain:example.com", "provider:billing:charge", "provider:stock:*")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"provider:nobody:x"}, 3, "provider:nobody:x is about provider nobody, and there is none"},
		{[]string{"provider:kv:x"}, 2, "kv is of type kv"},
		{[]string{"http:request", "--provider", "nobody"}, 3, "no provider has the id"},
		{[]string{"http:request", "--provider", "kv"}, 2, "--provider kv serves none of the permissions http:request"},
	} {
		if code, _, stderr := b.run(append([]string{"grant", "hello"}, tt.args...)...); code != tt.code || !strings.Contains(stderr, tt.want) {
			t.Errorf("grant %v: exit %d\n%s", tt.args, code, stderr)
		}
	}
	b.fake.providers = append(b.fake.providers, newProvider("web2", "http", 0))
	if code, _, stderr := b.run("grant", "hello", "http:request"); code != 2 || !strings.Contains(stderr, "any of the providers web, web2: choose with --provider") {
		t.Errorf("two of a type: exit %d\n%s", code, stderr)
	}
	if got := b.want("grant", "hello", "http:request", "--provider", "web2"); !strings.Contains(got, "web2") {
		t.Errorf("chosen: %q", got)
	}
}
