package cluster

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Register adds ClusterService to a server. The server's interceptors must
// authenticate callers and end with ForwardUnary.
func (p *Peer) Register(server grpc.ServiceRegistrar) {
	pb.RegisterClusterServiceServer(server, &service{peer: p})
}

// service is the gRPC face of a peer.
type service struct {
	pb.UnimplementedClusterServiceServer
	peer *Peer
}

// Status tells what this peer knows of the cluster. Every authenticated caller may ask.
func (s *service) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	if _, ok := identity.Caller(ctx); !ok {
		return nil, denied("the status of the cluster")
	}
	return s.peer.status(), nil
}

// Join adds a peer. One that asks has no past, or lost it, so what it promised
// before must not count any more: a member is removed first and comes back as a
// non-voter. That also makes Raft forget how long it has been failing to reach it.
func (s *service) Join(ctx context.Context, req *pb.JoinRequest) (*pb.JoinResponse, error) {
	p := s.peer
	if !mayActFor(ctx, req.GetPeerId()) {
		return nil, denied("the membership of " + req.GetPeerId())
	}
	if err := p.mayJoin(req); err != nil {
		return nil, err
	}
	if req.GetPeerId() == p.cfg.ID {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the leader itself has the id %s", req.GetPeerId()).
			Next("give each peer an id and a certificate of its own")
	}
	id := raft.ServerID(req.GetPeerId())
	if suffrage, member := p.suffrage(req.GetPeerId()); member {
		// Without a quorum of the others the removal could never be committed.
		if why := mayRemove(p.servers(), req.GetPeerId(), p.isAlive); why != "" {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "%s lost its disk and cannot get its vote back now: %s", id, why).
				Next("start the peers that are down")
		}
		p.log.Warn("a member joins again", "id", id, "was", suffrage.String())
		if err := p.removeServer(ctx, id); err != nil {
			return nil, err
		}
	}
	address := p.configAddress(id, req.GetRaftAddress())
	index, err := p.reconfigure(ctx, func(r *raft.Raft) raft.IndexFuture {
		return r.AddNonvoter(id, address, 0, configLimit)
	})
	if err != nil {
		return nil, err
	}
	p.log.Info("a peer joined", "id", id, "raft_address", req.GetRaftAddress())
	err = p.putPeer(ctx, &pb.Peer{Id: req.GetPeerId(), RaftAddress: req.GetRaftAddress(), ApiAddress: req.GetApiAddress()})
	if err != nil {
		return nil, apierror.From(err)
	}
	return &pb.JoinResponse{Index: index}, nil
}

// configAddress is the address with which a new server gets into the Raft
// configuration. Raft takes each address only once, and another server may still
// stand there with one that it has left; the name then makes it unique. Changing
// the other's entry would race with hashicorp/raft's replication.
func (p *Peer) configAddress(id raft.ServerID, address string) raft.ServerAddress {
	for _, s := range p.servers() {
		if s.ID != id && string(s.Address) == address {
			return named(id, address)
		}
	}
	return raft.ServerAddress(address)
}

func (p *Peer) removeServer(ctx context.Context, id raft.ServerID) error {
	_, err := p.reconfigure(ctx, func(r *raft.Raft) raft.IndexFuture { return r.RemoveServer(id, 0, configLimit) })
	return err
}

// Remove takes a peer out of the Raft configuration and the registry.
func (s *service) Remove(ctx context.Context, req *pb.RemoveRequest) (*pb.RemoveResponse, error) {
	p := s.peer
	if !isAdmin(ctx) {
		return nil, denied("the membership of " + req.GetPeerId())
	}
	if _, ok := p.suffrage(req.GetPeerId()); !ok {
		return nil, p.notAPeer(req.GetPeerId())
	}
	if why := mayRemove(p.servers(), req.GetPeerId(), p.isAlive); why != "" && !req.GetForce() {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "removing %s could end the quorum: %s", req.GetPeerId(), why).
			Next("start the peers that are down, or remove it with --force")
	}
	index, err := p.reconfigure(ctx, func(r *raft.Raft) raft.IndexFuture {
		return r.RemoveServer(raft.ServerID(req.GetPeerId()), 0, configLimit)
	})
	if err != nil {
		return nil, err
	}
	p.log.Info("a peer was removed", "id", req.GetPeerId())
	// When the leader removed itself the next one tidies the registry.
	if req.GetPeerId() != p.cfg.ID {
		if err := p.forgetPeer(ctx, req.GetPeerId()); err != nil {
			return nil, apierror.From(err)
		}
	}
	return &pb.RemoveResponse{Index: index}, nil
}

