package permission

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"kv:read", "kv:write:a:b", "http:request", "http:domain:*.example.com:8443", "http:domain:10.0.0.0/8",
		"http:domain:[::1]:80", "http:domain:fd00::/8:1", "msg:publish:a.*.>", "provider:geo:*", "kv:raed", "http:domain:::",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := Parse(s)
		if err != nil {
			if suggestion := permissionSuggestion(err); suggestion != "" {
				mustParse(t, suggestion)
			}
			return
		}
		if p.String() != s {
			t.Fatalf("Parse(%q).String() = %q", s, p)
		}
		if again := mustParse(t, p.String()); again != p {
			t.Fatalf("Parse(%q) differs the second time", s)
		}
		if n, err := ParseNeed(s); err == nil && !p.Covers(n) {
			t.Fatalf("%q does not cover itself: %+v", s, n)
		}
	})
}

func permissionSuggestion(err error) string {
	if syntax, ok := errors.AsType[*SyntaxError](err); ok {
		return syntax.Suggestion
	}
	return ""
}

func FuzzCovers(f *testing.F) {
	f.Add("kv:read:a", "kv", "read", "ab")
	f.Add("http:domain:*.example.com", "http", "request", "a.example.com:1")
	f.Add("msg:subscribe:a.>", "messaging", "subscribe", "a.*")
	f.Fuzz(func(t *testing.T, text, capability, action, resource string) {
		p, err := Parse(text)
		if err != nil {
			return
		}
		n := Need{Capability: capability, Action: action, Resource: resource}
		if p.Covers(n) && p.Capability() != capability {
			t.Fatalf("%q covers %+v of another capability", text, n)
		}
		set := mustSet(t, text)
		_, allowed := set.Allows(n)
		if allowed && !p.Covers(n) {
			t.Fatalf("{%q} allows %+v which it does not cover", text, n)
		}
		if allowed != strings.HasPrefix(set.Explain(n), "allowed: ") {
			t.Fatalf("Explain disagrees with Allows: %s", set.Explain(n))
		}
	})
}

var token = rapid.SampledFrom([]string{"a", "b", "c", "*"})

func subject(last ...string) *rapid.Generator[[]string] {
	return rapid.Custom(func(t *rapid.T) []string {
		tokens := rapid.SliceOfN(token, 1, 4).Draw(t, "tokens")
		if rapid.Bool().Draw(t, "tail") {
			tokens = append(tokens, last...)
		}
		return tokens
	})
}

// matches is the definition of the wildcards, for a literal subject.
func matches(pattern, literal []string) bool {
	for i, p := range pattern {
		if p == ">" {
			return len(literal) > i
		}
		if i >= len(literal) || p != "*" && p != literal[i] {
			return false
		}
	}
	return len(pattern) == len(literal)
}

// A pattern covers a need exactly when every literal subject that the need
// matches is matched by the pattern too. Literals over a, b, c and one token
// that no pattern names, up to one longer than any pattern, decide that.
func TestSubscribeCoversExactlyTheSubset(t *testing.T) {
	var literals [][]string
	var grow func(prefix []string)
	grow = func(prefix []string) {
		if len(prefix) > 0 {
			literals = append(literals, slices.Clone(prefix))
		}
		if len(prefix) == 6 {
			return
		}
		for _, s := range []string{"a", "b", "c", "other"} {
			grow(append(prefix, s))
		}
	}
	grow(nil)
	rapid.Check(t, func(t *rapid.T) {
		pattern, need := subject(">").Draw(t, "pattern"), subject(">").Draw(t, "need")
		subset := true
		for _, literal := range literals {
			if matches(need, literal) && !matches(pattern, literal) {
				subset = false
				break
			}
		}
		p, err := Parse("msg:subscribe:" + strings.Join(pattern, "."))
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Covers(msg("subscribe", strings.Join(need, "."))); got != subset {
			t.Fatalf("%v covers %v: got %v, want %v", pattern, need, got, subset)
		}
	})
}

// Publishing is allowed exactly to what is a subject, has no wildcard, and matches.
func TestPublishCoversExactlyTheMatches(t *testing.T) {
	for need, want := range map[string]bool{"a.b": true, "a..b": false, "a.b.": false, ".a": false, "a": false, "a.*": false, "": false} {
		if got := mustParse(t, "msg:publish:a.>").Covers(msg("publish", need)); got != want {
			t.Errorf("a.> covers %q: got %v", need, got)
		}
	}
	if mustParse(t, "msg:publish:a.*").Covers(msg("publish", "a.b.c")) {
		t.Error("a.* covers a.b.c")
	}
	rapid.Check(t, func(t *rapid.T) {
		pattern := subject(">").Draw(t, "pattern")
		p, err := Parse("msg:publish:" + strings.Join(pattern, "."))
		if err != nil {
			t.Fatal(err)
		}
		need := rapid.OneOf(
			rapid.Map(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "ab", "", "*"}), 1, 4), func(s []string) string { return strings.Join(s, ".") }),
			rapid.StringOfN(rapid.SampledFrom([]rune("abc..*> \x7f")), 0, 9, -1),
		).Draw(t, "need")
		tokens := strings.Split(need, ".")
		want := !slices.Contains(tokens, "") && !strings.ContainsAny(need, "*> \x7f") && matches(pattern, tokens)
		if got := p.Covers(msg("publish", need)); got != want {
			t.Fatalf("%v covers %q: got %v, want %v", pattern, need, got, want)
		}
	})
}

func TestKVCoversIsThePrefixRelation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.StringOfN(rapid.RuneFrom([]rune("ab:/ö")), 0, 6, -1).Draw(t, "key")
		prefix := rapid.StringOfN(rapid.RuneFrom([]rune("ab:/ö")), 1, 3, -1).Draw(t, "prefix")
		p, err := Parse("kv:read:" + prefix)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Covers(kv("read", key)); got != strings.HasPrefix(key, prefix) {
			t.Fatalf("%q covers %q: %v", prefix, key, got)
		}
	})
}

// Adding a permission never takes anything away, but for the one rule that says
// so: the first http:domain narrows http:request.
func TestGrantsOnlyAdd(t *testing.T) {
	texts := []string{
		"kv:read", "kv:read:a", "kv:write:b", "http:request", "msg:publish:a.*", "msg:subscribe:>",
		"provider:geo:*", "provider:geo:find",
	}
	needs := []Need{
		kv("read", "ab"), kv("write", "b"), kv("delete", "a"), http("x.org:1"), msg("publish", "a.b"),
		msg("subscribe", "a"), call("geo", "find"),
	}
	rapid.Check(t, func(t *rapid.T) {
		some := rapid.SliceOfDistinct(rapid.SampledFrom(texts), rapid.ID[string]).Draw(t, "some")
		more := append(slices.Clone(some), rapid.SampledFrom(texts).Draw(t, "more"))
		before, err := ParseSet(some)
		if err != nil {
			t.Fatal(err)
		}
		after, err := ParseSet(more)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range needs {
			_, was := before.Allows(n)
			if _, is := after.Allows(n); was && !is {
				t.Fatalf("%v allowed %+v and %v does not", some, n, more)
			}
		}
	})
}
