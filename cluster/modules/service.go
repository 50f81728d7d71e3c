package modules

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// chunkSize is the number of bytes of one message of a transfer.
const chunkSize = 256 << 10

// Service is PeerService over one peer's Store: what peers ask of each other.
// Only a peer's certificate opens it.
type Service struct {
	pb.UnimplementedPeerServiceServer
	store *Store
	log   *slog.Logger
}

// NewService makes the service. Register it with Service.Register.
func NewService(store *Store, log *slog.Logger) *Service {
	return &Service{store: store, log: log}
}

// Register adds PeerService to a server. The server's interceptors must have
// put the caller into the context (package identity).
func (s *Service) Register(to grpc.ServiceRegistrar) { pb.RegisterPeerServiceServer(to, s) }

// StoreModule implements pb.PeerServiceServer.
func (s *Service) StoreModule(stream grpc.ClientStreamingServer[pb.StoreModuleRequest, pb.StoreModuleResponse]) error {
	if err := onlyPeers(stream.Context()); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("receive module: %w", err)
	}
	digest := first.GetModule().GetDigest()
	if _, err := hexOf(digest); err != nil {
		return APIError(err)
	}
	// A sound copy needs no second one; answering now ends the sender's stream.
	if held, err := s.store.Open(digest); err == nil {
		if err := held.Close(); err != nil {
			return fmt.Errorf("close module: %w", err)
		}
		return stream.SendAndClose(&pb.StoreModuleResponse{})
	}
	body := NewChunkReader(func() ([]byte, error) {
		m, err := stream.Recv()
		return m.GetChunk(), err
	})
	if _, _, err := s.store.Put(body, digest); err != nil {
		return APIError(err)
	}
	s.log.InfoContext(stream.Context(), "module stored", "module", digest)
	return stream.SendAndClose(&pb.StoreModuleResponse{})
}

// ReadModule implements pb.PeerServiceServer.
func (s *Service) ReadModule(req *pb.ReadModuleRequest, stream grpc.ServerStreamingServer[pb.ReadModuleResponse]) error {
	if err := onlyPeers(stream.Context()); err != nil {
		return err
	}
	body, err := s.store.Open(req.GetDigest())
	if err != nil {
		return APIError(err)
	}
	err = EachChunk(body, func(chunk []byte) error {
		return stream.Send(&pb.ReadModuleResponse{Chunk: chunk})
	})
	return errors.Join(err, body.Close())
}

func onlyPeers(ctx context.Context) error {
	if caller, ok := identity.Caller(ctx); !ok || !caller.IsPeer() {
		return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "only control-plane peers may do this").
			Next("wasmatrix module push FILE.wasm")
	}
	return nil
}

// EachChunk reads r to its end and hands it to send in pieces that fit into a
// message. Each piece belongs to send.
func EachChunk(r io.Reader, send func([]byte) error) error {
	for {
		buf := make([]byte, chunkSize)
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read module: %w", err)
		}
	}
}

// NewChunkReader makes a reader of the pieces that recv returns until its error,
// which is io.EOF at the regular end of a stream.
func NewChunkReader(recv func() ([]byte, error)) io.Reader { return &chunkReader{recv: recv} }

type chunkReader struct {
	recv func() ([]byte, error)
	rest []byte
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		chunk, err := r.recv()
		if err != nil {
			return 0, err
		}
		r.rest = chunk
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
