package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

const (
	// maxPeers bounds how many addresses a client keeps, configured and learned.
	maxPeers = 32
	// The first look for further peers comes when a client has lived firstRefresh,
	// so that a client made for a single call makes just that one.
	firstRefresh   = time.Second
	refreshEvery   = 30 * time.Second
	refreshTimeout = 5 * time.Second
)

// peer is one address of the control plane.
type peer struct {
	address string
	conn    *grpc.ClientConn
	given   bool
}

// peerSet holds the known peers and which of them to ask first.
type peerSet struct {
	opts []grpc.DialOption

	mu      sync.Mutex
	peers   []*peer
	first   int // index of the peer to ask first
	refresh time.Time
	closed  bool
	wg      sync.WaitGroup
}

func newPeerSet(cfg Config) (*peerSet, error) {
	opts := append(rpc.DialOptions(),
		cfg.Identity.DialOption(identity.Subject.IsPeer),
		grpc.WithStatsHandler(sentNotes{}))
	s := &peerSet{opts: append(opts, cfg.DialOptions...), refresh: time.Now().Add(firstRefresh)}
	for _, address := range cfg.Addresses {
		if err := s.add(address, true); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	return s, nil
}

// add adds an address unless it is known. The lock is held, or the set not shared yet.
func (s *peerSet) add(address string, given bool) error {
	for _, p := range s.peers {
		if p.address == address {
			return nil
		}
	}
	if len(s.peers) >= maxPeers {
		return fmt.Errorf("more than %d addresses", maxPeers)
	}
	conn, err := grpc.NewClient(address, s.opts...)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	s.peers = append(s.peers, &peer{address: address, conn: conn, given: given})
	return nil
}

// order returns the peers in the order to ask them.
func (s *peerSet) order(givenOnly bool) []*peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*peer, 0, len(s.peers))
	for i := range s.peers {
		p := s.peers[(s.first+i)%len(s.peers)]
		if p.given || !givenOnly {
			out = append(out, p)
		}
	}
	return out
}

// prefer makes p the first to ask.
func (s *peerSet) prefer(p *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.peers {
		if s.peers[i] == p {
			s.first = i
		}
	}
}

// avoid makes another peer than p the first to ask.
func (s *peerSet) avoid(p *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.peers) > 0 && s.peers[s.first] == p {
		s.first = (s.first + 1) % len(s.peers)
	}
}

// learn adds the peers that a status names. An address that cannot be used is left out.
func (s *peerSet) learn(status *pb.StatusResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.refresh = time.Now().Add(refreshEvery)
	for _, p := range status.GetPeers() {
		if p.GetApiAddress() != "" {
			_ = s.add(p.GetApiAddress(), false)
		}
	}
}

// learnLeader adds the leader that a NO_LEADER refusal names.
func (s *peerSet) learnLeader(err error) {
	address := apierror.From(err).Detail("leader_api_address")
	if address == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		_ = s.add(address, false)
	}
}

// refreshSoon asks the peer that answered last for further peers, in the
// background and once in a while, so that they are known when that one is gone.
func (s *peerSet) refreshSoon(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || time.Now().Before(s.refresh) {
		return
	}
	s.refresh = time.Now().Add(refreshEvery)
	conn := s.peers[s.first].conn
	s.wg.Go(func() {
		// It may go on after the call that caused it; close ends it with the connection.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), refreshTimeout)
		defer cancel()
		if status, err := pb.NewClusterServiceClient(conn).Status(ctx, &pb.StatusRequest{}); err == nil {
			s.learn(status)
		}
	})
}

func (s *peerSet) close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	var err error
	for _, p := range s.peers {
		err = errors.Join(err, p.conn.Close())
	}
	s.mu.Unlock()
	s.wg.Wait()
	return err
}
