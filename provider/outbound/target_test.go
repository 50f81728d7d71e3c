package outbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

func TestURLsAreBroughtIntoOneSpelling(t *testing.T) {
	tests := []struct{ raw, need, url string }{
		{"http://example.com", "example.com:80", "http://example.com"},
		{"HTTPS://EXAMPLE.com:443/a?b#c", "example.com:443", "https://example.com/a?b"},
		{"http://example.com.:0080/", "example.com:80", "http://example.com/"},
		{"http://example.com:443/", "example.com:443", "http://example.com:443/"},
		{"https://bücher.example/ü", "xn--bcher-kva.example:443", "https://xn--bcher-kva.example/%C3%BC"},
		{"http://１２７．0.0.1/", "127.0.0.1:80", "http://127.0.0.1/"},
		{"http://[2001:DB8:0::1]:8080/", "[2001:db8::1]:8080", "http://[2001:db8::1]:8080/"},
		{"http://[::1]", "[::1]:80", "http://[::1]"},
		{"http://faß.example/", "xn--fa-hia.example:80", "http://xn--fa-hia.example/"},
		{"http://Ｅxample。com/", "example.com:80", "http://example.com/"},
		{"http://a_b.r3---sn.example/", "a_b.r3---sn.example:80", "http://a_b.r3---sn.example/"},
		{"http://example.com/?ü=\xff", "example.com:80", "http://example.com/?%C3%BC=%FF"},
		{"http://example.com/a/../b/%2e%2E/c%2F?x=/../", "example.com:80", "http://example.com/a/../b/%2e%2E/c%2F?x=/../"},
	}
	for _, tt := range tests {
		got, err := parseTarget(tt.raw)
		if err != nil {
			t.Errorf("%s: %v", tt.raw, err)
			continue
		}
		if got.need.Resource != tt.need || got.url.String() != tt.url {
			t.Errorf("%s: %s, %s; want %s, %s", tt.raw, got.need.Resource, got.url, tt.need, tt.url)
		}
	}
}

func TestARefusedURLSaysWhy(t *testing.T) {
	for raw, why := range map[string]string{
		"http://u:p@example.com/":               "user info",
		"http://0x7f.1/":                        "ends in a number",
		"http://2130706433/":                    "ends in a number",
		"http://127.1/":                         "ends in a number",
		"http://0x/":                            "ends in a number",
		"http://[::ffff:10.0.0.1]/":             "write 10.0.0.1",
		"http://[fe80::1%25eth0]/":              "zone",
		"http://\x910/":                         "UTF-8",
		"http://a\\b/":                          "backslash",
		"http://exa mple/":                      "space",
		"http://ex%61mple.com/":                 "percent",
		"ftp://example.com/":                    "http or https",
		"/path":                                 "not absolute",
		"http:///path":                          "no host",
		"http://a:65536/":                       "port",
		"http://a..b/":                          "empty label",
		"http://" + strings.Repeat("a", 9000):   "8192",
		"http://" + strings.Repeat("ü.", 200):   "not",
		"http://user:secret@127.0.0.1:x/?token": "user info",
	} {
		_, err := parseTarget(raw)
		wantRefusal(t, err, provider.ErrInvalid, why, "")
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%q gives away what the URL holds", err)
		}
	}
}

// inetAton reads what the C library's inet_aton takes for an IPv4 address.
func inetAton(s string) (netip.Addr, bool) {
	parts := strings.Split(s, ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	var sum uint64
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 0, 32)
		if err != nil || strings.ContainsAny(p, "_oOb+") && !strings.HasPrefix(strings.ToLower(p), "0x") {
			return netip.Addr{}, false
		}
		left := 8 * (4 - i) // bits that are not taken yet
		if i == len(parts)-1 {
			if n >= 1<<left {
				return netip.Addr{}, false
			}
			sum |= n
			break
		}
		if n > 255 {
			return netip.Addr{}, false
		}
		sum |= n << (left - 8)
	}
	return netip.AddrFrom4([4]byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)}), true
}

// seen records what the resolver and the dialer get.
type seen struct{ asked, dialled []string }

func (s *seen) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	s.asked = append(s.asked, host)
	return []netip.Addr{netip.MustParseAddr(publicV4)}, nil
}

func (s *seen) dial(_ context.Context, _, address string) (net.Conn, error) {
	s.dialled = append(s.dialled, address)
	return nil, errors.New("nothing is dialled here")
}

// FuzzTarget holds what the policy decides on to what the resolver and the dialer get.
func FuzzTarget(f *testing.F) {
	for _, a := range forbidden {
		for _, s := range spellings(a) {
			f.Add("http://" + s + ":8080/p?q")
		}
	}
	for _, u := range tricks("8080") {
		f.Add(u)
	}
	f.Add("https://bücher.example/")
	f.Add("http://xn--bcher-kva.example./")
	f.Add("http://[2002:7f00:1::1]/")
	f.Fuzz(func(t *testing.T, raw string) {
		to, err := parseTarget(raw)
		if err != nil {
			if !errors.Is(err, provider.ErrInvalid) {
				t.Fatalf("%q: %v", raw, err)
			}
			return
		}
		again, err := parseTarget(to.url.String())
		if err != nil || again.need != to.need || again.url.String() != to.url.String() {
			t.Fatalf("%q is %s, and that is %v, %v", raw, to.url, again, err)
		}
		if need, err := permission.ParseNeed("http:domain:" + to.authority()); err != nil || need != to.need {
			t.Fatalf("%q needs %v, which no rule can name: %v", raw, to.need, err)
		}
		if to.url.User != nil || to.url.Fragment != "" {
			t.Fatalf("%q: %s holds user info or a fragment", raw, to.url)
		}
		if addr, ok := inetAton(to.host); ok && addr != to.addr {
			t.Fatalf("%q: the name %s means %s to a resolver and %v to the policy", raw, to.host, addr, to.addr)
		}
		if addr, err := netip.ParseAddr(to.host); err == nil && addr != to.addr {
			t.Fatalf("%q: the host %s is an address and the policy has %v", raw, to.host, to.addr)
		}
		var s seen
		k := newKind(t, Options{Resolver: &s, Dial: s.dial})
		svc := &service{id: "web", kind: k, transport: newTransport(k.dial, settings{})}
		who := &caller{name: "root"} // a user: special addresses are refused
		_, err = svc.connect(t.Context(), who, to)
		want := publicV4
		special := false
		if to.addr.IsValid() {
			want = to.addr.String()
			_, special = specialOf(to.addr)
		} else if len(s.asked) != 1 || strings.TrimSuffix(s.asked[0], ".") != to.host {
			t.Fatalf("%q: the policy saw %s and the resolver %q", raw, to.host, s.asked)
		}
		want = net.JoinHostPort(want, strconv.Itoa(int(to.port)))
		switch {
		case special && (!errors.Is(err, provider.ErrDenied) || len(s.dialled) > 0):
			t.Fatalf("%q: %v, dialled %q", raw, err, s.dialled)
		case !special && (len(s.dialled) != 1 || s.dialled[0] != want):
			t.Fatalf("%q: dialled %q, want %s", raw, s.dialled, want)
		}
	})
}
