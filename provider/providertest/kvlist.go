package providertest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func testList(t *testing.T, f *fixture) {
	for _, k := range []string{"b", "a", "a\x00", "a\xff", "ab", "\xff", "\x00", "b/1", "b/2", "c"} {
		f.set(k, "v"+k, 0)
	}
	for prefix, want := range map[string][]string{
		"":     {"\x00", "a", "a\x00", "ab", "a\xff", "b", "b/1", "b/2", "c", "\xff"},
		"a":    {"a", "a\x00", "ab", "a\xff"},
		"b/":   {"b/1", "b/2"},
		"\xff": {"\xff"},
		"none": nil,
	} {
		got := f.list(&pb.KvListRequest{Prefix: []byte(prefix)})
		if !slices.Equal(keys(got), want) || len(got.GetNextCursor()) != 0 {
			t.Errorf("list %q = %q cursor %q, want %q", prefix, keys(got), got.GetNextCursor(), want)
		}
		for _, e := range got.GetEntries() {
			if string(e.GetValue()) != "v"+string(e.GetKey()) || e.GetVersion() != f.get(string(e.GetKey())).GetVersion() {
				t.Errorf("entry %v does not agree with get", e)
			}
		}
	}
	for _, e := range f.list(&pb.KvListRequest{KeysOnly: true}).GetEntries() {
		if len(e.GetValue()) != 0 || e.GetVersion() == 0 {
			t.Errorf("keys only, and entry %v", e)
		}
	}
}

func (f *fixture) pages(request *pb.KvListRequest) (all []string, pages int) {
	f.Helper()
	for {
		got := f.list(request)
		all = append(all, keys(got)...)
		if limit := int(request.GetLimit()); len(got.GetEntries()) > max(limit, 1) && limit > 0 {
			f.Fatalf("a page of %d entries, the limit is %d", len(got.GetEntries()), limit)
		}
		pages++
		if len(got.GetNextCursor()) == 0 {
			return all, pages
		}
		if bytes.Equal(got.GetNextCursor(), request.GetCursor()) || pages > 10000 {
			f.Fatal("the listing does not end")
		}
		request.Cursor = got.GetNextCursor()
	}
}

func testListPages(t *testing.T, f *fixture) {
	var want []string
	for i := range 230 {
		k := fmt.Sprintf("p/%03d", i)
		f.set(k, "v", 0)
		want = append(want, k)
	}
	f.set("o", "before", 0)
	f.set("q", "after", 0)
	for limit, pages := range map[uint32]int{0: 3, 1: 230, 115: 2, 229: 2, 230: 1, 1000: 1} {
		got, n := f.pages(&pb.KvListRequest{Prefix: []byte("p/"), Limit: limit})
		if !slices.Equal(got, want) || n != pages {
			t.Errorf("limit %d: %d keys in %d pages, want %d in %d", limit, len(got), n, len(want), pages)
		}
	}
	// A key that is deleted between pages does not break the walk.
	first := f.list(&pb.KvListRequest{Prefix: []byte("p/"), Limit: 10})
	f.del("p/009")
	f.del("p/010")
	next := f.list(&pb.KvListRequest{Prefix: []byte("p/"), Limit: 1, Cursor: first.GetNextCursor()})
	if got := keys(next); !slices.Equal(got, []string{"p/011"}) {
		t.Errorf("the page after deleted keys is %q", got)
	}
}

func testListBytes(t *testing.T, f *fixture) {
	large := strings.Repeat("x", 400<<10)
	var want []string
	for i := range 6 {
		k := fmt.Sprint(i)
		f.set(k, large, 0)
		want = append(want, k)
	}
	f.set("6", strings.Repeat("y", 1<<20), 0)
	want = append(want, "6")
	request := &pb.KvListRequest{}
	var got []string
	for {
		page := f.list(request)
		size := 0
		for _, e := range page.GetEntries() {
			size += len(e.GetKey()) + len(e.GetValue())
		}
		if size > 2<<20 {
			t.Fatalf("a page of %d bytes", size)
		}
		got = append(got, keys(page)...)
		if len(page.GetNextCursor()) == 0 {
			break
		}
		request.Cursor = page.GetNextCursor()
	}
	if !slices.Equal(got, want) {
		t.Errorf("pages hold %q, want %q", got, want)
	}
	if page := f.list(&pb.KvListRequest{KeysOnly: true}); len(page.GetEntries()) != len(want) {
		t.Errorf("keys only has %d entries, want %d: values must not count", len(page.GetEntries()), len(want))
	}
}

func testListExpired(t *testing.T, f *fixture) {
	var want []string
	for i := range 50 {
		k := fmt.Sprintf("%02d", i)
		if i%2 == 0 {
			f.set(k, "v", time.Second)
		} else {
			f.set(k, "v", 0)
			want = append(want, k)
		}
	}
	f.clock.advance(time.Minute)
	if got, _ := f.pages(&pb.KvListRequest{Limit: 7}); !slices.Equal(got, want) {
		t.Errorf("list = %q, want %q", got, want)
	}
}

