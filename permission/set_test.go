package permission

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestSetAllows(t *testing.T) {
	tests := []struct {
		name    string
		set     []string
		need    Need
		by      string // "" is denied
		missing []string
	}{
		{"nothing is granted by default", nil, kv("read", "a"), "", []string{"kv:read:a"}},
		{"the first that covers decides", []string{"kv:read:b", "kv:read:a", "kv:read"}, kv("read", "a1"), "kv:read:a", nil},
		{"write does not imply read", []string{"kv:write"}, kv("read", "a"), "", []string{"kv:read:a"}},
		{"a binary key is not put into a permission", nil, kv("read", "\xff"), "", []string{"kv:read"}},
		{"request alone allows every host", []string{"http:request"}, http("x.org:80"), "http:request", nil},
		{"a domain alone allows nothing", []string{"http:domain:x.org"}, http("x.org:80"), "", []string{"http:request"}},
		{"a domain narrows", []string{"http:request", "http:domain:x.org"}, http("y.org:80"), "", []string{"http:domain:y.org:80"}},
		{"a domain narrows in any order", []string{"http:domain:x.org", "http:request"}, http("x.org:80"), "http:domain:x.org", nil},
		{
			"both are missing",
			[]string{"http:domain:x.org"},
			http("y.org:80"), "",
			[]string{"http:request", "http:domain:y.org:80"},
		},
		{"no http at all", []string{"kv:read"}, http("y.org:80"), "", []string{"http:request"}},
		{"domains leave kv alone", []string{"http:domain:x.org", "kv:read"}, kv("read", "a"), "kv:read", nil},
		{"messaging", []string{"msg:publish:a.*"}, msg("publish", "a.b"), "msg:publish:a.*", nil},
		{"messaging denied", []string{"msg:publish:a.*"}, msg("publish", "b.b"), "", []string{"msg:publish:b.b"}},
		{"external", []string{"provider:geo:*"}, call("geo", "find"), "provider:geo:*", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := mustSet(t, tt.set...)
			by, ok := set.Allows(tt.need)
			if by.String() != tt.by || ok != (tt.by != "") {
				t.Errorf("Allows = %q, %v; want %q", by, ok, tt.by)
			}
			missing := set.Missing(tt.need)
			if !slices.Equal(missing, tt.missing) {
				t.Errorf("Missing = %q, want %q", missing, tt.missing)
			}
			if after := mustSet(t, append(slices.Clone(tt.set), missing...)...); !ok {
				if _, ok := after.Allows(tt.need); !ok {
					t.Errorf("still denied after adding %q", missing)
				}
			}
		})
	}
}

func TestExplainNamesTheRuleThatDecided(t *testing.T) {
	tests := []struct {
		set  []string
		need Need
		want string
	}{
		{[]string{"kv:read:orders/"}, kv("read", "orders/1"), "allowed: kv:read:orders/1 by kv:read:orders/"},
		{nil, kv("read", "a"), "denied: kv:read:a: no permission for kv was granted; it takes kv:read:a"},
		{
			[]string{"kv:read:orders/", "msg:publish"},
			kv("read", "a b"),
			`denied: "kv:read:a b": not covered by kv:read:orders/; it takes kv:read:a b`,
		},
		{
			[]string{"http:domain:x.org"},
			http("x.org:80"),
			"denied: http:domain:x.org:80: http:domain only narrows http:request, which was not granted; it takes http:request",
		},
	}
	for _, tt := range tests {
		if got := mustSet(t, tt.set...).Explain(tt.need); got != tt.want {
			t.Errorf("Explain = %q, want %q", got, tt.want)
		}
	}
}

func TestParseSetKeepsOrderAndDropsRepeats(t *testing.T) {
	set := mustSet(t, "kv:write", "kv:read", "kv:write")
	if got := set.Strings(); !slices.Equal(got, []string{"kv:write", "kv:read"}) || set.Len() != 2 {
		t.Errorf("Strings = %q", got)
	}
}

func TestParseSetReportsEveryMistake(t *testing.T) {
	_, err := ParseSet([]string{"kv:raed", "kv:write", "msg:pub"})
	if !errors.Is(err, ErrSyntax) || !strings.Contains(err.Error(), "kv:raed") || !strings.Contains(err.Error(), "msg:pub") {
		t.Errorf("error %v does not name both mistakes", err)
	}
}

func TestForImport(t *testing.T) {
	tests := []struct {
		capability, operation, grant string
	}{
		{"kv", "get", "kv:read:x"},
		{"kv", "list", "kv:read"},
		{"kv", "set", "kv:write"},
		{"kv", "cas", "kv:write"},
		{"kv", "delete", "kv:delete"},
		{"http", "request", "http:request"},
		{"messaging", "publish", "msg:publish:a"},
		{"messaging", "request", "msg:publish"},
		{"messaging", "subscribe", "msg:subscribe:a.*"},
		{"messaging", "unsubscribe", "msg:subscribe"},
		{"provider", "call", "provider:geo:find"},
	}
	for _, tt := range tests {
		need, ok := ForImport(tt.capability, tt.operation)
		if !ok || need.Resource != "" {
			t.Errorf("ForImport(%s, %s) = %+v, %v", tt.capability, tt.operation, need, ok)
		}
		if !mustSet(t, tt.grant).MayEver(need) {
			t.Errorf("%s may not be enough for %s %s", tt.grant, tt.capability, tt.operation)
		}
		if mustSet(t, "http:domain:x.org").MayEver(need) || (Set{}).MayEver(need) {
			t.Errorf("%s %s may be called without its permission", tt.capability, tt.operation)
		}
	}
	for _, none := range [][2]string{{"log", "write"}, {"context", "get"}, {"kv", "drop"}} {
		if need, ok := ForImport(none[0], none[1]); ok {
			t.Errorf("ForImport(%s, %s) = %+v, want none", none[0], none[1], need)
		}
	}
}
