package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// ErrOtherCluster is wrapped by the error of a peer whose disk belongs to another
// cluster than the one it meets, although both have the same name.
var ErrOtherCluster = errors.New("the disk of this peer belongs to another cluster of the same name")

// incarnationKey is where the stable store keeps which cluster the disk belongs to.
var incarnationKey = []byte("WasmatrixCluster")

// foreignLook is how often a peer without a leader looks whether it met another cluster.
const foreignLook = time.Second

// incarnation is the identity of the cluster that a peer's disk belongs to: ""
// until it has learned one from the log, and then the same for good.
type incarnation struct {
	id     atomic.Value
	stable raft.StableStore
}

func (i *incarnation) String() string {
	id, _ := i.id.Load().(string)
	return id
}

// open reads what the disk says.
func (i *incarnation) open(stable raft.StableStore) error {
	i.stable = stable
	id, err := stable.Get(incarnationKey)
	switch {
	case err != nil && err.Error() != textNotFound:
		return fmt.Errorf("read which cluster the disk belongs to: %w", err)
	case len(id) > 0:
		i.id.Store(string(id))
	}
	return nil
}

// learn takes in what the log says.
func (i *incarnation) learn(id string) error {
	known := i.String()
	switch {
	case id == "" || id == known:
		return nil
	case known != "":
		return otherCluster(known, id)
	}
	if err := i.stable.Set(incarnationKey, []byte(id)); err != nil {
		return fmt.Errorf("write which cluster the disk belongs to: %w", err)
	}
	i.id.Store(id)
	return nil
}

func otherCluster(mine, theirs string) error {
	return fmt.Errorf("%w: it is of %s, and the peers run %s", ErrOtherCluster, mine, theirs)
}

// incarnationDuty gives a new cluster its identity.
func (p *Peer) incarnationDuty(ctx context.Context) error {
	for p.state.View().ClusterID() == "" {
		_, err := p.Propose(ctx, &pb.Command{
			Actor:   membershipActor,
			Payload: &pb.Command_InitCluster{InitCluster: &pb.InitClusterCommand{ClusterId: uuid.NewString()}},
		})
		if err == nil || apierror.From(err).Detail("cluster_id") != "" {
			return nil
		}
		p.log.Warn("give the cluster its identity", "error", err)
		if !pause(ctx, dutyRetry, nil) {
			return nil
		}
	}
	return nil
}

// keepIncarnation notes on the disk which cluster this is as soon as the log says
// so, and ends the peer when it finds itself among peers of another one.
func (p *Peer) keepIncarnation(ctx context.Context) error {
	for p.incarnation.String() == "" {
		view := p.state.View()
		if id := view.ClusterID(); id != "" {
			if err := p.incarnation.learn(id); err != nil {
				return err
			}
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.state.Changed(view.Index()):
		}
	}
	for pause(ctx, foreignLook, nil) {
		if err := p.incarnation.learn(p.state.View().ClusterID()); err != nil {
			return p.foreign(err)
		}
		since := p.role.leaderless.Load()
		if since == 0 || time.Since(time.Unix(0, since)) < foreignLook {
			continue
		}
		if err := p.amongStrangers(ctx); err != nil {
			return p.foreign(err)
		}
	}
	return nil
}

// foreign adds the way out.
func (p *Peer) foreign(err error) error {
	return fmt.Errorf("%w; to join them move %s aside and start again; to keep the old cluster give it its own peers", err, raftDir(p.cfg.DataDir))
}

// amongStrangers fails when a live member has a leader and is of another cluster.
func (p *Peer) amongStrangers(ctx context.Context) error {
	for _, m := range p.known() {
		if !m.Alive || m.Metadata.GetPeerId() == p.cfg.ID {
			continue
		}
		status, err := p.askStatus(ctx, m.Metadata.GetApiAddress())
		if err != nil || status.GetLeaderId() == "" || status.GetClusterId() == "" {
			continue
		}
		// Of a cluster that was recovered from this one watchSuperseded tells.
		if mine := p.incarnation.String(); status.GetClusterId() != mine && !supersedes(status.GetClusterId(), mine) {
			return otherCluster(mine, status.GetClusterId())
		}
	}
	return nil
}

