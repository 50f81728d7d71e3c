package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/internal/plant"
)

var (
	errSealed  = errors.New("this peer has stopped sending until its disk answers again")
	errNoVotes = errors.New("this peer does not vote before it has joined again")
)

// guard stands between Raft and its transport. It keeps a peer that forgot its
// past from voting, and a leader whose disk hangs from looking healthy.
type guard struct {
	hop
	mayVote *atomic.Bool
	seals   atomic.Int32
	// syncedWhile waits until this peer has on disk all entries that it has counted,
	// sent or acknowledged; see parallelLogs. Set it before Raft starts.
	syncedWhile func(leads func() bool) error
	// leadsIn reports whether this peer leads in a term. Set it before Raft starts.
	leadsIn func(term uint64) bool
	// stand returns why this peer should not be elected now, or nil. Set it before Raft starts.
	stand func() error
	// covers reports whether all up to an index is in this peer's state and in its
	// log or snapshot. Set it before Raft starts.
	covers func(index uint64) bool
	// beat is told of each heartbeat whether it got through. Set it before Raft starts.
	beat func(id raft.ServerID, reached bool)
}

func newGuard(inner raft.Transport, mayVote *atomic.Bool) (*guard, error) {
	h, err := newHop(inner)
	return &guard{
		hop: h, mayVote: mayVote,
		syncedWhile: func(func() bool) error { return nil }, leadsIn: func(uint64) bool { return true },
		stand: func() error { return nil }, covers: func(uint64) bool { return false }, beat: func(raft.ServerID, bool) {},
	}, err
}

// run passes incoming messages to Raft until ctx ends.
func (g *guard) run(ctx context.Context) {
	g.each(ctx, func(rpc raft.RPC) {
		if g.refuses(rpc.Command) {
			rpc.Respond(nil, errNoVotes)
			return
		}
		g.pass(ctx, g.held(ctx, g.fresh(rpc)))
	})
}

// errStale answers a snapshot that was on its way for too long.
var errStale = errors.New("this peer has more than the snapshot")

// fresh makes a snapshot that has been overtaken unreadable. One whose leader gave
// it up may still arrive, when a connection comes back to life, and hashicorp/raft
// would go back to it: to a state of the past, and from there to entries that may
// be gone from the log. It reads where nothing else changes the state, so that what
// is found there still holds.
func (g *guard) fresh(rpc raft.RPC) raft.RPC {
	if req, ok := rpc.Command.(*raft.InstallSnapshotRequest); ok {
		rpc.Reader = &freshReader{Reader: rpc.Reader, stale: func() bool { return g.covers(req.LastLogIndex) }}
	}
	return rpc
}

// freshReader fails at the first Read of a snapshot that is stale, once it is out
// of the way of what follows it.
type freshReader struct {
	io.Reader
	stale func() bool
	begun bool
}

// Read implements io.Reader.
func (r *freshReader) Read(p []byte) (int, error) {
	if !r.begun {
		if r.begun = true; r.stale() {
			_, err := io.Copy(io.Discard, r.Reader)
			return 0, errors.Join(errStale, err)
		}
	}
	return r.Reader.Read(p)
}

// held makes the answer to entries wait until they are on disk. Those that a
// deposed leader has from its own time may not be yet, and Raft acknowledges them.
func (g *guard) held(ctx context.Context, rpc raft.RPC) raft.RPC {
	if _, entries := rpc.Command.(*raft.AppendEntriesRequest); !entries {
		return rpc
	}
	answer, answers := rpc.RespChan, make(chan raft.RPCResponse, 1)
	rpc.RespChan = answers
	go func() {
		select {
		case <-ctx.Done():
		case a := <-answers:
			if err := g.syncedWhile(always); err != nil {
				a.Error = err
			}
			answer <- a
		}
	}()
	return rpc
}

func always() bool { return true }

func (g *guard) refuses(command any) bool {
	switch command.(type) {
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest:
		return !g.mayVote.Load() && !plant.On(plant.ForgottenVotes)
	case *raft.TimeoutNowRequest:
		return !g.mayVote.Load() || g.stand() != nil
	default:
		return false
	}
}

// seal stops everything this peer sends; each seal needs its unseal.
func (g *guard) seal() { g.seals.Add(1) }

func (g *guard) unseal() { g.seals.Add(-1) }

func (g *guard) check() error {
	if g.seals.Load() > 0 {
		return errSealed
	}
	return nil
}

// AppendEntriesPipeline is refused: pipelining can wedge a follower.
func (g *guard) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// AppendEntries sends entries, or a heartbeat. While the disk hangs it sends
// nothing, and what was answered meanwhile does not count either. The answer to
// entries counts once this peer has them on disk itself.
//
// hashicorp/raft sends the heartbeats of a leader that was deposed until the last
// AppendEntries has returned. Followers in the same term would take them for those
// of a leader and never stand: so they are not sent, and nothing waits any more.
func (g *guard) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := g.check(); err != nil {
		return err
	}
	leads := func() bool { return g.leadsIn(args.Term) }
	if !leads() {
		return errDeposed
	}
	err := g.Transport.AppendEntries(id, target, args, resp)
	if isHeartbeat(args) {
		g.beat(id, err == nil)
	}
	if err != nil {
		return err
	}
	if len(args.Entries) > 0 {
		if err := g.syncedWhile(leads); err != nil {
			return err
		}
	}
	return g.check()
}

