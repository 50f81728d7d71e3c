package setting_test

import (
	"errors"
	"maps"
	"math"
	"regexp"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// refused holds the error of a Reader to what every error about a setting must be.
func refused(t *testing.T, r *setting.Reader, name, message string) {
	t.Helper()
	err := r.Done()
	e, ours := errors.AsType[*provider.Error](err)
	if !ours || !errors.Is(err, provider.ErrInvalid) || e.Details["setting"] != name || e.Message != message {
		t.Errorf("got  %v\nwant ErrInvalid for setting %s: %s", err, name, message)
	}
}

// reading is one way to read the setting x, and its default.
type reading struct {
	read      func(*setting.Reader) any
	otherwise any
}

var (
	word   = reading{func(r *setting.Reader) any { return r.Text("x") }, ""}
	match  = reading{func(r *setting.Reader) any { return r.Match("x", "o", regexp.MustCompile(`^[a-z]+$`), "letters") }, "o"}
	choice = reading{func(r *setting.Reader) any { return r.Choice("x", "a", "b", "c") }, "a"}
	boolOn = reading{func(r *setting.Reader) any { return r.Bool("x", true) }, true}
	count  = reading{func(r *setting.Reader) any { return r.Count("x", 3, 0, 9) }, 3}
	size   = reading{func(r *setting.Reader) any { return r.Size("x", -1, 1<<10, 3<<19) }, int64(-1)}
	large  = reading{func(r *setting.Reader) any { return r.Size("x", 0, 1000, 0) }, int64(0)}
	span   = reading{func(r *setting.Reader) any { return r.Duration("x", time.Minute, 10*time.Second, 90*time.Minute) }, time.Minute}
	hours  = reading{func(r *setting.Reader) any { return r.Duration("x", 0, time.Millisecond, 10*time.Hour) }, time.Duration(0)}
)

func TestValuesWithinTheirLimitsAreRead(t *testing.T) {
	for _, c := range []struct {
		by   reading
		text string
		want any
	}{
		{word, "any text", "any text"},
		{word, "", ""},
		{match, "abc", "abc"},
		{choice, "c", "c"},
		{boolOn, "false", false},
		{boolOn, "1", true},
		{count, "0", 0},
		{count, "9", 9},
		{size, "1024", int64(1024)},
		{size, "1536KiB", int64(3 << 19)},
		{size, "1MiB", int64(1 << 20)},
		{large, "2GiB", int64(2 << 30)},
		{large, "3TiB", int64(3 << 40)},
		{large, "9223372036854775807", int64(math.MaxInt64)},
		{large, "8388607TiB", int64(8388607 << 40)},
		{span, "10s", 10 * time.Second},
		{span, "1h30m", 90 * time.Minute},
	} {
		r := setting.New("kv", "memory", map[string]string{"x": c.text})
		if got := c.by.read(r); got != c.want || r.Done() != nil {
			t.Errorf("%q: got %v and %v, want %v", c.text, got, r.Done(), c.want)
		}
		if got := c.by.read(setting.New("kv", "memory", nil)); got != c.by.otherwise {
			t.Errorf("not given: got %v, want %v", got, c.by.otherwise)
		}
	}
}

func TestOtherValuesAreRefused(t *testing.T) {
	for _, c := range []struct {
		by       reading
		texts    []string
		expected string
	}{
		{match, []string{"", "A", "a\n"}, "letters"},
		{choice, []string{"", "d", "A"}, "a, b or c"},
		{boolOn, []string{"", "yes", "2"}, "true or false"},
		{count, []string{"", "-1", "10", "1.5", "many", "99999999999999999999"}, "a number from 0 to 9"},
		{size, []string{"", "0", "-1MiB", "1023", "1537KiB", "1 MiB", "1MB", "MiB", "1.5MiB"}, "a size from 1KiB to 1536KiB"},
		{large, []string{"999", "8388608TiB", "99999999999TiB", "9223372036854775808"}, "a size of at least 1000 such as 512MiB"},
		{span, []string{"", "10", "9s", "91m", "-1m", "soon"}, "a duration from 10s to 1h30m such as 30s"},
		{hours, []string{"0", "11h"}, "a duration from 1ms to 10h such as 30s"},
	} {
		for _, text := range c.texts {
			r := setting.New("kv", "memory", map[string]string{"x": text})
			if got := c.by.read(r); got != c.by.otherwise {
				t.Errorf("%q: got %v, want the default %v", text, got, c.by.otherwise)
			}
			want := setting.New("kv", "memory", nil)
			want.Wrong("x", text, c.expected)
			refused(t, r, "x", want.Done().Error())
		}
	}
}

func TestErrorsSayWhoseSettingItIs(t *testing.T) {
	r := setting.New("http", "direct", map[string]string{"max": "no"})
	r.Count("max", 1, 1, 2)
	refused(t, r, "max", `setting max of http driver direct is "no"; expected a number from 1 to 2`)
}

func TestTheFirstErrorWins(t *testing.T) {
	r := setting.New("kv", "redis", map[string]string{"n": "x", "b": "x", "unknown": "x"})
	r.Bool("b", false)
	r.Count("n", 1, 1, 2)
	r.Fail("url", "%s needs a url", r)
	refused(t, r, "b", `setting b of kv driver redis is "x"; expected true or false`)
}

func TestADriverSaysMore(t *testing.T) {
	r := setting.New("kv", "redis", nil)
	r.Refuse("url", provider.Errorf(provider.ErrInvalid, "%s needs a url", r).NextStep("set one"))
	refused(t, r, "url", "kv driver redis needs a url")
	if e, _ := errors.AsType[*provider.Error](r.Done()); e.Next != "set one" {
		t.Errorf("next: %q", e.Next)
	}
}

func TestUnknownSettingsAreNamedWithTheKnownOnes(t *testing.T) {
	given := map[string]string{"b": "1", "z": "1", "y": "1"}
	before := maps.Clone(given)
	r := setting.New("kv", "redis", given)
	r.Text("c")
	r.Text("b")
	r.Text("c")
	if !r.Has("z") || r.Has("c") {
		t.Error("Has is wrong")
	}
	refused(t, r, "y", "kv driver redis has no setting y, z; expected c, b")
	if !maps.Equal(given, before) {
		t.Errorf("what was given is now %v", given)
	}
}

func TestMoreMayBeReadAfterDone(t *testing.T) {
	r := setting.New("kv", "redis", map[string]string{"a": "x"})
	r.Text("a")
	if err := r.Done(); err != nil {
		t.Fatal(err)
	}
	r.Wrong("a", "x", "y")
	refused(t, r, "a", `setting a of kv driver redis is "x"; expected y`)
}

func TestTwoSettingsGoTogether(t *testing.T) {
	for _, c := range []struct{ a, b, missing string }{
		{"", "", ""}, {"1", "1", ""}, {"1", "", "b"}, {"", "1", "a"},
	} {
		r := setting.New("kv", "nats", map[string]string{"a": c.a, "b": c.b})
		r.Both("a", "b")
		if c.missing != "" {
			refused(t, r, c.missing, "kv driver nats needs both of a and b, or neither")
		} else if err := r.Done(); err != nil {
			t.Error(err)
		}
	}
}
