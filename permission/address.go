package permission

import "net/netip"

// addresses returns the addresses that an http:domain rule names: those of its range,
// or its one address. A rule that names hosts by name has none.
func (h *hostRule) addresses() (netip.Prefix, bool) {
	if h.prefix.IsValid() {
		return h.prefix, true
	}
	if h.wild {
		return netip.Prefix{}, false
	}
	addr, ok := literalAddr(h.name)
	if !ok {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(addr, addr.BitLen()), true
}

// NamesAddress returns an http:domain rule of the set that covers n, whose host
// is an address, and that names an address or a range inside within. A rule for
// a wider range names nothing inside it: 0.0.0.0/0 means every public address and
// not the private ones.
func (s Set) NamesAddress(n Need, within netip.Prefix) (Permission, bool) {
	for i := range s.list {
		p := &s.list[i]
		if p.rule != ruleDomain || !p.covers(&n) {
			continue
		}
		named, ok := p.host.addresses()
		if ok && named.Bits() >= within.Bits() && within.Contains(named.Addr()) {
			return *p, true
		}
	}
	return Permission{}, false
}

// NamesHost returns an http:domain rule of the set that covers n and spells its
// host out: neither a wildcard nor a range.
func (s Set) NamesHost(n Need) (Permission, bool) {
	for i := range s.list {
		p := &s.list[i]
		if p.rule == ruleDomain && !p.host.wild && !p.host.prefix.IsValid() && p.covers(&n) {
			return *p, true
		}
	}
	return Permission{}, false
}

// Narrowed reports whether the set holds an http:domain rule, so that its
// http:request holds for named hosts only.
func (s Set) Narrowed() bool { return s.domains }
