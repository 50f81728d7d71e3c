package faults

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// Watch is how often an Injector looks at its file; a change of the rules holds
// within about that time.
const Watch = 25 * time.Millisecond

// Injector is the network as one node is to see it. Its methods are safe for
// concurrent use; those of a nil Injector use the network as it is.
type Injector struct {
	self, path string
	log        *slog.Logger

	mu      sync.Mutex
	raw     []byte
	rules   *Rules
	changed chan struct{} // closed and replaced with every change
}

// Open reads the rules at path for the node self, which must be named in them.
func Open(path, self string, log *slog.Logger) (*Injector, error) {
	in := &Injector{self: self, path: path, log: log, changed: make(chan struct{})}
	if err := in.read(); err != nil {
		return nil, err
	}
	if _, ok := in.rules.Nodes[self]; !ok {
		return nil, fmt.Errorf("%w: %s does not name the node %s", errRules, path, self)
	}
	return in, nil
}

// Run watches the file until ctx ends.
func (in *Injector) Run(ctx context.Context) error {
	if in == nil {
		return nil
	}
	tick := time.NewTicker(Watch)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := in.read(); err != nil {
				in.log.Debug("the rules of the network stay as they were", "error", err)
			}
		}
	}
}

func (in *Injector) read() error {
	raw, err := os.ReadFile(in.path)
	if err != nil {
		return fmt.Errorf("read the rules of the network: %w", err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if bytes.Equal(raw, in.raw) {
		return nil
	}
	rules, err := parse(raw)
	if err != nil {
		return err
	}
	in.raw, in.rules = raw, rules
	close(in.changed)
	in.changed = make(chan struct{})
	return nil
}

// links returns what is wrong towards a node and from it, and a channel that is
// closed when that may have changed.
func (in *Injector) links(other string) (to, from Link, changed <-chan struct{}) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.rules.Link(in.self, other), in.rules.Link(other, in.self), in.changed
}

// other names the node that name finds, or "" for none and for this node itself.
func (in *Injector) other(find func(*Rules) string) string {
	in.mu.Lock()
	defer in.mu.Unlock()
	if name := find(in.rules); name != in.self {
		return name
	}
	return ""
}

// Listen listens on an address.
func (in *Injector) Listen(network, address string) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if err != nil || in == nil {
		return l, err
	}
	return &listener{Listener: l, in: in}, nil
}

type listener struct {
	net.Listener
	in *Injector
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.in.wrap(raw, func(r *Rules) string { return r.dialled(raw.RemoteAddr().String()) }), nil
}

// DialContext connects to an address. Over a link that is cut either way it waits
// until ctx ends, as a connection does whose packets are lost.
func (in *Injector) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	if in == nil {
		return d.DialContext(ctx, network, address)
	}
	find := func(r *Rules) string { return r.listens(address) }
	if other := in.other(find); other != "" {
		if err := in.reach(ctx, other); err != nil {
			return nil, &net.OpError{Op: "dial", Net: network, Err: err}
		}
		in.mu.Lock()
		source := in.rules.Nodes[in.self].Source
		in.mu.Unlock()
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
	}
	raw, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return in.wrap(raw, find), nil
}

// DialTimeout is DialContext with a time limit.
func (in *Injector) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout) //nolint:forbidigo // its callers have none
	defer cancel()
	return in.DialContext(ctx, network, address)
}

// reach waits until packets go to a node and back, and once there and back.
func (in *Injector) reach(ctx context.Context, other string) error {
	for {
		to, from, changed := in.links(other)
		if !to.Cut && !from.Cut {
			return wait(ctx, to.Delay+from.Delay)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Send lets send put a datagram for an address on its way: now, later, or never.
func (in *Injector) Send(address string, send func()) {
	if in == nil {
		send()
		return
	}
	other := in.other(func(r *Rules) string { return r.listens(address) })
	if other == "" {
		send()
		return
	}
	switch to, _, _ := in.links(other); {
	case to.Cut:
	case to.Delay > 0:
		time.AfterFunc(to.Delay, send)
	default:
		send()
	}
}

func (in *Injector) wrap(raw net.Conn, find func(*Rules) string) net.Conn {
	other := in.other(find)
	if other == "" {
		return raw
	}
	return newConn(raw, in, other)
}
