package control

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cluster/modules"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// uploadStream is an UploadModule call as its server sees it.
type uploadStream = grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]

// UploadModule implements pb.ControlPlaneServiceServer. The bytes go to the
// leader, which has them on a majority of the voters' disks before it proposes
// the module.
func (h *handlers) UploadModule(stream uploadStream) error {
	ctx := stream.Context()
	leader, err := h.LeaderConn(ctx)
	switch {
	case err != nil:
		return err
	case leader != nil && forwarded(ctx):
		return errNoLeaderHere()
	case leader != nil:
		return apierror.OfWrite(ctx, relayUpload(stream, leader), "")
	}
	first, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("receive upload: %w", err)
	}
	header := first.GetHeader()
	if header == nil {
		return invalid("an upload begins with its header").Next("send UploadModuleHeader first, then chunks")
	}
	body := &sizedReader{want: header.GetSizeBytes(), in: modules.NewChunkReader(func() ([]byte, error) {
		m, err := stream.Recv()
		if err == nil && m.GetHeader() != nil {
			err = invalid("an upload has one header")
		}
		return m.GetChunk(), err
	})}
	m, err := h.Modules.Admit(body, header.GetDigest())
	if err != nil {
		return notRegistered(ctx, err, header)
	}
	m.Name = header.GetName()
	if err := h.Modules.Replicate(ctx, m); err != nil {
		return notRegistered(ctx, err, header)
	}
	return apierror.OfWrite(ctx, h.registerModule(stream, header, m), header.GetRequestId())
}

// notRegistered says of an upload that failed before its module was proposed
// that it had no effect: bytes that no record names are none.
func notRegistered(ctx context.Context, err error, header *pb.UploadModuleHeader) error {
	e := apierror.FromProto(apierror.From(err).Proto(ctx)).With(apierror.DetailOutcome, apierror.OutcomeFailed)
	return apierror.OfWrite(ctx, e, header.GetRequestId())
}

// registerModule proposes a module whose bytes are on a majority of the disks.
func (h *handlers) registerModule(stream uploadStream, header *pb.UploadModuleHeader, m *pb.Module) error {
	// The digest identifies the bytes, so that a repetition with other bytes is found out.
	asked := &pb.UploadModuleHeader{
		Name: header.GetName(), SizeBytes: header.GetSizeBytes(), Digest: m.GetDigest(), RequestId: header.GetRequestId(),
		Write: header.GetWrite(),
	}
	res, view, err := h.propose(stream.Context(), asked, &pb.Command{Payload: &pb.Command_PutModule{
		PutModule: &pb.PutModuleCommand{Module: m},
	}})
	if err != nil {
		return err
	}
	if known, ok := view.Module(m.GetDigest()); ok {
		m = known
	}
	return stream.SendAndClose(&pb.UploadModuleResponse{Module: m, Index: res.GetIndex()})
}

// relayUpload passes an upload on to the leader, in the caller's name.
func relayUpload(from uploadStream, leader grpc.ClientConnInterface) error {
	to, err := pb.NewControlPlaneServiceClient(leader).UploadModule(identity.ForwardCaller(from.Context()))
	if err != nil {
		return fmt.Errorf("pass upload on to the leader: %w", err)
	}
	for {
		m, err := from.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("receive upload: %w", err)
		}
		// io.EOF says that the leader has answered; the answer tells why.
		if err := to.Send(m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("pass upload on to the leader: %w", err)
		}
	}
	resp, err := to.CloseAndRecv()
	if err != nil {
		return err
	}
	return from.SendAndClose(resp)
}

// sizedReader is a stream that must have as many bytes as was announced.
type sizedReader struct {
	in         io.Reader
	want, have uint64
}

func (r *sizedReader) Read(p []byte) (int, error) {
	n, err := r.in.Read(p)
	r.have += uint64(n)
	if r.have > r.want || errors.Is(err, io.EOF) && r.have < r.want {
		return n, invalid("the upload has not the size that its header announced").
			With("announced_bytes", fmt.Sprint(r.want)).With("received_bytes", fmt.Sprint(r.have)).
			Next("upload the file again; it may have changed meanwhile")
	}
	return n, err
}

// FetchModule implements pb.ControlPlaneServiceServer.
func (h *handlers) FetchModule(req *pb.FetchModuleRequest, stream grpc.ServerStreamingServer[pb.FetchModuleResponse]) error {
	body, err := h.Modules.Open(stream.Context(), req.GetDigest())
	if err != nil {
		return err
	}
	err = modules.EachChunk(body, func(chunk []byte) error {
		return stream.Send(&pb.FetchModuleResponse{Chunk: chunk})
	})
	return errors.Join(err, body.Close())
}
