package outbound

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// maxURL is the longest URL in bytes.
const maxURL = 8192

// target is where one request goes, in the one spelling that permission, resolver,
// TLS and the Host header all get.
type target struct {
	scheme string     // "http" or "https"
	host   string     // a name in lower case without a final dot, or an address without brackets
	addr   netip.Addr // valid when the host is an address
	port   uint16
	need   permission.Need
	url    *url.URL // without user info and fragment; its Host has the port unless it is the scheme's
}

// authority is host:port, as a Need names it: an IPv6 address stands in brackets.
func (t *target) authority() string { return t.need.Resource }

// sameOrigin reports whether both have the same scheme, host and port.
func (t *target) sameOrigin(o *target) bool {
	return t.scheme == o.scheme && t.need.Resource == o.need.Resource
}

// parseTarget reads an absolute URL. It fails with ErrInvalid.
func parseTarget(raw string) (*target, error) {
	if reason := checkText(raw); reason != "" {
		return nil, invalidURL(reason)
	}
	u, err := url.Parse(raw)
	if err != nil {
		if inner, ok := errors.AsType[*url.Error](err); ok {
			err = inner.Err // without the URL, which may hold secrets
		}
		return nil, invalidURL(err.Error())
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		return nil, invalidURL("its scheme must be http or https")
	}
	if u.Opaque != "" || u.Host == "" {
		return nil, invalidURL("it names no host; expected one like https://example.com/")
	}
	if u.User != nil {
		return nil, invalidURL("it holds user info; send credentials in the Authorization header")
	}
	t := &target{scheme: u.Scheme}
	if err := t.setPort(u.Port()); err != nil {
		return nil, err
	}
	if err := t.setHost(u.Hostname(), strings.HasPrefix(u.Host, "[")); err != nil {
		return nil, err
	}
	port := strconv.Itoa(int(t.port))
	t.need, err = permission.ParseNeed("http:domain:" + net.JoinHostPort(t.host, port))
	if err != nil {
		reason := "its host is not valid"
		if syntax, ok := errors.AsType[*permission.SyntaxError](err); ok {
			reason = syntax.Reason
		}
		return nil, invalidURL(reason)
	}
	u.Fragment, u.RawFragment = "", ""
	u.RawQuery = escapeHigh(u.RawQuery)
	u.Host = t.need.Resource
	if t.port == defaultPort(t.scheme) {
		u.Host = strings.TrimSuffix(u.Host, ":"+port)
	}
	t.url = u
	return t, nil
}

// checkText refuses what other readers of URLs than ours could take for something
// else, before anything is read out of it.
func checkText(raw string) string {
	if reason := checkBytes(raw); reason != "" {
		return reason
	}
	_, rest, found := strings.Cut(raw, "://")
	if !found {
		return "it is not absolute; expected one like https://example.com/"
	}
	authority := rest
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority = rest[:i]
	}
	switch {
	case !utf8.ValidString(authority):
		return "its host is not UTF-8"
	case strings.Contains(authority, "@"):
		return "it holds user info; send credentials in the Authorization header"
	case strings.Contains(authority, "%25") && strings.HasPrefix(authority, "["):
		return "its address holds a zone"
	case strings.Contains(authority, "%"):
		return "its host holds a percent sign"
	default:
		return ""
	}
}

// checkBytes refuses bytes that no URL holds.
func checkBytes(raw string) string {
	if len(raw) > maxURL {
		return "it has " + strconv.Itoa(len(raw)) + " bytes, the most is " + strconv.Itoa(maxURL)
	}
	for i := range len(raw) {
		switch c := raw[i]; {
		case c <= ' ' || c == 0x7f:
			return "it holds a space or control character"
		case c == '\\':
			return "it holds a backslash"
		}
	}
	return ""
}

func (t *target) setPort(text string) error {
	if text == "" {
		t.port = defaultPort(t.scheme)
		return nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return invalidURL("its port must be from 1 to 65535")
	}
	t.port = uint16(n)
	return nil
}

// setHost brings the host into its one spelling. That the result is one, and that
// no odd spelling of an IPv4 address is left, is checked by permission.ParseNeed.
func (t *target) setHost(host string, bracketed bool) error {
	if bracketed {
		addr, err := netip.ParseAddr(host)
		switch {
		case err != nil || !addr.Is6():
			return invalidURL("what stands in brackets is not an IPv6 address")
		case addr.Zone() != "":
			return invalidURL("its address holds a zone")
		case addr.Is4In6():
			return invalidURL("its address is IPv4-mapped; write " + addr.Unmap().String())
		}
		t.host, t.addr = addr.String(), addr
		return nil
	}
	name := strings.ToLower(host)
	if !plainName(name) {
		ascii, err := idna.Lookup.ToASCII(host)
		if err == nil {
			_, err = idna.Lookup.ToASCII(ascii) // what it made must be a name itself
		}
		if err != nil {
			return invalidURL("its host is not a valid international name")
		}
		name = ascii
	}
	name = strings.TrimSuffix(name, ".")
	if name == "" || strings.HasPrefix(name, "*") || strings.ContainsAny(name, ":/") {
		return invalidURL("its host is not valid")
	}
	if addr, err := netip.ParseAddr(name); err == nil && addr.Is4() {
		name, t.addr = addr.String(), addr
	}
	t.host = name
	return nil
}

// plainName reports whether a name is ASCII and holds no international label, so
// that IDNA has nothing to say about it. IDNA refuses an underscore and a double
// hyphen, which names in use have.
func plainName(name string) bool {
	for i := range len(name) {
		if name[i] >= 0x80 {
			return false
		}
	}
	return !strings.HasPrefix(name, "xn--") && !strings.Contains(name, ".xn--")
}

// escapeHigh writes the bytes of a query that are not ASCII as %XX, like net/url does
// in paths.
func escapeHigh(query string) string {
	var b strings.Builder
	for i := range len(query) {
		if c := query[i]; c >= 0x80 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func defaultPort(scheme string) uint16 {
	if scheme == "https" {
		return 443
	}
	return 80
}

func invalidURL(reason string) *provider.Error {
	return provider.Errorf(provider.ErrInvalid, "the url is not one that can be requested: %s", reason)
}
