package setting

import (
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

// Reader reads the settings of one driver. Each method that reads one names it as
// known; what nobody asked for is unknown, and Done refuses it. The first thing that
// is wrong is kept and returned by Done, and the methods go on with defaults, so that
// a driver asks for all it knows and looks for an error once. It is not safe for
// concurrent use.
type Reader struct {
	owner string // such as "kv driver redis"
	given map[string]string
	known []string // in the order in which they were asked for
	err   error
}

// New returns a Reader of the settings given to a driver of a capability. It does
// not change the map.
func New(capability, driver string, given map[string]string) *Reader {
	return &Reader{owner: capability + " driver " + driver, given: given}
}

// String returns whose settings these are, such as "kv driver redis".
func (r *Reader) String() string { return r.owner }

// Has reports whether a setting is given. It does not make it a known one.
func (r *Reader) Has(name string) bool {
	_, given := r.given[name]
	return given
}

// Text returns a setting as it was given; "" when it is not.
func (r *Reader) Text(name string) string {
	v, _ := r.lookup(name)
	return v
}

// Match returns a setting that the pattern matches, or otherwise when it is not
// given. What the pattern asks for is said in words by expected.
func (r *Reader) Match(name, otherwise string, pattern *regexp.Regexp, expected string) string {
	v, given := r.lookup(name)
	if !given {
		return otherwise
	}
	if !pattern.MatchString(v) {
		r.Wrong(name, v, expected)
		return otherwise
	}
	return v
}

// Choice returns a setting that is one of values, of which there are at least two.
// The first is the default.
func (r *Reader) Choice(name string, values ...string) string {
	v, given := r.lookup(name)
	if !given {
		return values[0]
	}
	if !slices.Contains(values, v) {
		last := len(values) - 1
		r.Wrong(name, v, strings.Join(values[:last], ", ")+" or "+values[last])
		return values[0]
	}
	return v
}

// Bool returns a setting that is true or false, in any spelling of
// strconv.ParseBool, or otherwise when it is not given.
func (r *Reader) Bool(name string, otherwise bool) bool {
	v, given := r.lookup(name)
	if !given {
		return otherwise
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		r.Wrong(name, v, "true or false")
		return otherwise
	}
	return b
}

// Count returns a setting that is a whole number from least to most, or otherwise
// when it is not given.
func (r *Reader) Count(name string, otherwise, least, most int) int {
	v, given := r.lookup(name)
	if !given {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		r.Wrong(name, v, "a number from "+strconv.Itoa(least)+" to "+strconv.Itoa(most))
		return otherwise
	}
	return n
}

// Size returns a setting that is a number of bytes from least to most, such as
// 65536 or 512MiB, or otherwise when it is not given. A most of 0 is no limit; least
// is at least 1.
func (r *Reader) Size(name string, otherwise, least, most int64) int64 {
	v, given := r.lookup(name)
	if !given {
		return otherwise
	}
	n, ok := parseSize(v)
	switch {
	case ok && n >= least && (most == 0 || n <= most):
		return n
	case most == 0:
		r.Wrong(name, v, "a size of at least "+formatSize(least)+" such as 512MiB")
	default:
		r.Wrong(name, v, "a size from "+formatSize(least)+" to "+formatSize(most))
	}
	return otherwise
}

// Duration returns a setting that is a duration from least to most, such as 500ms,
// or otherwise when it is not given.
func (r *Reader) Duration(name string, otherwise, least, most time.Duration) time.Duration {
	v, given := r.lookup(name)
	if !given {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < least || d > most {
		r.Wrong(name, v, "a duration from "+formatDuration(least)+" to "+formatDuration(most)+" such as 30s")
		return otherwise
	}
	return d
}

// Both refuses one of two settings without the other. An empty one counts as not
// given.
func (r *Reader) Both(a, b string) {
	missing := a
	if r.Text(a) != "" {
		missing = b
	}
	if (r.Text(a) == "") != (r.Text(b) == "") {
		r.Fail(missing, "%s needs both of %s and %s, or neither", r, a, b)
	}
}

// Wrong says that a setting has a wrong value, which the error repeats, and what was
// expected instead.
func (r *Reader) Wrong(name, value, expected string) {
	r.Fail(name, "setting %s of %s is %q; expected %s", name, r, value, expected)
}

// Fail says what is wrong with a setting in words of the driver's own. The error
// wraps provider.ErrInvalid and names the setting. Everybody who may see the provider
// sees the text, so it must not hold a secret.
func (r *Reader) Fail(name, format string, args ...any) {
	r.Refuse(name, provider.Errorf(provider.ErrInvalid, format, args...))
}

// Refuse is Fail for an error that says more, such as what to try next. It adds the
// name of the setting.
func (r *Reader) Refuse(name string, why *provider.Error) {
	if r.err == nil {
		r.err = why.With("setting", name)
	}
}

// Done returns the first thing that was wrong; else an error that names the unknown
// settings and the known ones, if any are unknown. It may be called again after more
// was read.
func (r *Reader) Done() error {
	if r.err != nil {
		return r.err
	}
	unknown := slices.DeleteFunc(slices.Sorted(maps.Keys(r.given)), func(name string) bool { return slices.Contains(r.known, name) })
	if len(unknown) > 0 {
		r.Fail(unknown[0], "%s has no setting %s; expected %s", r, strings.Join(unknown, ", "), strings.Join(r.known, ", "))
	}
	return r.err
}

func (r *Reader) lookup(name string) (value string, given bool) {
	if !slices.Contains(r.known, name) {
		r.known = append(r.known, name)
	}
	value, given = r.given[name]
	return value, given
}

// units are the suffixes of sizes, largest first.
var units = [...]struct {
	suffix string
	bytes  int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

func parseSize(text string) (int64, bool) {
	unit := int64(1)
	for _, u := range units {
		if rest, found := strings.CutSuffix(text, u.suffix); found {
			text, unit = rest, u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	return n * unit, err == nil && n > 0 && n <= math.MaxInt64/unit
}

func formatSize(n int64) string {
	for _, u := range units {
		if n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

// formatDuration writes a duration as people do: 1h, not 1h0m0s.
func formatDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
