package permission

import (
	"errors"
	"strings"
	"testing"
)

func mustParse(t testing.TB, s string) Permission {
	t.Helper()
	p, err := Parse(s)
	if err != nil {
		t.Fatalf("Parse(%q): %v", s, err)
	}
	return p
}

func mustSet(t testing.TB, texts ...string) Set {
	t.Helper()
	s, err := ParseSet(texts)
	if err != nil {
		t.Fatalf("ParseSet(%q): %v", texts, err)
	}
	return s
}

func kv(action, key string) Need {
	return Need{Capability: KV, Action: action, Resource: key}
}

func http(host string) Need {
	return Need{Capability: HTTP, Action: Request, Resource: host}
}

func msg(action, subject string) Need {
	return Need{Capability: Messaging, Action: action, Resource: subject}
}

func call(id, operation string) Need {
	return Need{Capability: Provider, Action: operation, Resource: id}
}

func TestCovers(t *testing.T) {
	tests := []struct {
		permission string
		need       Need
		want       bool
	}{
		{"kv:read", kv("read", ""), true},
		{"kv:read", kv("read", "any\x00\xff"), true},
		{"kv:read", kv("write", "a"), false},
		{"kv:read", kv("delete", "a"), false},
		{"kv:write", kv("read", "a"), false},
		{"kv:delete", kv("delete", "a"), true},
		{"kv:read:orders/", kv("read", "orders/1"), true},
		{"kv:read:orders/", kv("read", "orders/"), true},
		{"kv:read:orders/", kv("read", "orders"), false},
		{"kv:read:orders/", kv("read", ""), false},
		{"kv:read:orders/", kv("read", "ordersx/1"), false},
		{"kv:read:orders/", kv("read", "Orders/1"), false},
		{"kv:read:a:b:", kv("read", "a:b:c"), true},
		{"kv:read:a:b:", kv("read", "a:b"), false},
		{"kv:read::", kv("read", ":x"), true},
		{"kv:read:ö", kv("read", "ö1"), true},
		{"kv:read:ö", kv("read", "\xc3"), false},
		{"kv:read", Need{Capability: "http", Action: "read"}, false},
		{"kv:read", Need{}, false},

		{"http:request", http("anything:443"), true},
		{"http:request", Need{Capability: "http", Action: "read"}, false},
		{"http:domain:example.com", http("example.com:443"), true},
		{"http:domain:example.com", http("example.com"), true},
		{"http:domain:example.com", http("a.example.com:443"), false},
		{"http:domain:example.com", http("example.com.evil.org:443"), false},
		{"http:domain:example.com", http("notexample.com:443"), false},
		{"http:domain:example.com", http("EXAMPLE.com:443"), false},
		{"http:domain:example.com", http(""), false},
		{"http:domain:kexample.com", http("\u212aexample.com:443"), false},
		{"http:domain:*.example.com", http("a.example.com:443"), true},
		{"http:domain:*.example.com", http("a.b.example.com:443"), true},
		{"http:domain:*.example.com", http("example.com:443"), false},
		{"http:domain:*.example.com", http(".example.com:443"), false},
		{"http:domain:*.example.com", http("aexample.com:443"), false},
		{"http:domain:example.com:8443", http("example.com:8443"), true},
		{"http:domain:example.com:8443", http("example.com:443"), false},
		{"http:domain:example.com:8443", http("example.com"), false},
		{"http:domain:*.example.com:8443", http("a.example.com:8443"), true},
		{"http:domain:*.example.com:8443", http("a.example.com:8444"), false},
		{"http:domain:10.0.0.0/8", http("10.1.2.3:80"), true},
		{"http:domain:10.0.0.0/8", http("11.1.2.3:80"), false},
		{"http:domain:10.0.0.0/8", http("10.example.com:80"), false},
		{"http:domain:10.0.0.0/8", http("[::ffff:10.0.0.1]:80"), false},
		{"http:domain:10.0.0.0/8", http("10.1:80"), false},
		{"http:domain:10.0.0.0/8", http("012.0.0.1:80"), false},
		{"http:domain:10.0.0.0/8:8080", http("10.1.2.3:8080"), true},
		{"http:domain:10.0.0.0/8:8080", http("10.1.2.3:80"), false},
		{"http:domain:fd00::/8", http("[fd12::1]:80"), true},
		{"http:domain:fd00::/8", http("[fe80::1]:80"), false},
		{"http:domain:fd00::/8", http("[fd12::1%eth0]:80"), false},
		{"http:domain:fd00::/8:81", http("[fd12::1]:81"), true},
		{"http:domain:127.0.0.1", http("127.0.0.1:80"), true},
		{"http:domain:127.0.0.1", http("127.0.0.2:80"), false},
		{"http:domain:[::1]", http("[::1]:80"), true},
		{"http:domain:[::1]:81", http("[::1]:80"), false},

		{"msg:publish", msg("publish", "a.b"), true},
		{"msg:publish", msg("publish", "a.*"), false},
		{"msg:publish", msg("publish", "a..b"), false},
		{"msg:publish", msg("subscribe", "a.b"), false},
		{"msg:publish:a.b", msg("publish", "a.b"), true},
		{"msg:publish:a.b", msg("publish", "a.b.c"), false},
		{"msg:publish:a.b", msg("publish", "a"), false},
		{"msg:publish:a.*", msg("publish", "a.b"), true},
		{"msg:publish:a.*", msg("publish", "a.*"), false},
		{"msg:publish:a.*", msg("publish", "a.b.c"), false},
		{"msg:publish:a.*", msg("publish", "a."), false},
		{"msg:publish:a.>", msg("publish", "a"), false},
		{"msg:publish:a.>", msg("publish", "a.b"), true},
		{"msg:publish:a.>", msg("publish", "a.b.c"), true},
		{"msg:publish:a.>", msg("publish", "a.>"), false},
		{"msg:publish:a.>", msg("publish", "a.b..c"), false},
		{"msg:publish:*.b", msg("publish", "x.b"), true},
		{"msg:publish:a.b", msg("publish", ""), false},
		{"msg:subscribe", msg("subscribe", ">"), true},
		{"msg:subscribe", msg("subscribe", "a.>.b"), false},
		{"msg:subscribe:>", msg("subscribe", ">"), true},
		{"msg:subscribe:>", msg("subscribe", "a.*"), true},
		{"msg:subscribe:a.>", msg("subscribe", "a.>"), true},
		{"msg:subscribe:a.>", msg("subscribe", "a.*.c"), true},
		{"msg:subscribe:a.>", msg("subscribe", ">"), false},
		{"msg:subscribe:a.>", msg("subscribe", "*.b"), false},
		{"msg:subscribe:a.*", msg("subscribe", "a.*"), true},
		{"msg:subscribe:a.*", msg("subscribe", "a.>"), false},
		{"msg:subscribe:a.*", msg("subscribe", "a.b"), true},
		{"msg:subscribe:a.b", msg("subscribe", "a.*"), false},
		{"msg:subscribe:a.*.c", msg("subscribe", "a.b.c"), true},
		{"msg:subscribe:a.*.c", msg("subscribe", "a.b.*"), false},
		{"msg:subscribe:a:b.*", msg("subscribe", "a:b.c"), true},

		{"provider:geo:lookup", call("geo", "lookup"), true},
		{"provider:geo:lookup", call("geo", "delete"), false},
		{"provider:geo:lookup", call("geo2", "lookup"), false},
		{"provider:geo:*", call("geo", "anything"), true},
		{"provider:geo:*", call("geo", ""), false},
		{"provider:geo:lookup", call("geo", "*"), false},
	}
	for _, tt := range tests {
		if got := mustParse(t, tt.permission).Covers(tt.need); got != tt.want {
			t.Errorf("%s covers %+v: got %v, want %v", tt.permission, tt.need, got, tt.want)
		}
	}
	if (Permission{}).Covers(Need{}) {
		t.Error("the zero permission covers something")
	}
}

