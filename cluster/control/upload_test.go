package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func at(nanos int64) *timestamppb.Timestamp { return &timestamppb.Timestamp{Nanos: int32(nanos)} }

// send uploads parts and returns the answer.
func send(ctx context.Context, p *testPeer, parts ...*pb.UploadModuleRequest) (*pb.UploadModuleResponse, error) {
	stream, err := p.client.UploadModule(ctx)
	if err != nil {
		return nil, err
	}
	for _, part := range parts {
		if err := stream.Send(part); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
	}
	return stream.CloseAndRecv()
}

func uploadHeader(h *pb.UploadModuleHeader) *pb.UploadModuleRequest {
	return &pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Header{Header: h}}
}

func uploadChunk(b []byte) *pb.UploadModuleRequest {
	return &pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Chunk{Chunk: b}}
}

func fetch(ctx context.Context, p *testPeer, digest string) ([]byte, error) {
	stream, err := p.client.FetchModule(ctx, &pb.FetchModuleRequest{Digest: digest})
	if err != nil {
		return nil, err
	}
	var out []byte
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, resp.GetChunk()...)
	}
}

func TestAnUploadedModuleIsRegisteredAndCanBeFetched(t *testing.T) {
	p := newPeer(t)
	wasm := append(modulestest.Reactor("wasmatrix:kv/v1 get"), modulestest.Section(0, append(modulestest.Name("x"), make([]byte, 600<<10)...))...)
	digest := modulestest.Digest(wasm)
	header := &pb.UploadModuleHeader{Name: "hello.wasm", SizeBytes: uint64(len(wasm)), Digest: digest, RequestId: "r1"}
	parts := []*pb.UploadModuleRequest{uploadHeader(header), uploadChunk(wasm[:10]), uploadChunk(nil), uploadChunk(wasm[10:])}
	resp, err := send(asAlice(t.Context()), p, parts...)
	if err != nil {
		t.Fatal(err)
	}
	m := resp.GetModule()
	if m.GetDigest() != digest || m.GetName() != "hello.wasm" || m.GetSizeBytes() != uint64(len(wasm)) ||
		m.GetKind() != pb.ModuleKind_MODULE_KIND_REACTOR || len(m.GetImports()) != 1 || m.GetCreatedIndex() != resp.GetIndex() {
		t.Errorf("module is %v at index %d", m, resp.GetIndex())
	}
	for _, caller := range []identity.Subject{alice, worker} {
		got, err := fetch(as(t.Context(), caller), p, digest)
		if err != nil || !bytes.Equal(got, wasm) {
			t.Errorf("fetched by %s: %d bytes, %v", caller, len(got), err)
		}
	}
	again, err := send(asAlice(t.Context()), p, parts...)
	if err != nil || again.GetIndex() != resp.GetIndex() {
		t.Errorf("the repetition gave %v, %v", again, err)
	}
	other := modulestest.Command()
	_, err = send(asAlice(t.Context()), p, uploadHeader(&pb.UploadModuleHeader{SizeBytes: uint64(len(other)), RequestId: "r1"}), uploadChunk(other))
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	_, err = fetch(asAlice(t.Context()), p, modulestest.Digest(nil))
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND)
}

func TestAnUploadThatIsNotWhatItSaysIsRefused(t *testing.T) {
	p := newPeer(t)
	wasm := modulestest.Command()
	size := uint64(len(wasm))
	for name, parts := range map[string][]*pb.UploadModuleRequest{
		"no header":      {uploadChunk(wasm)},
		"two headers":    {uploadHeader(&pb.UploadModuleHeader{SizeBytes: size}), uploadHeader(&pb.UploadModuleHeader{SizeBytes: size})},
		"too short":      {uploadHeader(&pb.UploadModuleHeader{SizeBytes: size + 1}), uploadChunk(wasm)},
		"too long":       {uploadHeader(&pb.UploadModuleHeader{SizeBytes: size - 1}), uploadChunk(wasm)},
		"another digest": {uploadHeader(&pb.UploadModuleHeader{SizeBytes: size, Digest: modulestest.Digest(nil)}), uploadChunk(wasm)},
		"no wasm":        {uploadHeader(&pb.UploadModuleHeader{SizeBytes: 20}), uploadChunk(make([]byte, 20))},
		"no guest":       {uploadHeader(&pb.UploadModuleHeader{SizeBytes: 8}), uploadChunk(wasm[:8])},
	} {
		_, err := send(asAlice(t.Context()), p, parts...)
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
			t.Errorf("%s: error is %v, want INVALID_REQUEST", name, err)
		}
	}
	if n := len(p.state.View().Modules(nil)); n != 0 {
		t.Errorf("%d modules were registered", n)
	}
}

func TestAnUploadToAFollowerGoesToTheLeaderInOneHop(t *testing.T) {
	leader := newPeer(t)
	follower := newFollower(t, leader)
	wasm := modulestest.Command()
	parts := []*pb.UploadModuleRequest{uploadHeader(&pb.UploadModuleHeader{SizeBytes: uint64(len(wasm))}), uploadChunk(wasm)}
	resp, err := send(asAlice(t.Context()), follower, parts...)
	if err != nil || resp.GetModule().GetDigest() != modulestest.Digest(wasm) {
		t.Fatalf("upload = %v, %v", resp, err)
	}
	if cmd := leader.proposed[len(leader.proposed)-1]; cmd.GetActor() != alice.String() {
		t.Errorf("the leader took the call for one of %s", cmd.GetActor())
	}
	_, err = send(asAlice(t.Context()), follower, uploadHeader(&pb.UploadModuleHeader{SizeBytes: 8}), uploadChunk(make([]byte, 8)))
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)

	// A peer that was taken for the leader does not pass the call on.
	third := newFollower(t, follower)
	follower.mu.Lock()
	follower.leader = third
	follower.mu.Unlock()
	_, err = send(asAlice(t.Context()), follower, parts...)
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_NO_LEADER)
	follower.loseLeader()
	_, err = send(asAlice(t.Context()), follower, parts...)
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_NO_LEADER)
}