func testListCursorPrefix(t *testing.T, f *fixture) {
	for _, k := range []string{"a/1", "b/1", "b/2", "c/1"} {
		f.set(k, "v", 0)
	}
	for cursor, want := range map[string][]string{
		"":         {"b/1", "b/2"},
		"a":        {"b/1", "b/2"},
		"a/1":      {"b/1", "b/2"},
		"b/1":      {"b/2"},
		"b/1\x00":  {"b/2"},
		"b/2":      nil,
		"c/1":      nil,
		"\xff\xff": nil,
	} {
		got := f.list(&pb.KvListRequest{Prefix: []byte("b/"), Cursor: []byte(cursor)})
		if !slices.Equal(keys(got), want) || len(got.GetNextCursor()) != 0 {
			t.Errorf("after cursor %q: %q, want %q", cursor, keys(got), want)
		}
	}
}

func testBuckets(t *testing.T, f *fixture) {
	// Pairs that meet under any encoding that only joins bucket and key.
	pairs := [][2]string{
		{"a", "bc"},
		{"ab", "c"},
		{"a/", "c"},
		{"a", "/c"},
		{"a\x00", "c"},
		{"a", "\x00c"},
		{"\x01a", "c"},
		{"a", "c"},
		{"\x01", "ac"},
		{"*", "c"},
		{"a.b", "c"},
		{"a", ".bc"},
		{"A", "c"},
		{"{a}", "c"},
		{"a}", "c"},
		{"}", "c"},
		{"a}:data", "c"},
		{"%61", "c"},
		{"1:a", "c"},
		{"c5", "c"},
		{" ", "c"},
		{">", "c"},
		{"\xff", "c"},
		{"\xc3\xbf", "c"},
		{strings.Repeat("b", 128), "c"},
	}
	for i, p := range pairs {
		f.in(p[0]).set(p[1], fmt.Sprint(i), 0)
	}
	count := map[string]int{}
	for i, p := range pairs {
		f.in(p[0]).wantValue(p[1], fmt.Sprint(i))
		count[p[0]]++
	}
	for bucket, want := range count {
		if got := f.in(bucket).list(&pb.KvListRequest{}); len(got.GetEntries()) != want {
			t.Errorf("bucket %q lists %q, want %d keys", bucket, keys(got), want)
		}
	}
	f.in("a").del("bc")
	f.in("ab").wantValue("c", "1")
	f.in("a").wantMissing("bc")
}

// modelEntry is what the model knows of a key.
type modelEntry struct {
	value   string
	version uint64
	expires time.Time
}

// testModel compares random histories over few keys with a map.
func testModel(t *testing.T, f *fixture) {
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		g := f.in(fmt.Sprintf("model-%d", n))
		model := map[string]modelEntry{}
		key := rapid.SampledFrom([]string{"a", "ab", "b", "\x00", "\xff"})
		alive := func(k string) (modelEntry, bool) {
			if e, ok := model[k]; ok && (e.expires.IsZero() || e.expires.After(g.clock.now())) {
				return e, true
			}
			return modelEntry{}, false
		}
		store := func(k, v string, version uint64, ttl time.Duration) {
			e := modelEntry{value: v, version: version}
			if ttl > 0 {
				e.expires = g.clock.now().Add(ttl)
			}
			model[k] = e
		}
		rt.Repeat(map[string]func(*rapid.T){
			"set": func(rt *rapid.T) {
				k, v := key.Draw(rt, "key"), rapid.String().Draw(rt, "value")
				ttl := time.Duration(rapid.IntRange(0, 2).Draw(rt, "ttl")) * time.Second
				store(k, v, g.set(k, v, ttl), ttl)
			},
			"delete": func(rt *rapid.T) {
				k := key.Draw(rt, "key")
				_, want := alive(k)
				if got := g.del(k); got != want {
					rt.Fatalf("delete %q existed %v, want %v", k, got, want)
				}
				delete(model, k)
			},
			"cas": func(rt *rapid.T) {
				k := key.Draw(rt, "key")
				e, _ := alive(k)
				expected := e.version
				if rapid.Bool().Draw(rt, "wrong") {
					expected++
				}
				swapped, version := g.cas(k, expected, "cas")
				if swapped != (expected == e.version) || !swapped && version != e.version {
					rt.Fatalf("cas %q over %d = %v, %d; the model has %d", k, expected, swapped, version, e.version)
				}
				if swapped {
					store(k, "cas", version, 0)
				}
			},
			"wait": func(*rapid.T) { g.clock.advance(700 * time.Millisecond) },
			"": func(rt *rapid.T) {
				var want []string
				for k := range model {
					e, ok := alive(k)
					got := g.get(k)
					if got.GetFound() != ok || ok && (string(got.GetValue()) != e.value || got.GetVersion() != e.version) {
						rt.Fatalf("get %q = %v, the model has %v, %v", k, got, e, ok)
					}
					if ok {
						want = append(want, k)
					}
				}
				slices.Sort(want)
				if got := keys(g.list(&pb.KvListRequest{})); !slices.Equal(got, want) {
					rt.Fatalf("list = %q, the model has %q", got, want)
				}
			},
		})
	})
}
