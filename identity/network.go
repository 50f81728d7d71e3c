package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
)

// Network is what connections are made through. Callers close what it returns.
type Network interface {
	// Listen listens on an address.
	Listen(network, address string) (net.Listener, error)
	// DialContext connects to an address before ctx ends.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	// DialTimeout connects to an address within timeout.
	DialTimeout(network, address string, timeout time.Duration) (net.Conn, error)
}

// Over returns the same identity with all its connections made through n.
func (id *Identity) Over(n Network) *Identity {
	out := *id
	out.over = n
	return &out
}

// dialOptions are what a gRPC client needs besides credentials.
func (id *Identity) dialOptions() []grpc.DialOption {
	if id.over == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return id.over.DialContext(ctx, "tcp", address)
	})}
}

func (id *Identity) listen(address string) (net.Listener, error) {
	if id.over == nil {
		return net.Listen("tcp", address)
	}
	return id.over.Listen("tcp", address)
}

// dial makes a TLS connection within timeout, handshake included.
func dial(over Network, address string, timeout time.Duration, config *tls.Config) (net.Conn, error) {
	if over == nil {
		return tls.DialWithDialer(&net.Dialer{Timeout: timeout}, "tcp", address, config)
	}
	deadline := time.Now().Add(timeout)
	raw, err := over.DialTimeout("tcp", address, timeout)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, config)
	err = conn.SetDeadline(deadline)
	if err == nil {
		err = conn.Handshake()
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}