// RequestVote asks for a vote.
func (g *guard) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := g.check(); err != nil {
		return err
	}
	return g.Transport.RequestVote(id, target, args, resp)
}

// RequestPreVote asks whether a vote would be given.
func (g *guard) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if err := g.check(); err != nil {
		return err
	}
	if err := g.stand(); err != nil {
		return err
	}
	return g.preVote.RequestPreVote(id, target, args, resp)
}

// InstallSnapshot sends a snapshot.
func (g *guard) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := g.check(); err != nil {
		return err
	}
	return g.Transport.InstallSnapshot(id, target, args, resp, data)
}

// TimeoutNow tells a peer to stand for election.
func (g *guard) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	if err := g.check(); err != nil {
		return err
	}
	return g.Transport.TimeoutNow(id, target, args, resp)
}

// named joins a peer's id and an address, so that who is meant travels with
// where to dial through the connection pool of hashicorp/raft.
func named(id raft.ServerID, address string) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "@" + address)
}

// unnamed returns the host:port of an address with or without an id.
func unnamed(address raft.ServerAddress) string {
	if _, at, ok := strings.Cut(string(address), "@"); ok {
		return at
	}
	return string(address)
}

// addresses finds where a peer's Raft transport is.
type addresses struct {
	self raft.ServerAddress
	id   raft.ServerID
	// hint returns what gossip says, or ""; known what the Raft configuration says, or "".
	hint, known func(id string) string
}

// ServerAddr implements raft.ServerAddressProvider.
func (a *addresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	if id == a.id {
		return a.self, nil
	}
	for _, look := range []func(string) string{a.hint, a.known} {
		if address := look(string(id)); address != "" {
			return named(id, address), nil
		}
	}
	return "", fmt.Errorf("no address of peer %s is known", id)
}

// streams is the network below Raft: mutual TLS, each connection bound to the
// id of the peer that is meant.
type streams struct {
	*identity.StreamLayer
	known func(id string) string

	mu     sync.Mutex
	open   map[*trackedConn]struct{}
	closed bool
}

// Accept waits for the next connection.
func (s *streams) Accept() (net.Conn, error) {
	conn, err := s.StreamLayer.Accept()
	if err != nil {
		return nil, err
	}
	return s.track(conn)
}

// Dial connects to the peer named in address, "id@host:port". When nobody, or
// somebody else, is there, it tries the address of the Raft configuration.
func (s *streams) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, at, ok := strings.Cut(string(address), "@")
	if !ok {
		return nil, fmt.Errorf("dial raft at %s: it is not known which peer that is", address)
	}
	conn, err := s.dial(id, at, timeout)
	if other := s.known(id); err != nil && other != "" && other != at {
		var again error
		if conn, again = s.dial(id, other, timeout); again == nil {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	return s.track(conn)
}

func (s *streams) dial(id, address string, timeout time.Duration) (net.Conn, error) {
	conn, err := s.StreamLayer.Dial(address, timeout)
	if err != nil {
		return nil, err
	}
	if got := peerName(conn); got != id {
		return nil, errors.Join(fmt.Errorf("dial raft of %s at %s: %q is there", id, address, got), conn.Close())
	}
	return conn, nil
}

// peerName returns the name in the certificate at the other end, or "".
func peerName(conn net.Conn) string {
	secure, ok := conn.(*tls.Conn)
	if !ok {
		return ""
	}
	chain := secure.ConnectionState().PeerCertificates
	if len(chain) == 0 || len(chain[0].URIs) != 1 {
		return ""
	}
	subject, err := identity.ParseSubject(chain[0].URIs[0].String())
	if err != nil {
		return ""
	}
	return subject.Name
}

// track remembers a connection so that Close ends it: raft.NetworkTransport
// leaves its connections open.
func (s *streams) track(conn net.Conn) (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	out := &trackedConn{Conn: conn, owner: s}
	s.open[out] = struct{}{}
	return out, nil
}

// Close stops listening and ends all connections.
func (s *streams) Close() error {
	s.mu.Lock()
	s.closed = true
	open := s.open
	s.open = nil
	s.mu.Unlock()
	err := s.StreamLayer.Close()
	for conn := range open {
		// The other side may have gone first.
		_ = conn.Conn.Close()
	}
	return err
}

type trackedConn struct {
	net.Conn
	owner *streams
}

// Close ends the connection.
func (c *trackedConn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// openTransport opens Raft over TLS.
func openTransport(cfg Config, where *addresses) (raft.Transport, error) {
	var advertise net.Addr
	if cfg.RaftAdvertise != "" {
		advertise = hostPort(cfg.RaftAdvertise)
	}
	layer, err := cfg.Identity.StreamLayer(cfg.RaftBind, advertise)
	if err != nil {
		return nil, err
	}
	where.self = raft.ServerAddress(layer.Addr().String())
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		ServerAddressProvider: where,
		Logger:                newHCLog(cfg.Logger.With("component", "raft-net")),
		Stream:                &streams{StreamLayer: layer, known: where.known, open: map[*trackedConn]struct{}{}},
		MaxPool:               maxPool,
		// Pipelining can wedge a follower.
		MaxRPCsInFlight: 1,
		Timeout:         raftIOTimeout,
	}), nil
}

// hostPort is an address that may name a host, which net.TCPAddr cannot.
type hostPort string

// Network returns "tcp".
func (hostPort) Network() string { return "tcp" }

// String returns host:port.
func (a hostPort) String() string { return string(a) }
