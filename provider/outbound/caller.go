package outbound

import (
	"net/netip"
	"strings"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// caller is who makes a request and what it may reach. A user has no rules: every
// public address and no other.
type caller struct {
	instance string // empty for a user
	name     string
	provider string
	set      permission.Set
}

// key tells callers apart, for what is counted and kept by caller.
func (c *caller) key() string {
	if c.instance == "" {
		return "user " + c.name
	}
	return c.instance
}

// mayRequest decides on a URL, before anything is resolved. The first URL of a call
// was decided on already; those of redirects were not.
func (c *caller) mayRequest(t *target) error {
	if c.instance == "" {
		return nil
	}
	if _, ok := c.set.Allows(t.need); ok {
		return nil
	}
	return provider.Errorf(provider.ErrDenied, "%s may not request %s: %s", c.name, t.authority(), c.set.Explain(t.need)).
		With("instance", c.instance).With("provider", c.provider).With("need", t.need.String()).
		NextStep("%s", c.grant(c.set.Missing(t.need)...))
}

// mayConnect decides on an address that a URL's host stands for: a special one must
// be named by a rule.
func (c *caller) mayConnect(t *target, addr netip.Addr) error {
	addr = addr.Unmap()
	if !addr.IsValid() || addr.Zone() != "" {
		return c.refuseAddress(t, addr, special{what: "bound to an interface"})
	}
	s, is := specialOf(addr)
	if !is {
		return nil
	}
	if _, named := c.set.NamesAddress(addressNeed(addr, t.port), s.prefix); named {
		if v4, carried := inner(addr); carried {
			return c.mayConnect(t, v4)
		}
		return nil
	}
	if _, named := c.set.NamesHost(t.need); named && t.host == "localhost" && addr.IsLoopback() {
		return nil
	}
	return c.refuseAddress(t, addr, s)
}

func addressNeed(addr netip.Addr, port uint16) permission.Need {
	return permission.Need{
		Capability: permission.HTTP, Action: permission.Request, Resource: netip.AddrPortFrom(addr, port).String(),
	}
}

func (c *caller) refuseAddress(t *target, addr netip.Addr, s special) error {
	what := s.what
	if s.prefix.IsValid() {
		what += " (" + s.prefix.String() + ")"
	}
	e := provider.Errorf(provider.ErrDenied, "%s may not connect to %s for %s: the address is %s, and no http:domain rule names it",
		c.name, addr, t.authority(), what).
		With("provider", c.provider).With("host", t.authority()).With("address", addr.String()).With("range", what)
	if c.instance == "" {
		return e.NextStep("request it from an instance that was granted %s", quote(addressNeed(addr, t.port).String()))
	}
	e = e.With("instance", c.instance)
	if !s.prefix.IsValid() {
		return e
	}
	need := addressNeed(addr, t.port)
	if c.set.Narrowed() {
		return e.With("need", need.String()).NextStep("%s", c.grant(need.String()))
	}
	// The first http:domain rule takes every other host away.
	rules := []string{need.String()}
	if t.need != need {
		rules = append(rules, t.need.String())
	}
	return e.With("need", need.String()).
		NextStep("%s; then only hosts that an http:domain rule names can be requested", c.grant(rules...))
}

// grant is the command that grants permissions to the caller.
func (c *caller) grant(permissions ...string) string {
	quoted := make([]string, len(permissions))
	for i, p := range permissions {
		quoted[i] = quote(p)
	}
	return "wasmatrix grant " + c.name + " " + strings.Join(quoted, " ") + " --provider " + c.provider
}

// quote quotes a permission that a shell would take for a pattern.
func quote(permission string) string {
	if strings.ContainsAny(permission, "[]*") {
		return "'" + permission + "'"
	}
	return permission
}