func TestParseRefusesAndSuggests(t *testing.T) {
	tests := []struct {
		text, reason, suggestion string
	}{
		{"", `capability "" is unknown`, ""},
		{"kvv:read", `capability "kvv" is unknown; expected kv, http, msg or provider`, "kv:read"},
		{"KV:read", "is unknown", "kv:read"},
		{" kv:read", "is unknown", "kv:read"},
		{"messaging:publish:a", "is unknown", "msg:publish:a"},
		{"messaging:pub:a", "is unknown", "msg:publish:a"},
		{"https:request", "is unknown", "http:request"},
		{"prodiver:geo:x", "is unknown", "provider:geo:x"},
		{"banana", "is unknown", ""},
		{"kv", `action "" of kv is unknown; expected read, write or delete`, ""},
		{"kv:", "is unknown", ""},
		{"kv:raed:orders/", `action "raed" of kv is unknown`, "kv:read:orders/"},
		{"kv:get", "is unknown", "kv:read"},
		{"kv:set:a", "is unknown", "kv:write:a"},
		{"kv:read:", "a key prefix is expected", "kv:read"},
		{"http", "expected request or domain", ""},
		{"http:get", "is unknown", "http:request"},
		{"http:requset", "is unknown", "http:request"},
		{"http:example.com", "is unknown", "http:domain:example.com"},
		{"http:example.com:8443", "is unknown", "http:domain:example.com:8443"},
		{"http:request:example.com", "takes nothing more", "http:domain:example.com"},
		{"http:request:", "takes nothing more", "http:request"},
		{"http:domain", "a host is expected", ""},
		{"http:domain:", "a host is expected", ""},
		{"http:domain:Example.com", "lower case", "http:domain:example.com"},
		{"http:domain:example.com.", "must not end in a dot", "http:domain:example.com"},
		{"http:domain:https://example.com/x", "without scheme", "http:domain:example.com"},
		{"http:domain:example.com/x", "without path", "http:domain:example.com"},
		{"http:domain:example.com:0", `"0" is not a port`, ""},
		{"http:domain:example.com:", `"" is not a port`, ""},
		{"http:domain:example.com:65536", "is not a port", ""},
		{"http:domain:example.com:080", "is not a port", ""},
		{"http:domain:example.com:http", "is not a port", ""},
		{"http:domain:*", "a lone * names every host", ""},
		{"http:domain:*example.com", "* must be a whole label", "http:domain:*.example.com"},
		{"http:domain:a.*.com", "* may only be the first label", ""},
		{"http:domain:a..com", "empty label", ""},
		{"http:domain:a b.com", "holds \" \"", ""},
		{"http:domain:-a.com", "hyphen", ""},
		{"http:domain:bücher.example", "xn--", ""},
		{"http:domain:127.1", "ends in a number", ""},
		{"http:domain:0x7f000001", "ends in a number", ""},
		{"http:domain:2130706433", "ends in a number", ""},
		{"http:domain:*.2.3.4", "ends in a number", ""},
		{"http:domain:256.1.1.1", "ends in a number", ""},
		{"http:domain:10.0.0.1/8", "canonical", "http:domain:10.0.0.0/8"},
		{"http:domain:10.0.0.0/33", "is not an address range", ""},
		{"http:domain:fd00:0::/8", "canonical", "http:domain:fd00::/8"},
		{"http:domain:::1", "in brackets", "http:domain:[::1]"},
		{"http:domain:[0:0:0:0:0:0:0:1]", "canonical", "http:domain:[::1]"},
		{"http:domain:[::ffff:10.0.0.1]", "IPv4-mapped", "http:domain:10.0.0.1"},
		{"http:domain:[fe80::1%eth0]", "is not an IPv6 address", ""},
		{"http:domain:" + strings.Repeat("a", 64) + ".com", "longer than 63", ""},
		{"http:domain:" + strings.Repeat("a.", 127) + "com", "longer than 253", ""},
		{"msg:pub:a", "is unknown", "msg:publish:a"},
		{"msg:publish:", "a subject is expected", "msg:publish"},
		{"msg:publish:a..b", "is not a subject", ""},
		{"msg:publish:a/b", "", ""},
		{"msg:subscribe:a.>.b", "is not a subject", ""},
		{"msg:subscribe:a*", "is not a subject", ""},
		{"msg:subscribe:a b", "is not a subject", ""},
		{"msg:subscribe:a.b.", "is not a subject", "msg:subscribe:a.b"},
		{"provider", "is not a provider id", ""},
		{"provider:Geo:x", "is not a provider id", ""},
		{"provider:geo", "an operation is expected", "provider:geo:*"},
		{"provider:geo:", "an operation is expected", "provider:geo:*"},
		{"provider:geo:a b", "is not an operation", ""},
		{"provider:geo:a:b", "is not an operation", ""},
		{"kv:read:" + strings.Repeat("x", MaxLength), "the most is 512", ""},
	}
	for _, tt := range tests {
		p, err := Parse(tt.text)
		if tt.reason == "" {
			if err != nil {
				t.Errorf("Parse(%q) = %v, want no error", tt.text, err)
			}
			continue
		}
		var syntax *SyntaxError
		if !errors.As(err, &syntax) || !errors.Is(err, ErrSyntax) {
			t.Errorf("Parse(%q) = %v, %v; want a SyntaxError", tt.text, p, err)
			continue
		}
		if !strings.Contains(err.Error(), tt.reason) || syntax.Suggestion != tt.suggestion {
			t.Errorf("Parse(%q): got %q with suggestion %q, want %q with suggestion %q",
				tt.text, err, syntax.Suggestion, tt.reason, tt.suggestion)
		}
		if p != (Permission{}) {
			t.Errorf("Parse(%q) returned a permission beside its error", tt.text)
		}
	}
}

