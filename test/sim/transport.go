package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// raftTimeout is how long a message to another peer may take, as over TLS.
const raftTimeout = 3 * time.Second

var errNoAnswer = errors.New("sim: no answer in time")

// raftTransport carries the messages of Raft between peers, each on its own: a
// message can be lost, be late, come twice, and be handled though nobody waits
// for the answer any more.
type raftTransport struct {
	net      *Network
	host     string
	local    raft.ServerAddress
	consumer chan raft.RPC
	done     chan struct{}
	once     sync.Once

	mu        sync.Mutex
	heartbeat func(raft.RPC)
}

var (
	_ raft.WithPreVote = (*raftTransport)(nil)
	_ raft.WithClose   = (*raftTransport)(nil)
)

func (n *Network) newTransport(host, at string) *raftTransport {
	t := &raftTransport{
		net: n, host: host, local: raft.ServerAddress(at),
		consumer: make(chan raft.RPC), done: make(chan struct{}),
	}
	n.mu.Lock()
	n.transport[host] = t
	n.mu.Unlock()
	return t
}

// Consumer returns the messages of others.
func (t *raftTransport) Consumer() <-chan raft.RPC { return t.consumer }

// LocalAddr returns the address that others know.
func (t *raftTransport) LocalAddr() raft.ServerAddress { return t.local }

// Close cuts this peer off.
func (t *raftTransport) Close() error { t.once.Do(func() { close(t.done) }); return nil }

// SetHeartbeatHandler lets heartbeats pass by the queue, as the real transport does.
func (t *raftTransport) SetHeartbeatHandler(f func(raft.RPC)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heartbeat = f
}

// EncodePeer returns the address as bytes.
func (t *raftTransport) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }

// DecodePeer is the inverse of EncodePeer.
func (t *raftTransport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// AppendEntriesPipeline is not there, as in the product.
func (t *raftTransport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// AppendEntries sends entries or a heartbeat.
func (t *raftTransport) AppendEntries(id raft.ServerID, _ raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	sent := *args
	sent.Entries = make([]*raft.Log, len(args.Entries))
	for i, e := range args.Entries {
		own := *e
		sent.Entries[i] = &own
	}
	return call(t, id, func() any { c := sent; return &c }, nil, resp)
}

// RequestVote asks for a vote.
func (t *raftTransport) RequestVote(id raft.ServerID, _ raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	sent := *args
	return call(t, id, func() any { c := sent; return &c }, nil, resp)
}

// RequestPreVote asks whether a vote would be given.
func (t *raftTransport) RequestPreVote(id raft.ServerID, _ raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	sent := *args
	return call(t, id, func() any { c := sent; return &c }, nil, resp)
}

// TimeoutNow tells a peer to stand for election.
func (t *raftTransport) TimeoutNow(id raft.ServerID, _ raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	sent := *args
	return call(t, id, func() any { c := sent; return &c }, nil, resp)
}

// InstallSnapshot sends a snapshot.
func (t *raftTransport) InstallSnapshot(id raft.ServerID, _ raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	all, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	sent := *args
	return call(t, id, func() any { c := sent; return &c }, all, resp)
}

// answer is what came back.
type answer[R any] struct {
	resp R
	err  error
}

// call sends one request and waits for its answer. command makes a copy for each
// delivery, because a message may be delivered twice.
func call[R any](t *raftTransport, id raft.ServerID, command func() any, data []byte, into *R) error {
	select {
	case <-t.done:
		return raft.ErrTransportShutdown
	default:
	}
	to := string(id)
	there := t.net.raftAt(to)
	if there == nil && t.net.open(route{t.host, to}) {
		<-time.After(t.net.base)
		return fmt.Errorf("sim: nobody listens at %s", id)
	}
	back := make(chan answer[R], 2)
	t.net.send(route{t.host, to}, func() {
		// Whoever listens when it arrives gets it.
		target := t.net.raftAt(to)
		if target == nil {
			return
		}
		resp, err := target.handle(command(), data)
		if errors.Is(err, raft.ErrTransportShutdown) {
			return
		}
		t.net.send(route{to, t.host}, func() {
			a := answer[R]{err: err}
			if own, ok := resp.(*R); ok && own != nil {
				a.resp = *own
			}
			select {
			case back <- a:
			default:
			}
		})
	})
	timer := time.NewTimer(raftTimeout)
	defer timer.Stop()
	select {
	case a := <-back:
		if a.err != nil {
			return a.err
		}
		*into = a.resp
		return nil
	case <-timer.C:
		return errNoAnswer
	case <-t.done:
		return raft.ErrTransportShutdown
	}
}

// handle gives a request to this peer and waits for its answer.
func (t *raftTransport) handle(command any, data []byte) (any, error) {
	answers := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: command, RespChan: answers}
	if data != nil {
		rpc.Reader = bytes.NewReader(data)
	}
	t.mu.Lock()
	fast := t.heartbeat
	t.mu.Unlock()
	if fast != nil && isHeartbeat(command) {
		fast(rpc)
	} else {
		select {
		case t.consumer <- rpc:
		case <-t.done:
			return nil, raft.ErrTransportShutdown
		}
	}
	select {
	case a := <-answers:
		return a.Response, a.Error
	case <-t.done:
		return nil, raft.ErrTransportShutdown
	}
}

// isHeartbeat tells heartbeats as the real transport does.
func isHeartbeat(command any) bool {
	req, ok := command.(*raft.AppendEntriesRequest)
	return ok && req.Term != 0 && len(req.Addr) != 0 && req.PrevLogEntry == 0 && req.PrevLogTerm == 0 &&
		len(req.Entries) == 0 && req.LeaderCommitIndex == 0
}
