package permission

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// hostRule is the parsed host of an http:domain permission.
type hostRule struct {
	name   string       // exact host; for a wildcard the suffix with its dot, ".example.com"
	wild   bool         // name is a suffix
	prefix netip.Prefix // valid for a CIDR rule; then name is empty
	port   string       // "" is any
}

// covers compares byte for byte: a need that is not normalised is not covered,
// which errs on the safe side.
func (h *hostRule) covers(resource string) bool {
	host, port := splitPort(resource)
	if host == "" || h.port != "" && h.port != port {
		return false
	}
	switch {
	case h.prefix.IsValid():
		addr, ok := literalAddr(host)
		return ok && h.prefix.Contains(addr)
	case h.wild:
		// The label before the suffix must not be empty.
		return host[0] != '.' && strings.HasSuffix(host, h.name)
	default:
		return host == h.name
	}
}

// splitPort cuts a final ":port" off. An IPv6 address stands in brackets.
func splitPort(s string) (host, port string) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, "]") {
		return s, ""
	}
	return s[:i], s[i+1:]
}

// literalAddr reads an IP address: IPv4, or IPv6 in brackets, without a zone.
func literalAddr(host string) (netip.Addr, bool) {
	if host == "" || len(host) > 64 {
		return netip.Addr{}, false
	}
	if host[0] == '[' {
		if host[len(host)-1] != ']' || strings.IndexByte(host, '%') >= 0 {
			return netip.Addr{}, false
		}
		addr, ok := parseAddr(host[1 : len(host)-1])
		return addr, ok && addr.Is6()
	}
	if c := host[len(host)-1]; c < '0' || c > '9' {
		return netip.Addr{}, false
	}
	addr, ok := parseAddr(host)
	return addr, ok && addr.Is4()
}

func parseAddr(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	return addr, err == nil
}

// parseHost reads the host of a domain rule in its one spelling. The suggestion
// is the host as it should be written, or "".
func parseHost(s string) (h hostRule, reason, suggestion string) {
	if lower := strings.ToLower(s); lower != s {
		return h, "the host must be in lower case", lower
	}
	if scheme, rest, found := strings.Cut(s, "://"); found && !strings.ContainsAny(scheme, ".:/") {
		rest, _, _ = strings.Cut(rest, "/")
		return h, "a host without scheme and path is expected", rest
	}
	if strings.Contains(s, "/") {
		return parseCIDR(s)
	}
	if addr, ok := parseAddr(s); ok && addr.Is6() {
		return h, "an IPv6 address is written in brackets", "[" + addr.WithZone("").String() + "]"
	}
	name, port := splitPort(s)
	if reason := checkPort(s, name, port); reason != "" {
		return h, reason, ""
	}
	h.port = port
	portSuffix := s[len(name):]
	if strings.HasPrefix(name, "[") || strings.Contains(name, ":") {
		return parseIPv6(name, portSuffix, h)
	}
	if addr, ok := literalAddr(name); ok {
		if addr.String() != name {
			return h, "the address is not in its canonical form", addr.String() + portSuffix
		}
		h.name = name
		return h, "", ""
	}
	h.name = name
	if rest, found := strings.CutPrefix(name, "*"); found {
		if rest == "" {
			return h, "a lone * names every host; grant http:request without any http:domain for that", ""
		}
		h.name, h.wild = rest, true
		name = strings.TrimPrefix(rest, ".")
		if name == rest {
			return h, "* must be a whole label", "*." + strings.TrimPrefix(rest, "-") + portSuffix
		}
	}
	reason, suggestion = checkName(name)
	if suggestion != "" {
		suggestion = strings.TrimSuffix(s[:len(s)-len(portSuffix)], name) + suggestion + portSuffix
	}
	return h, reason, suggestion
}

func parseIPv6(name, portSuffix string, h hostRule) (hostRule, string, string) {
	addr, ok := parseAddr(strings.Trim(name, "[]"))
	if !ok || !addr.Is6() || addr.Zone() != "" {
		return h, fmt.Sprintf("%q is not an IPv6 address", name), ""
	}
	if addr.Is4In6() {
		return h, "an IPv4-mapped address is never contacted as such", addr.Unmap().String() + portSuffix
	}
	if canonical := "[" + addr.String() + "]"; canonical != name {
		return h, "the address is not in its canonical form", canonical + portSuffix
	}
	h.name = name
	return h, "", ""
}

func parseCIDR(s string) (h hostRule, reason, suggestion string) {
	text, portSuffix := s, ""
	if i := strings.LastIndexByte(s, ':'); i > strings.IndexByte(s, '/') {
		text, portSuffix = s[:i], s[i:]
		h.port = s[i+1:]
		if reason := checkPort(s, text, h.port); reason != "" {
			return h, reason, ""
		}
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		host, _, _ := strings.Cut(text, "/")
		if _, ok := parseAddr(host); ok {
			return h, fmt.Sprintf("%q is not an address range; a range is like 10.0.0.0/8", text), ""
		}
		return h, "a host without path is expected", host
	}
	if prefix.Addr().Is4In6() {
		return h, "an IPv4-mapped range is never contacted as such", ""
	}
	if canonical := prefix.Masked().String(); canonical != text {
		return h, "the range is not in its canonical form", canonical + portSuffix
	}
	h.prefix = prefix
	return h, "", ""
}

func checkPort(whole, name, port string) string {
	if name == whole {
		return ""
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return fmt.Sprintf("%q is not a port from 1 to 65535", port)
	}
	return ""
}

// checkName checks a DNS name in lower case. A name whose last label looks like
// a number is refused because resolvers take it for an odd spelling of an
// address (https://url.spec.whatwg.org/#ends-in-a-number-checker).
func checkName(name string) (reason, suggestion string) {
	if trimmed, found := strings.CutSuffix(name, "."); found {
		return "the host must not end in a dot", trimmed
	}
	if name == "" {
		return "a host is expected", ""
	}
	if len(name) > 253 {
		return "the host is longer than 253 bytes", ""
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if reason := checkLabel(label); reason != "" {
			return reason, ""
		}
		last = label
	}
	if endsInNumber(last) {
		return fmt.Sprintf("%q ends in a number and is not an IPv4 address", name), ""
	}
	return "", ""
}

// endsInNumber reports whether a resolver could take a last label for a number:
// digits, or 0x and hexadecimal digits, of any length.
func endsInNumber(last string) bool {
	if hex, found := strings.CutPrefix(last, "0x"); found {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	if _, err := strconv.ParseUint(last, 0, 64); err == nil {
		return true // 0o and 0b too
	}
	return strings.Trim(last, "0123456789") == ""
}

func checkLabel(label string) string {
	if label == "" {
		return "the host has an empty label"
	}
	if len(label) > 63 {
		return fmt.Sprintf("the label %q is longer than 63 bytes", label)
	}
	if label[0] == '-' || label[len(label)-1] == '-' {
		return fmt.Sprintf("the label %q starts or ends with a hyphen", label)
	}
	for i := range len(label) {
		c := label[i]
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
		case c >= 0x80:
			return fmt.Sprintf("the label %q is not ASCII; write it in its xn-- form", label)
		case c == '*':
			return "* may only be the first label, as in *.example.com"
		default:
			return fmt.Sprintf("the label %q holds %q", label, string(rune(c)))
		}
	}
	return ""
}
