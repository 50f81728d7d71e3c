package faults

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// sendBuffer is how many bytes a connection takes before a write blocks, as the
	// buffer of a socket does.
	sendBuffer = 1 << 20
	// lingers is how long a closed connection tries to deliver what it took.
	lingers = 5 * time.Second
)

// conn is a connection to another node. What is written goes out at once while
// the link is whole, else through a queue.
type conn struct {
	net.Conn
	in    *Injector
	other string

	sending sync.Mutex // held by who writes to the connection below

	mu       sync.Mutex
	queue    []chunk
	queued   int // bytes in queue
	pumping  bool
	closed   bool
	err      error // of the connection below
	deadline time.Time
	changed  chan struct{} // closed and replaced when anything above changes
	quit     chan struct{} // closed lingers after Close
}

type chunk struct {
	data []byte
	due  time.Time
}

func newConn(raw net.Conn, in *Injector, other string) *conn {
	return &conn{Conn: raw, in: in, other: other, changed: make(chan struct{}), quit: make(chan struct{})}
}

// NetConn returns the connection below.
func (c *conn) NetConn() net.Conn { return c.Conn }

// Write sends p, or takes it to be sent as the link allows.
func (c *conn) Write(p []byte) (int, error) {
	to, _, _ := c.in.links(c.other)
	c.mu.Lock()
	if !to.Cut && to.Delay == 0 && !c.pumping && c.err == nil && !c.closed {
		// The order of writers is that of this lock.
		c.sending.Lock()
		c.mu.Unlock()
		defer c.sending.Unlock()
		return c.Conn.Write(p)
	}
	defer c.mu.Unlock()
	for c.err == nil && !c.closed && c.queued >= sendBuffer {
		if err := c.waitForRoom(); err != nil {
			return 0, err
		}
	}
	switch {
	case c.err != nil:
		return 0, c.err
	case c.closed:
		return 0, net.ErrClosed
	}
	c.queue = append(c.queue, chunk{data: append([]byte(nil), p...), due: time.Now().Add(to.Delay)})
	c.queued += len(p)
	if !c.pumping {
		c.pumping = true
		// What was taken is sent whatever the deadline of the write that brought it.
		c.err = c.Conn.SetWriteDeadline(time.Time{})
		go c.pump()
	}
	return len(p), nil
}

// waitForRoom waits for a change; c.mu is held before and after.
func (c *conn) waitForRoom() error {
	changed, deadline := c.changed, c.deadline
	c.mu.Unlock()
	defer c.mu.Lock()
	var expired <-chan time.Time
	if !deadline.IsZero() {
		timer := time.NewTimer(time.Until(deadline))
		defer timer.Stop()
		expired = timer.C
	}
	select {
	case <-changed:
		return nil
	case <-expired:
		return os.ErrDeadlineExceeded
	}
}

// signal tells that something changed; c.mu is held.
func (c *conn) signal() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// pump sends what is queued, in order, until nothing is left.
func (c *conn) pump() {
	for {
		c.mu.Lock()
		if len(c.queue) == 0 || c.err != nil {
			c.pumping, c.queue, c.queued = false, nil, 0
			_ = c.Conn.SetWriteDeadline(c.deadline) // it fails on a closed connection
			closed := c.closed
			c.signal()
			c.mu.Unlock()
			if closed {
				_ = c.Conn.Close()
			}
			return
		}
		next := c.queue[0]
		c.mu.Unlock()
		err := c.hold(next.due)
		if err == nil {
			c.sending.Lock()
			_, err = c.Conn.Write(next.data)
			c.sending.Unlock()
		}
		c.mu.Lock()
		c.err = err
		c.queue, c.queued = c.queue[1:], c.queued-len(next.data)
		c.signal()
		c.mu.Unlock()
	}
}

// hold waits until a chunk is due and the link is whole.
func (c *conn) hold(due time.Time) error {
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.quit:
		return net.ErrClosed
	}
	for {
		to, _, changed := c.in.links(c.other)
		if !to.Cut {
			return nil
		}
		select {
		case <-changed:
		case <-c.quit:
			return net.ErrClosed
		}
	}
}

// SetDeadline sets the time limit of reads and writes.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetWriteDeadline sets the time limit of writes.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	c.signal()
	if c.pumping {
		return nil
	}
	return c.Conn.SetWriteDeadline(t)
}

// Close closes the connection once what was taken is sent, or after a while.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	c.closed = true
	pumping := c.pumping
	c.signal()
	c.mu.Unlock()
	if !pumping {
		return c.Conn.Close()
	}
	// Who reads must learn of the end now, whatever is still to be sent.
	err := c.SetReadDeadline(time.Unix(1, 0))
	time.AfterFunc(lingers, func() { close(c.quit) })
	return err
}