// Promote makes a non-voter a voter, once that has been in touch for the
// stabilization time and has caught up: a voter that cannot acknowledge makes the
// quorum larger and helps nobody. A peer asks for itself.
func (s *service) Promote(ctx context.Context, req *pb.PromoteRequest) (*pb.PromoteResponse, error) {
	p := s.peer
	if !mayActFor(ctx, req.GetPeerId()) {
		return nil, denied("the vote of " + req.GetPeerId())
	}
	servers := p.servers()
	at := slices.IndexFunc(servers, func(s raft.Server) bool { return string(s.ID) == req.GetPeerId() })
	if at < 0 {
		return nil, p.notAPeer(req.GetPeerId())
	}
	if servers[at].Suffrage != raft.Voter {
		if err := p.mayVote(ctx, req.GetPeerId()); err != nil {
			return nil, err
		}
	}
	index, err := p.reconfigure(ctx, func(r *raft.Raft) raft.IndexFuture {
		return r.AddVoter(servers[at].ID, servers[at].Address, 0, configLimit)
	})
	if err != nil {
		return nil, err
	}
	p.log.Info("a peer became a voter", "id", req.GetPeerId())
	return &pb.PromoteResponse{Index: index}, nil
}

// mayVote returns why a non-voter must not become a voter yet, or nil.
func (p *Peer) mayVote(ctx context.Context, id string) error {
	r, leave := p.enter()
	defer leave()
	if r == nil {
		return p.noLeader()
	}
	notYet := func(format string, args ...any) error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, format, args...).
			With(DetailOutcome, OutcomeFailed).Next("repeat the call a little later; see wasmatrix cluster peers")
	}
	want := p.cfg.Timers.Stabilization
	if since := p.role.contacts.steadySince(id); since.IsZero() {
		return notYet("%s is not in touch with the leader", id)
	} else if time.Since(since) < want {
		return notYet("%s becomes a voter when it has been in touch with the leader for %s", id, want)
	}
	commit := r.CommitIndex()
	status, err := p.askStatus(ctx, p.apiAddress(id))
	switch {
	case err != nil:
		return notYet("%s does not say how far it is: %s", id, apierror.From(err).Error())
	case status.GetPeerId() != id:
		return notYet("%s answers where %s is said to be", status.GetPeerId(), id)
	case status.GetAppliedIndex()+mayLag < commit:
		return notYet("%s has applied index %d, the leader is at %d", id, status.GetAppliedIndex(), commit)
	}
	return nil
}

// mayLag is how many entries a peer that becomes a voter may be behind: under
// load everybody is behind by those under way.
const mayLag = 256

// TransferLeadership hands leadership to another voter and answers when that
// one, or whoever was elected instead, is known.
func (s *service) TransferLeadership(ctx context.Context, req *pb.TransferLeadershipRequest) (*pb.TransferLeadershipResponse, error) {
	p := s.peer
	if !isAdmin(ctx) {
		return nil, denied("the leadership")
	}
	r, leave := p.enter()
	defer leave()
	if r == nil {
		return nil, p.noLeader()
	}
	if req.GetPeerId() == p.cfg.ID {
		return &pb.TransferLeadershipResponse{LeaderId: p.cfg.ID, PreviousLeaderId: p.cfg.ID}, nil
	}
	if err := p.handOverTo(ctx, r, req.GetPeerId()); err != nil {
		return nil, err
	}
	leader, err := p.waitLeader(ctx, p.cfg.ID)
	if err != nil {
		return nil, err
	}
	return &pb.TransferLeadershipResponse{LeaderId: leader, PreviousLeaderId: p.cfg.ID}, nil
}

// handOverTo gives leadership to a voter, or to any one for "".
func (p *Peer) handOverTo(ctx context.Context, r *raft.Raft, id string) (err error) {
	suffrage, ok := p.suffrage(id)
	switch {
	case id == "":
		err = p.handOver(ctx, r)
	case !ok:
		return p.notAPeer(id)
	case suffrage != raft.Voter:
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "%s is not a voter", id).Next("wasmatrix cluster peers")
	default:
		err = p.flights.await(ctx, r.LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(p.recordedAddress(id))))
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return contextError(ctx)
	default:
		return p.changeError("hand leadership over", err)
	}
}

// waitLeader waits for a leader other than before; if none is known in time the
// election came out as before.
func (p *Peer) waitLeader(ctx context.Context, before string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Timers.LeaderWait)
	defer cancel()
	for {
		changed := p.changed.wait()
		id, _ := p.Leader()
		if id != "" && id != before {
			return id, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if id != "" {
				return id, nil
			}
			return "", p.noLeader()
		}
	}
}

