package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// chunkBytes is how much one message of an upload carries.
	chunkBytes = 256 << 10
	// MaxModuleBytes is the largest module that the API takes.
	MaxModuleBytes = 64 << 20
)

// UploadModule stores the size bytes that r gives as a module; name is for
// people. When r is an io.Seeker the upload is repeated after a failure that
// passes, from where r stood, and its digest is checked by the server.
func (c *Client) UploadModule(ctx context.Context, name string, r io.Reader, size int64) (*pb.Module, error) {
	if size < 1 || size > MaxModuleBytes {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s has %d bytes: a module has 1 to %d", name, size, MaxModuleBytes)
	}
	header := &pb.UploadModuleHeader{Name: name, SizeBytes: uint64(size), RequestId: uuid.NewString()}
	seeker, seekable := r.(io.Seeker)
	var start int64
	if seekable {
		var err error
		if start, err = seeker.Seek(0, io.SeekCurrent); err == nil {
			header.Digest, err = digest(io.LimitReader(r, size))
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
	}
	began := time.Now()
	var attempts apierror.Attempts
	for round := 0; ; round++ {
		if seekable {
			if _, err := seeker.Seek(start, io.SeekStart); err != nil {
				return nil, fmt.Errorf("read %s: %w", name, err)
			}
		}
		resp, err := c.upload(ctx, header, io.LimitReader(r, size))
		if err == nil {
			return resp.GetModule(), nil
		}
		// A module that is stored twice is the same module: an upload needs no session.
		attempts.Note(apierror.OfWrite(ctx, err, ""))
		if !seekable || !transient(err) || time.Since(began) > c.transport.timeout || !rest(ctx, round) {
			if _, own := errors.AsType[*apierror.Error](err); !own {
				return nil, err
			}
			return nil, conclude(ctx, attempts.Doubtful(), err, header.GetRequestId())
		}
	}
}

// UploadModuleFile stores the file at path as a module under the file's name.
func (c *Client) UploadModuleFile(ctx context.Context, path string) (*pb.Module, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("upload module: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("upload module: %w", err)
	}
	return c.UploadModule(ctx, filepath.Base(path), f, info.Size())
}

func (c *Client) upload(ctx context.Context, header *pb.UploadModuleHeader, r io.Reader) (*pb.UploadModuleResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream when the reader fails half-way
	stream, err := c.controlPlane.UploadModule(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Header{Header: header}})
	if err == nil {
		err = chunks(r, func(chunk []byte) error {
			return stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Chunk{Chunk: chunk}})
		})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("upload %s: %w", header.GetName(), err)
	}
	// io.EOF from Send means that the server has answered already.
	return stream.CloseAndRecv()
}

// FetchModule writes the bytes of the module to w and returns an error unless
// they are complete and have the digest that was asked for.
func (c *Client) FetchModule(ctx context.Context, digest string, w io.Writer) error {
	stream, err := c.controlPlane.FetchModule(ctx, &pb.FetchModuleRequest{Digest: digest})
	if err != nil {
		return err
	}
	hash := sha256.New()
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		_, _ = hash.Write(m.GetChunk())
		if _, err := w.Write(m.GetChunk()); err != nil {
			return fmt.Errorf("write module: %w", err)
		}
	}
	if got := digestText(hash.Sum(nil)); got != digest {
		return apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "the bytes that came are not the module's").With("digest", got)
	}
	return nil
}

// SnapshotSave writes a snapshot of the whole registry to w and returns its Raft index.
func (c *Client) SnapshotSave(ctx context.Context, w io.Writer) (index uint64, err error) {
	stream, err := c.cluster.SnapshotSave(ctx, &pb.SnapshotSaveRequest{})
	if err != nil {
		return 0, err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return index, nil
		}
		if err != nil {
			return 0, err
		}
		index = m.GetIndex()
		if _, err := w.Write(m.GetChunk()); err != nil {
			return 0, fmt.Errorf("write snapshot: %w", err)
		}
	}
}

// SnapshotRestore replaces the whole registry by the snapshot that r gives and
// returns the Raft index afterwards. It is never repeated.
func (c *Client) SnapshotRestore(ctx context.Context, r io.Reader) (index uint64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.cluster.SnapshotRestore(ctx)
	if err != nil {
		return 0, err
	}
	err = chunks(r, func(chunk []byte) error {
		return stream.Send(&pb.SnapshotRestoreRequest{Chunk: chunk})
	})
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("restore snapshot: %w", err)
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetIndex(), err
}

// chunks hands what r gives to send, piece by piece. A failure of r is told
// apart from the end of the stream, which send reports as io.EOF.
func chunks(r io.Reader, send func([]byte) error) error {
	buf := make([]byte, chunkBytes)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if sendErr := send(buf[:n]); sendErr != nil {
				return sendErr
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read: %w", err)
		}
	}
}

func digest(r io.Reader) (string, error) {
	hash := sha256.New()
	if _, err := io.Copy(hash, r); err != nil {
		return "", err
	}
	return digestText(hash.Sum(nil)), nil
}

func digestText(sum []byte) string { return "sha256:" + hex.EncodeToString(sum) }
