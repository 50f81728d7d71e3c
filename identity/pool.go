package identity

import (
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc"
)

// ErrPoolClosed is returned by Pool.Conn after Close.
var ErrPoolClosed = errors.New("connection pool is closed")

// Pool holds one shared connection an address. It is safe for concurrent use.
type Pool struct {
	opts []grpc.DialOption

	mu     sync.Mutex
	conns  map[string]*grpc.ClientConn
	closed bool
}

// NewPool returns an empty pool whose connections are made with DialOption(allow)
// and opts. The caller closes it.
func (id *Identity) NewPool(allow func(Subject) bool, opts ...grpc.DialOption) *Pool {
	return &Pool{
		opts:  append(append(id.dialOptions(), id.DialOption(allow)), opts...),
		conns: map[string]*grpc.ClientConn{},
	}
}

// Conn returns the connection to address, host:port. It is dialled with its
// first call and again whenever it broke; callers must not close it. The error
// is ErrPoolClosed, or that of a malformed address.
func (p *Pool) Conn(address string) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrPoolClosed
	}
	if conn, ok := p.conns[address]; ok {
		return conn, nil
	}
	conn, err := grpc.NewClient(address, p.opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	p.conns[address] = conn
	return conn, nil
}

// Close closes all connections; calls under way on them fail.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var err error
	for _, conn := range p.conns {
		err = errors.Join(err, conn.Close())
	}
	p.conns = nil
	return err
}
