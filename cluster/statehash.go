package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// ErrDiverged is wrapped by the error of a peer whose state is not that of the
// majority. Its text names the index, both hashes and the way back.
var ErrDiverged = errors.New("the state of this peer differs from that of the others")

// divergedFile marks the log and snapshots of a peer whose state differed. It
// lies among them, so that it goes away with them.
const divergedFile = "DIVERGED"

// comparedIndexes is at how many indexes peers compare: the latest of the one
// that asks, and some that divide evenly, of which peers that lag know one too.
const comparedIndexes = 8

// StateHash tells the hashes of this peer's state. Peers and operators may ask.
func (s *service) StateHash(ctx context.Context, req *pb.StateHashRequest) (*pb.StateHashResponse, error) {
	caller, ok := identity.Caller(ctx)
	if !ok || !caller.IsAdmin() && !caller.IsPeer() {
		return nil, denied("the hashes of the state")
	}
	state := s.peer.state
	view := state.View()
	out := &pb.StateHashResponse{PeerId: s.peer.cfg.ID, ClusterId: view.ClusterID(), Index: view.Index()}
	for _, index := range req.GetIndexes() {
		if hash, ok := state.HashAt(index); ok {
			out.Hashes = append(out.Hashes, &pb.IndexHash{Index: index, Hash: hash})
		}
	}
	return out, nil
}

// compareStates compares this peer's state with that of the voters every now and
// then, until ctx ends. Each peer judges itself: nobody can tell another to stop.
// It returns an error that wraps ErrDiverged when a majority agrees on another
// state; the peer must not go on then.
func (p *Peer) compareStates(ctx context.Context) error {
	said := uint64(0)
	for pause(ctx, p.cfg.Timers.CompareStates, nil) {
		polls := p.poll(ctx)
		for _, poll := range polls {
			switch majority, ok := poll.majority(); {
			case ok && majority != poll.mine:
				return p.diverged(poll, majority)
			case !ok && len(poll.votes) > 1 && poll.index > said:
				said = poll.index
				p.log.Error("the states of the peers differ and no majority agrees; compare state_hash of wasmatrix status at each peer",
					"index", poll.index, "hash", poll.mine, "hashes", fmt.Sprint(poll.votes))
			}
		}
	}
	return nil
}

// poll is what the voters said of the state at one index.
type poll struct {
	index  uint64
	mine   string
	voters int
	// votes counts the voters by their hash, this peer's own with them if it has a vote.
	votes map[string]int
}

// majority returns the hash on which more than half of all voters agree.
func (q *poll) majority() (string, bool) {
	for hash, n := range q.votes {
		if n > q.voters/2 {
			return hash, true
		}
	}
	return "", false
}

// poll asks all voters for the hashes of what this peer has applied.
func (p *Peer) poll(ctx context.Context) []*poll {
	var others []raft.Server
	voters, self := 0, false
	for _, s := range p.servers() {
		switch {
		case s.Suffrage != raft.Voter:
			continue
		case string(s.ID) == p.cfg.ID:
			self = true
		default:
			others = append(others, s)
		}
		voters++
	}
	polls := map[uint64]*poll{}
	request := &pb.StateHashRequest{}
	for _, index := range compared(p.state.View().Index()) {
		mine, ok := p.state.HashAt(index)
		if !ok || polls[index] != nil {
			continue
		}
		polls[index] = &poll{index: index, mine: mine, voters: voters, votes: map[string]int{}}
		if self {
			polls[index].votes[mine] = 1
		}
		request.Indexes = append(request.Indexes, index)
	}
	if len(others) == 0 || len(request.GetIndexes()) == 0 {
		return nil
	}
	for _, answer := range p.askHashes(ctx, others, request) {
		for _, h := range answer.GetHashes() {
			if q := polls[h.GetIndex()]; q != nil {
				q.votes[h.GetHash()]++
			}
		}
	}
	var out []*poll
	for _, index := range request.GetIndexes() {
		out = append(out, polls[index])
	}
	return out
}

// askHashes asks voters, all at once, and returns the answers of those of this cluster.
func (p *Peer) askHashes(ctx context.Context, voters []raft.Server, request *pb.StateHashRequest) []*pb.StateHashResponse {
	answers := make([]*pb.StateHashResponse, len(voters))
	var group sync.WaitGroup
	for i, s := range voters {
		address := p.apiAddress(string(s.ID))
		if address == "" || !p.isAlive(string(s.ID)) {
			continue
		}
		group.Go(func() {
			err := p.ask(ctx, askLimit, address, func(ctx context.Context, c pb.ClusterServiceClient) (err error) {
				answers[i], err = c.StateHash(ctx, request)
				return err
			})
			if err != nil || answers[i].GetPeerId() != string(s.ID) || answers[i].GetClusterId() != p.state.View().ClusterID() {
				answers[i] = nil
			}
		})
	}
	group.Wait()
	return answers
}

// compared lists the indexes to compare for a peer that is at index.
func compared(index uint64) []uint64 {
	out := []uint64{index}
	back := uint64(0)
	for step := index / fsm.CoarseStep * fsm.CoarseStep; step > back && len(out) < comparedIndexes; {
		out = append(out, step-back)
		back = max(fsm.CoarseStep, 4*back)
	}
	return out
}

// diverged marks the disk and returns what Run ends with.
func (p *Peer) diverged(q *poll, majority string) error {
	err := fmt.Errorf("%w: at index %d its hash is %s, and %d of %d voters have %s; keep %s for a report, move it aside and start again: the peer recovers from the others",
		ErrDiverged, q.index, q.mine, q.votes[majority], q.voters, majority, raftDir(p.cfg.DataDir))
	if p.cfg.DataDir == "" {
		return err
	}
	text := err.Error()[len(ErrDiverged.Error())+len(": "):]
	if marked := os.WriteFile(filepath.Join(raftDir(p.cfg.DataDir), divergedFile), []byte(text), 0o600); marked != nil {
		p.log.Error("mark the disk", "error", marked)
	}
	return err
}

// wasDiverged returns the error with which this peer ended before, until its
// files were moved aside.
func wasDiverged(dataDir string) error {
	if dataDir == "" {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(raftDir(dataDir), divergedFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look whether the state differed: %w", err)
	default:
		return fmt.Errorf("%w: %s", ErrDiverged, text)
	}
}
