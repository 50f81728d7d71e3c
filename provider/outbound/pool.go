package outbound

import (
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// How long connections are kept for the next request, and how many.
const (
	// idleFor is for how long one is kept.
	idleFor = 30 * time.Second
	// freshFor is for how long one may have been idle to carry a request with an
	// effect: a server that closes it meanwhile leaves in doubt what it did.
	freshFor = 2 * time.Second
	// maxIdle is the most that are kept in all.
	maxIdle = 256
	// reapEvery is how often old ones are looked for.
	reapEvery = 5 * time.Second
)

// connKey is what a connection can be used for.
type connKey struct{ caller, scheme, authority string }

// conn is one connection. Its last two fields are the pool's.
type conn struct {
	cc     *http.ClientConn
	raw    *counted
	key    connKey
	addr   netip.Addr
	shared bool // HTTP/2: it takes several requests at a time

	users int       // requests under way
	since time.Time // when the last one ended
}

// shut closes the connection. The bare one goes first, so that a peer that reads
// nothing cannot hold up the farewell of TLS.
func (c *conn) shut() {
	_ = c.raw.Close()
	_ = c.cc.Close()
}

// pool keeps the connections of a provider.
type pool struct {
	mu     sync.Mutex
	conns  map[connKey][]*conn
	idle   int
	closed bool
}

// take returns a connection that can carry a request now, reserved for it, or nil.
// Idle is for how long it may have been unused, allowed decides on its address.
func (p *pool) take(key connKey, idle time.Duration, allowed func(netip.Addr) bool) *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range slices.Backward(p.conns[key]) {
		if c.users == 0 && time.Since(c.since) > idle || !allowed(c.addr) || c.cc.Reserve() != nil {
			continue
		}
		if c.users == 0 {
			p.idle--
		}
		c.users++
		return c
	}
	return nil
}

// add keeps a connection that is in use.
func (p *pool) add(key connKey, c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.key = key
	p.conns[key] = append(p.conns[key], c)
}

// put takes a connection back. Clean is true when its request was answered to the end.
func (p *pool) put(c *conn, clean bool) {
	p.mu.Lock()
	c.users--
	keep := c.cc.Err() == nil && (c.shared || clean && c.cc.Available() > 0) && !p.closed
	var out []*conn
	switch {
	case !keep && c.users == 0:
		p.forget(c)
		out = append(out, c)
	case c.users == 0:
		c.since = time.Now()
		p.idle++
		if p.idle > maxIdle {
			out = append(out, p.oldest())
		}
	}
	p.mu.Unlock()
	shutAll(out)
}

// oldest takes out the connection that was unused for longest.
func (p *pool) oldest() *conn {
	var found *conn
	for _, list := range p.conns {
		for _, c := range list {
			if c.users == 0 && (found == nil || c.since.Before(found.since)) {
				found = c
			}
		}
	}
	p.idle--
	p.forget(found)
	return found
}

// reap closes what was unused for too long or is broken.
func (p *pool) reap(now time.Time) {
	p.mu.Lock()
	var out []*conn
	for _, list := range p.conns {
		for _, c := range list {
			if c.users == 0 && (now.Sub(c.since) > idleFor || c.cc.Err() != nil) {
				out = append(out, c)
			}
		}
	}
	for _, c := range out {
		p.idle--
		p.forget(c)
	}
	p.mu.Unlock()
	shutAll(out)
}

// close closes every connection and keeps no more.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	var out []*conn
	for _, list := range p.conns {
		out = append(out, list...)
	}
	clear(p.conns)
	p.idle = 0
	p.mu.Unlock()
	shutAll(out)
}

func (p *pool) forget(c *conn) {
	list := p.conns[c.key]
	if i := slices.Index(list, c); i >= 0 {
		list = slices.Delete(list, i, i+1)
	}
	if len(list) == 0 {
		delete(p.conns, c.key)
		return
	}
	p.conns[c.key] = list
}

func shutAll(conns []*conn) {
	for _, c := range conns {
		c.shut()
	}
}