func TestParseNeed(t *testing.T) {
	tests := []struct {
		text string
		want Need
	}{
		{"kv:read:orders/17", kv("read", "orders/17")},
		{"kv:read", kv("read", "")},
		{"http:request", http("")},
		{"http:domain:example.com:443", http("example.com:443")},
		{"msg:publish:a.b", msg("publish", "a.b")},
		{"msg:subscribe:a.>", msg("subscribe", "a.>")},
		{"provider:geo:lookup", call("geo", "lookup")},
	}
	for _, tt := range tests {
		got, err := ParseNeed(tt.text)
		if err != nil || got != tt.want {
			t.Errorf("ParseNeed(%q) = %+v, %v; want %+v", tt.text, got, err, tt.want)
		}
	}
	for _, text := range []string{"", "kv:get", "msg:publish:a.*", "http:domain:*.example.com", "http:domain:10.0.0.0/8"} {
		if got, err := ParseNeed(text); !errors.Is(err, ErrSyntax) {
			t.Errorf("ParseNeed(%q) = %+v, %v; want ErrSyntax", text, got, err)
		}
	}
}

func TestCoversDoesNotAllocate(t *testing.T) {
	set := mustSet(t, "kv:read:a/", "kv:read:b/", "http:request", "http:domain:*.example.com",
		"http:domain:10.0.0.0/8", "http:domain:fd00::/8", "msg:subscribe:a.*.>", "provider:geo:lookup")
	needs := []Need{
		kv("read", "b/1"), kv("read", "c"), http("a.example.com:443"), http("10.1.2.3:80"), http("[fd00::1]:80"),
		http("other.org:80"), msg("subscribe", "a.b.c"), call("geo", "lookup"),
	}
	allocations := testing.AllocsPerRun(100, func() {
		for _, n := range needs {
			set.Allows(n)
		}
	})
	if allocations != 0 {
		t.Errorf("Allows allocated %v times for %d needs, want 0", allocations, len(needs))
	}
}

func BenchmarkAllows(b *testing.B) {
	set := mustSet(b, "kv:read:a/", "kv:read:b/", "kv:write", "http:request", "http:domain:*.example.com",
		"http:domain:10.0.0.0/8", "msg:subscribe:a.*.>", "msg:publish:a.*.>")
	for name, n := range map[string]Need{
		"kv":        kv("read", "b/1"),
		"domain":    http("www.example.com:443"),
		"cidr":      http("10.1.2.3:80"),
		"subject":   msg("subscribe", "a.b.c.d"),
		"publish":   msg("publish", "a.b.c.d"),
		"kv-denied": kv("delete", "b/1"),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				set.Allows(n)
			}
		})
	}
}
