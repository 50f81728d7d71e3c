package sim

import (
	"context"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// errDeadline is what net.Conn returns after its deadline.
var errDeadline = os.ErrDeadlineExceeded

// address is an address of the simulated network.
type address string

// Network returns "tcp": nothing may tell it from the real one.
func (address) Network() string { return "tcp" }

// String returns ip:port.
func (a address) String() string { return string(a) }

// conn is one end of a connection.
type conn struct {
	in, out       *pipe
	local, remote address
	once          sync.Once
}

// Read reads what has arrived.
func (c *conn) Read(b []byte) (int, error) { return c.in.read(b) }

// Write never blocks.
func (c *conn) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if err := c.out.write(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Close ends both directions: what was written before still arrives. The other
// end can write until it hears of it.
func (c *conn) Close() error {
	c.once.Do(func() {
		_ = c.out.write(nil)
		c.in.abandon()
	})
	return nil
}

// LocalAddr returns this end's address.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the other end's address.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets that of reading; writing never blocks.
func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline sets that of reading.
func (c *conn) SetReadDeadline(t time.Time) error { c.in.setDeadline(t); return nil }

// SetWriteDeadline does nothing.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// listener accepts connections of one machine.
type listener struct {
	host   string
	at     address
	accept chan net.Conn
	done   chan struct{}
	once   sync.Once
}

// Listen opens a port of a machine.
func (n *Network) Listen(host, port string) net.Listener {
	at := address(n.address(host) + ":" + port)
	l := &listener{host: host, at: at, accept: make(chan net.Conn, 64), done: make(chan struct{})}
	n.mu.Lock()
	n.listeners[string(at)] = l
	n.mu.Unlock()
	return l
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close stops accepting.
func (l *listener) Close() error { l.once.Do(func() { close(l.done) }); return nil }

// Addr returns ip:port.
func (l *listener) Addr() net.Addr { return l.at }

// Dial connects a machine to ip:port: at a machine that is cut off nobody
// answers, at one that is down the connection is refused.
func (n *Network) Dial(ctx context.Context, from, to string) (net.Conn, error) {
	n.mu.Lock()
	host, _, _ := net.SplitHostPort(to)
	there := n.hosts[host]
	out, back := route{from, there}, route{there, from}
	trip := n.delayLocked(out, n.weatherLocked(out)) + n.delayLocked(back, n.weatherLocked(back))
	n.mu.Unlock()
	for !n.open(out) || !n.open(back) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(dialAgain):
		}
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(trip):
	}
	n.mu.Lock()
	l := n.listeners[to]
	n.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	forth, home := n.newPipe(out), n.newPipe(back)
	near := &conn{in: home, out: forth, local: address(n.address(from) + ":1"), remote: address(to)}
	far := &conn{in: forth, out: home, local: address(to), remote: near.local}
	select {
	case l.accept <- far:
		return near, nil
	case <-l.done:
		forth.breakOff(errGone)
		home.breakOff(errGone)
		return nil, syscall.ECONNREFUSED
	}
}

// dialAgain is how often a connection that nobody answers is tried again.
const dialAgain = 200 * time.Millisecond
