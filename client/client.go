package client

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// DefaultTimeout bounds a call whose context has no deadline, retries included.
const DefaultTimeout = 15 * time.Second

// Config says how to reach a cluster.
type Config struct {
	// Addresses are the API addresses, host:port, of some or all peers; at least
	// one. They are tried in this order until one answers, and that one stays
	// preferred. More peers are learned from those that answer.
	Addresses []string
	// Identity is whom the client speaks for. Required.
	Identity *identity.Identity
	// Timeout bounds a unary call whose context has no deadline, and how long a
	// stream looks for a peer; 0 means DefaultTimeout. Invoke and CallProvider
	// wait four times as long, because a guest may work that long.
	Timeout time.Duration
	// Logger takes a debug line for each attempt that failed; nil means none.
	Logger *slog.Logger
	// DialOptions are added to those of every connection.
	DialOptions []grpc.DialOption
}

// The services whose methods a Client has.
type (
	controlPlane = pb.ControlPlaneServiceClient
	cluster      = pb.ClusterServiceClient
)

// Client talks to the control plane of one cluster. It is safe for concurrent
// use; its owner closes it.
//
// A unary call goes to a peer that answers. When that peer cannot be reached or
// says that there is no leader, the call goes to the next peer, and round again
// with growing pauses, until the deadline. Mutating calls carry one request id
// through all attempts, so they have their effect once; the client makes one
// when the request has none. Invoke, and CallProvider other than a key-value
// get or list, are repeated only when they were certainly not sent.
//
// The first write opens a session of the cluster, which further ones share; module
// uploads need none. Every failure of a write has the detail "outcome": failed, it
// was not done and will not be, or unknown, and then "request_id" says with which id
// to make the same call again, at this client or another; here it keeps its place in
// the session. A session that the cluster does not know any more is replaced, and a
// write that met that is made again only when no attempt of it is in doubt. A caller
// that sets write.session_id does all this itself.
//
// Status is answered by one of the configured peers, never by a learned one,
// because it tells what that peer knows.
type Client struct {
	controlPlane
	cluster
	transport *transport
}

// New makes a client. It connects with the first call. Errors are those of a
// Config that lacks something.
func New(cfg Config) (*Client, error) {
	switch {
	case len(cfg.Addresses) == 0:
		return nil, errors.New("make client: no address of a peer given")
	case cfg.Identity == nil:
		return nil, errors.New("make client: no identity given")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	t, err := newTransport(cfg)
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	return &Client{
		controlPlane: pb.NewControlPlaneServiceClient(t),
		cluster:      pb.NewClusterServiceClient(t),
		transport:    t,
	}, nil
}

// FromContext makes a client of the cluster that c describes.
func FromContext(c Context) (*Client, error) {
	id, err := c.Identity()
	if err != nil {
		return nil, err
	}
	return New(Config{Addresses: c.Addresses, Identity: id})
}

// Close closes all connections; calls under way fail.
func (c *Client) Close() error { return c.transport.close() }
