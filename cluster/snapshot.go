package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// snapshotChunk is the size of the pieces of a snapshot on the wire.
	snapshotChunk = 256 << 10
	// maxSnapshot bounds what SnapshotRestore takes.
	maxSnapshot = 4 << 30
)

// SnapshotSave streams the registry as the leader sees it. A follower relays
// the leader's stream.
func (s *service) SnapshotSave(req *pb.SnapshotSaveRequest, stream grpc.ServerStreamingServer[pb.SnapshotSaveResponse]) error {
	ctx := stream.Context()
	if !isAdmin(ctx) {
		return denied("a snapshot of the registry")
	}
	conn, err := s.peer.streamToLeader(ctx)
	if err != nil {
		return err
	}
	if conn != nil {
		return relaySave(s.peer.hop(ctx), conn, req, stream)
	}
	view, err := s.peer.View(ctx, nil)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(&chunkWriter{stream: stream, index: view.Index()}, snapshotChunk)
	if err := s.peer.state.WriteSnapshot(view, out); err != nil {
		return fmt.Errorf("write the snapshot: %w", err)
	}
	return out.Flush()
}

type chunkWriter struct {
	stream grpc.ServerStreamingServer[pb.SnapshotSaveResponse]
	index  uint64
}

// Write sends one message, or several for a large piece.
func (w *chunkWriter) Write(data []byte) (int, error) {
	sent := 0
	for sent < len(data) {
		end := min(sent+snapshotChunk, len(data))
		if err := w.stream.Send(&pb.SnapshotSaveResponse{Chunk: data[sent:end], Index: w.index}); err != nil {
			return sent, err
		}
		sent = end
	}
	return sent, nil
}

func relaySave(ctx context.Context, conn grpc.ClientConnInterface, req *pb.SnapshotSaveRequest, stream grpc.ServerStreamingServer[pb.SnapshotSaveResponse]) error {
	from, err := pb.NewClusterServiceClient(conn).SnapshotSave(ctx, req)
	if err != nil {
		return err
	}
	for {
		piece, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(piece); err != nil {
			return err
		}
	}
}

// SnapshotRestore replaces the registry, at the leader and then everywhere, by
// a snapshot that SnapshotSave gave. A follower relays the stream.
func (s *service) SnapshotRestore(stream grpc.ClientStreamingServer[pb.SnapshotRestoreRequest, pb.SnapshotRestoreResponse]) error {
	ctx := stream.Context()
	if !isAdmin(ctx) {
		return denied("the registry")
	}
	conn, err := s.peer.streamToLeader(ctx)
	if err != nil {
		return err
	}
	if conn != nil {
		return relayRestore(s.peer.hop(ctx), conn, stream)
	}
	file, size, err := spool(stream, s.peer.cfg.DataDir)
	if err != nil {
		return err
	}
	defer func() {
		if err := errors.Join(file.Close(), os.Remove(file.Name())); err != nil {
			s.peer.log.Warn("remove the received snapshot", "error", err)
		}
	}()
	index, err := s.peer.restore(ctx, file, size)
	if err != nil {
		return err
	}
	return stream.SendAndClose(&pb.SnapshotRestoreResponse{Index: index})
}

func relayRestore(ctx context.Context, conn grpc.ClientConnInterface, stream grpc.ClientStreamingServer[pb.SnapshotRestoreRequest, pb.SnapshotRestoreResponse]) error {
	to, err := pb.NewClusterServiceClient(conn).SnapshotRestore(ctx)
	if err != nil {
		return err
	}
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		// When sending fails the reason comes with the answer.
		if err := to.Send(piece); err != nil {
			break
		}
	}
	resp, err := to.CloseAndRecv()
	if err != nil {
		return err
	}
	return stream.SendAndClose(resp)
}

// spool writes what is received to a file: Raft must know the size first.
func spool(stream grpc.ClientStreamingServer[pb.SnapshotRestoreRequest, pb.SnapshotRestoreResponse], dir string) (*os.File, int64, error) {
	file, err := os.CreateTemp(dir, "restore-*.snapshot")
	if err != nil {
		return nil, 0, fmt.Errorf("make a file for the snapshot: %w", err)
	}
	give := func(err error) (*os.File, int64, error) {
		if closeErr := errors.Join(file.Close(), os.Remove(file.Name())); closeErr != nil {
			err = errors.Join(err, closeErr)
		}
		return nil, 0, err
	}
	var size int64
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return file, size, nil
		}
		if err != nil {
			return give(err)
		}
		if size += int64(len(piece.GetChunk())); size > maxSnapshot {
			return give(apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "the snapshot is larger than %d bytes", int64(maxSnapshot)))
		}
		if _, err := file.Write(piece.GetChunk()); err != nil {
			if isFull(err) {
				err = apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "there is no room for the snapshot in %s", dir).
					With(DetailOutcome, OutcomeFailed).Next("free space on the leader's machine, and restore again")
				return give(err)
			}
			return give(fmt.Errorf("write the received snapshot: %w", err))
		}
	}
}

// restore makes a checked snapshot the state of the cluster and returns the
// index from which it is. Raft would panic on a bad one, so it is read first.
func (p *Peer) restore(ctx context.Context, file *os.File, size int64) (uint64, error) {
	trial := fsm.New()
	if err := rewound(file, trial.Restore); err != nil {
		return 0, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "that is not a snapshot of wasmatrix, or it is damaged: %s", err)
	}
	if err := p.linearize(ctx); err != nil {
		return 0, err
	}
	r, leave := p.enter()
	defer leave()
	if r == nil {
		return 0, p.noLeader()
	}
	size, err := p.naturalise(trial, file, size)
	if err != nil {
		return 0, err
	}
	meta := &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, Index: trial.View().Index(), Size: size}
	p.log.Warn("restoring a snapshot", "index", meta.Index, "bytes", size)
	err = rewound(file, func(from io.Reader) error { return r.Restore(meta, from, remaining(ctx, enqueueLimit)) })
	if err != nil {
		return 0, p.raftError(err)
	}
	// The snapshot brought the peers of its own time.
	p.changed.notify()
	return r.LastIndex(), nil
}

// naturalise makes a snapshot of another cluster one of this cluster: the peers
// know each other by its identity. It returns the snapshot's size.
func (p *Peer) naturalise(trial *fsm.State, file *os.File, size int64) (int64, error) {
	mine := p.state.View().ClusterID()
	if trial.View().ClusterID() == mine {
		return size, nil
	}
	if err := file.Truncate(0); err != nil {
		return 0, fmt.Errorf("empty the received snapshot: %w", err)
	}
	err := rewound(file, func(io.Reader) error { return trial.WriteSnapshot(trial.View().WithClusterID(mine), file) })
	if err != nil {
		return 0, err
	}
	return file.Seek(0, io.SeekCurrent)
}

func rewound(file *os.File, read func(io.Reader) error) error {
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("rewind: %w", err)
	}
	return read(file)
}

// streamToLeader is LeaderConn for streams, which the interceptor does not
// forward: it waits for a leader, and refuses a stream that was relayed already.
func (p *Peer) streamToLeader(ctx context.Context) (grpc.ClientConnInterface, error) {
	wait, cancel := context.WithTimeout(ctx, p.cfg.Timers.LeaderWait)
	defer cancel()
	conn, err := p.waitLeaderConn(wait)
	if by := metadata.ValueFromIncomingContext(ctx, hopKey); conn != nil && len(by) > 0 {
		return nil, p.noLeader().With(detailHop, by[0])
	}
	return conn, err
}