// mayJoin refuses a peer whose disk is of another cluster: what it has applied
// would stay in its state.
func (p *Peer) mayJoin(req *pb.JoinRequest) error {
	mine := p.state.View().ClusterID()
	if req.GetClusterId() == "" || mine == "" || req.GetClusterId() == mine {
		return nil
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the disk of %s belongs to another cluster of the same name", req.GetPeerId()).
		With("cluster_id", mine).With("joining_cluster_id", req.GetClusterId()).
		Next("move the directory raft of that peer's data directory aside and start it again")
}

// border keeps Raft messages within one cluster: each carries the identity of the
// sender's, and is refused where another one is known. A peer that has no identity
// yet is let through, both ways.
type border struct {
	hop
	mine *incarnation
}

func newBorder(inner raft.Transport, mine *incarnation) (*border, error) {
	h, err := newHop(inner)
	return &border{hop: h, mine: mine}, err
}

// run passes on the messages that may come in until ctx ends.
func (b *border) run(ctx context.Context) {
	b.each(ctx, func(rpc raft.RPC) {
		if err := b.enter(&rpc); err != nil {
			rpc.Respond(nil, err)
			return
		}
		b.pass(ctx, rpc)
	})
}

// SetHeartbeatHandler lets heartbeats past the queue, but not past the border.
func (b *border) SetHeartbeatHandler(handle func(raft.RPC)) {
	if handle == nil {
		b.Transport.SetHeartbeatHandler(nil)
		return
	}
	b.Transport.SetHeartbeatHandler(func(rpc raft.RPC) {
		if err := b.enter(&rpc); err != nil {
			rpc.Respond(nil, err)
			return
		}
		handle(rpc)
	})
}

// separator parts a peer's id from the identity of its cluster; ids of peers do
// not hold it.
const separator = "#"

// enter takes the identity off a message and compares it.
func (b *border) enter(rpc *raft.RPC) error {
	var header *raft.RPCHeader
	switch c := rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		header = &c.RPCHeader
	case *raft.RequestVoteRequest:
		header = &c.RPCHeader
	case *raft.RequestPreVoteRequest:
		header = &c.RPCHeader
	case *raft.InstallSnapshotRequest:
		header = &c.RPCHeader
	case *raft.TimeoutNowRequest:
		header = &c.RPCHeader
	default:
		return nil
	}
	id, theirs, _ := strings.Cut(string(header.ID), separator)
	header.ID = []byte(id)
	if mine := b.mine.String(); theirs != "" && mine != "" && theirs != mine {
		return fmt.Errorf("peer %s is of cluster %s, this one is of %s: one of them has an old disk", id, theirs, mine)
	}
	return nil
}

// leave puts the identity on a message.
func (b *border) leave(header raft.RPCHeader) raft.RPCHeader {
	if mine := b.mine.String(); mine != "" {
		header.ID = []byte(string(header.ID) + separator + mine)
	}
	return header
}

// AppendEntries sends entries, or a heartbeat.
func (b *border) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	out := *args
	out.RPCHeader = b.leave(args.RPCHeader)
	return b.Transport.AppendEntries(id, target, &out, resp)
}

// RequestVote asks for a vote.
func (b *border) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	out := *args
	out.RPCHeader = b.leave(args.RPCHeader)
	return b.Transport.RequestVote(id, target, &out, resp)
}

// RequestPreVote asks whether a vote would be given.
func (b *border) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	out := *args
	out.RPCHeader = b.leave(args.RPCHeader)
	return b.preVote.RequestPreVote(id, target, &out, resp)
}

// InstallSnapshot sends a snapshot.
func (b *border) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	out := *args
	out.RPCHeader = b.leave(args.RPCHeader)
	return b.Transport.InstallSnapshot(id, target, &out, resp, data)
}

// TimeoutNow tells a peer to stand for election.
func (b *border) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	out := *args
	out.RPCHeader = b.leave(args.RPCHeader)
	return b.Transport.TimeoutNow(id, target, &out, resp)
}