// status is what this peer knows of the cluster.
func (p *Peer) status() *pb.StatusResponse {
	view := p.state.View()
	out := &pb.StatusResponse{
		PeerId: p.cfg.ID, Cluster: p.cfg.Cluster, Version: p.cfg.Version,
		StateHash: view.Hash(), ClusterId: p.incarnation.String(),
		Instances: map[string]uint32{}, Providers: map[string]uint32{},
		RaftState: "shutdown",
	}
	countState(view, out)
	if r := p.raft.Load(); r != nil {
		out.Term, out.CommitIndex, out.AppliedIndex, out.LastLogIndex = r.CurrentTerm(), r.CommitIndex(), r.AppliedIndex(), r.LastIndex()
		out.RaftState = strings.ToLower(r.State().String())
	}
	out.LeaderId, out.LeaderApiAddress = p.Leader()
	if since := p.role.leaderless.Load(); since != 0 && out.LeaderId == "" {
		out.WithoutLeader = durationpb.New(time.Since(time.Unix(0, since)))
	}
	out.Peers = p.Peers()
	return out
}

// peerStatus is what this peer knows of one peer of the Raft configuration.
func (p *Peer) peerStatus(s raft.Server, leader string) *pb.PeerStatus {
	id := string(s.ID)
	m, known := p.member(id)
	out := &pb.PeerStatus{
		Id: id, RaftAddress: p.recordedAddress(id), ApiAddress: p.apiAddress(id),
		Voter: s.Suffrage == raft.Voter, Leader: id == leader, Alive: known && m.Alive, Self: id == p.cfg.ID,
	}
	switch {
	case out.Self:
		out.RaftAddress = m.Metadata.GetRaftAddress()
		if p.role.outside.Load() {
			out.Message = "removed from the cluster"
		}
	case !known:
		out.Message = "never seen by gossip"
	case m.Left:
		out.Message = "stopped " + time.Since(m.Since).Round(time.Second).String() + " ago"
	case !m.Alive:
		out.Message = "unreachable for " + time.Since(m.Since).Round(time.Second).String()
	case p.IsLeader() && p.role.contacts.isLost(id):
		out.Message = "alive, and does not answer the leader"
	}
	return out
}

func countState(view fsm.View, out *pb.StatusResponse) {
	for _, n := range view.Nodes(nil) {
		if n.GetState() == pb.NodeState_NODE_STATE_READY {
			out.NodesReady++
			countRuntimes(n, out)
		} else {
			out.NodesLost++
		}
	}
	for _, i := range view.Instances(nil) {
		out.Instances[strings.TrimPrefix(i.GetStatus().GetState().String(), "INSTANCE_STATE_")]++
	}
	for _, pr := range view.Providers(nil) {
		out.Providers[strings.TrimPrefix(pr.GetStatus().GetState().String(), "PROVIDER_STATE_")]++
	}
}

// countRuntimes adds what a node offers, in the order of the runtimes' names.
func countRuntimes(n *pb.Node, out *pb.StatusResponse) {
	for _, r := range n.GetInfo().GetRuntimeInfo() {
		offer := &pb.RuntimeOffer{Name: r.GetName(), Isolation: r.GetIsolation()}
		at, known := slices.BinarySearchFunc(out.Runtimes, offer, func(a, b *pb.RuntimeOffer) int {
			return cmp.Or(strings.Compare(a.GetName(), b.GetName()), strings.Compare(a.GetIsolation(), b.GetIsolation()))
		})
		if !known {
			out.Runtimes = slices.Insert(out.Runtimes, at, offer)
		}
		out.Runtimes[at].Nodes++
	}
}

// isAlive reports whether gossip sees a peer.
func (p *Peer) isAlive(id string) bool {
	m, ok := p.member(id)
	return id == p.cfg.ID || ok && m.Alive
}

func (p *Peer) notAPeer(id string) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "%s is not a peer of the cluster", id).
		With("peer", id).Next("wasmatrix cluster peers")
}

func isAdmin(ctx context.Context) bool {
	caller, ok := identity.Caller(ctx)
	return ok && caller.IsAdmin()
}

// mayActFor reports whether the caller is an operator, or the peer itself.
func mayActFor(ctx context.Context, peer string) bool {
	caller, ok := identity.Caller(ctx)
	return ok && (caller.IsAdmin() || caller.IsPeer() && caller.Name == peer)
}

func denied(what string) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "the caller may not touch %s", what).
		Next("use the certificate of an admin")
}
