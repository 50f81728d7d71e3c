package identity

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"
)

// handshakeTimeout bounds the TLS handshake of a connection to the Raft port.
const handshakeTimeout = 5 * time.Second

// StreamLayer carries Raft over mutual TLS between control-plane peers, on a
// port of its own.
type StreamLayer struct {
	listener  net.Listener
	advertise net.Addr
	server    *tls.Config
	client    *tls.Config
	over      Network
}

// StreamLayer listens on bind, host:port, for Raft connections of peers. Addr
// returns advertise, or the address of the listener when advertise is nil. The
// caller, or the Raft transport it is given to, closes it.
func (id *Identity) StreamLayer(bind string, advertise net.Addr) (*StreamLayer, error) {
	listener, err := id.listen(bind)
	if err != nil {
		return nil, fmt.Errorf("listen for raft: %w", err)
	}
	if advertise == nil {
		advertise = listener.Addr()
	}
	return &StreamLayer{
		listener:  listener,
		advertise: advertise,
		server:    id.serverTLS(Subject.IsPeer),
		client:    id.ClientTLS(Subject.IsPeer),
		over:      id.over,
	}, nil
}

// Accept waits for the next connection. Its handshake is made by its first Read
// or Write, with a time limit, so that one slow or hostile client does not hold
// up the others; for anyone but a peer of this cluster it fails, and says who it
// was. The caller closes the connection then too.
func (l *StreamLayer) Accept() (net.Conn, error) {
	conn, err := l.listener.Accept()
	if err != nil {
		return nil, err
	}
	return &acceptedConn{Conn: tls.Server(conn, l.server)}, nil
}

// Close stops listening. Connections that were accepted stay open.
func (l *StreamLayer) Close() error { return l.listener.Close() }

// Addr returns the address that other peers dial.
func (l *StreamLayer) Addr() net.Addr { return l.advertise }

// Dial connects to the Raft port of a peer, host:port, within timeout, handshake included.
func (l *StreamLayer) Dial(address string, timeout time.Duration) (net.Conn, error) {
	conn, err := dial(l.over, address, timeout, l.client)
	if err != nil {
		return nil, fmt.Errorf("dial raft at %s: %w", address, err)
	}
	return conn, nil
}

// acceptedConn makes the handshake at its first use.
type acceptedConn struct {
	*tls.Conn
	once sync.Once
	err  error
}

// Read reads after the handshake.
func (c *acceptedConn) Read(p []byte) (int, error) {
	if err := c.handshake(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// Write writes after the handshake.
func (c *acceptedConn) Write(p []byte) (int, error) {
	if err := c.handshake(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *acceptedConn) handshake() error {
	c.once.Do(func() {
		raw := c.NetConn()
		err := raw.SetDeadline(time.Now().Add(handshakeTimeout))
		if err == nil {
			err = c.Handshake()
		}
		if err != nil {
			c.err = fmt.Errorf("refuse raft connection from %s: %w", c.RemoteAddr(), err)
			return
		}
		c.err = raw.SetDeadline(time.Time{})
	})
	return c.err
}
