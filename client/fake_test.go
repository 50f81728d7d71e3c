package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

// world is a cluster's authority and a user.
type world struct {
	ca   *identity.CA
	user *identity.Identity
}

func newWorld(t testing.TB) *world {
	t.Helper()
	ca, err := identity.NewCA("dev")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{ca: ca}
	w.user = w.issue(t, identity.User, "ann", identity.RoleAdmin)
	return w
}

func (w *world) issue(t testing.TB, kind identity.Kind, name string, role identity.Role) *identity.Identity {
	t.Helper()
	b, err := w.ca.Issue(identity.Subject{Kind: kind, Name: name, Role: role}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (w *world) client(t testing.TB, cfg client.Config) *client.Client {
	t.Helper()
	if cfg.Identity == nil {
		cfg.Identity = w.user
	}
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close client: %v", err)
		}
	})
	return c
}

// fakePeer is a peer whose answers a test chooses and whose calls it reads.
type fakePeer struct {
	pb.UnimplementedControlPlaneServiceServer
	pb.UnimplementedClusterServiceServer
	address string
	server  *grpc.Server

	mu     sync.Mutex
	answer func(call string, n int) error // n counts the calls of that kind, from 1
	calls  map[string]int
	ids    []string // request ids and correlation ids, in order
	status *pb.StatusResponse
	events []*pb.Event
	cut    int // WatchEvents breaks after this many events; 0 never
	logs   func(req *pb.FollowLogsRequest, send func(*pb.LogEntry) error) error
	// messages are what SubscribeMessages sends before it breaks off.
	messages []*pb.Message
	upload   []byte
	// sessions makes the peer give sessions; places are those of the writes that came.
	sessions bool
	places   []*pb.WriteOptions
}

func (p *fakePeer) OpenSession(ctx context.Context, req *pb.OpenSessionRequest) (*pb.OpenSessionResponse, error) {
	p.mu.Lock()
	on := p.sessions
	p.mu.Unlock()
	if !on {
		return p.UnimplementedControlPlaneServiceServer.OpenSession(ctx, req)
	}
	if err := p.handle(ctx, "open", req.GetRequestId()); err != nil {
		return nil, err
	}
	return &pb.OpenSessionResponse{SessionId: fmt.Sprintf("s%d", p.count("open")), IdleTimeout: durationpb.New(time.Hour)}, nil
}

// place notes where in a session a write stands.
func (p *fakePeer) place(w *pb.WriteOptions) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.places = append(p.places, w)
}

func (p *fakePeer) StartInstance(_ context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	return &pb.StartInstanceResponse{Instances: []*pb.Instance{{Id: req.GetSpec().GetName() + "-k3f9x", Name: req.GetSpec().GetName()}}}, nil
}

// peer starts a peer on loopback that the test stops.
func (w *world) peer(t testing.TB, name string) *fakePeer {
	t.Helper()
	return w.serve(t, w.issue(t, identity.Node, name, identity.RoleServer))
}

func (w *world) serve(t testing.TB, id *identity.Identity) *fakePeer {
	t.Helper()
	p, stop, err := startPeer(id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return p
}

func startPeer(id *identity.Identity) (*fakePeer, func(), error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	p := &fakePeer{
		address: l.Addr().String(), calls: map[string]int{},
		server: grpc.NewServer(rpc.ServerOptions(rpc.ServerConfig{Identity: id})...),
	}
	pb.RegisterControlPlaneServiceServer(p.server, p)
	pb.RegisterClusterServiceServer(p.server, p)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = p.server.Serve(l)
	}()
	return p, func() {
		p.server.Stop()
		<-done
	}, nil
}

// answers sets what the peer does with each call.
func (p *fakePeer) answers(f func(call string, n int) error) *fakePeer {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = f
	return p
}

func (p *fakePeer) count(call string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[call]
}

func (p *fakePeer) seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.ids...)
}

func (p *fakePeer) handle(ctx context.Context, call, requestID string) error {
	p.mu.Lock()
	p.calls[call]++
	n, answer := p.calls[call], p.answer
	p.ids = append(p.ids, requestID)
	if id := correlation.ID(ctx); id == "" || len(metadata.ValueFromIncomingContext(ctx, correlation.Header)) != 1 {
		p.mu.Unlock()
		return errors.New("no correlation id came")
	}
	p.mu.Unlock()
	if answer == nil {
		return nil
	}
	return answer(call, n)
}

func (p *fakePeer) StopInstance(ctx context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	p.place(req.GetWrite())
	if err := p.handle(ctx, "stop", req.GetRequestId()); err != nil {
		return nil, err
	}
	return &pb.StopInstanceResponse{Index: 7}, nil
}

func (p *fakePeer) ListNodes(ctx context.Context, _ *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	if err := p.handle(ctx, "nodes", correlation.ID(ctx)); err != nil {
		return nil, err
	}
	return &pb.ListNodesResponse{Index: 7}, nil
}

func (p *fakePeer) Invoke(ctx context.Context, _ *pb.InvokeRequest) (*pb.InvokeResponse, error) {
	return &pb.InvokeResponse{}, p.handle(ctx, "invoke", "")
}

func (p *fakePeer) CallProvider(ctx context.Context, req *pb.CallProviderRequest) (*pb.CallProviderResponse, error) {
	return &pb.CallProviderResponse{}, p.handle(ctx, req.GetOperation(), "")
}

func (p *fakePeer) Remove(ctx context.Context, _ *pb.RemoveRequest) (*pb.RemoveResponse, error) {
	return &pb.RemoveResponse{}, p.handle(ctx, "remove", "")
}

func (p *fakePeer) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	if err := p.handle(ctx, "status", ""); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == nil {
		return &pb.StatusResponse{}, nil
	}
	return p.status, nil
}

func noLeader() error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "no leader: 1 of 3 voting peers reachable").With("quorum", "2").Next("start n1 or n3")
}

func unreachable() error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "the leader went away")
}

func (p *fakePeer) WatchEvents(req *pb.WatchEventsRequest, stream grpc.ServerStreamingServer[pb.WatchEventsResponse]) error {
	if err := p.handle(stream.Context(), "watch", ""); err != nil {
		return err
	}
	p.mu.Lock()
	events, cut := p.events, p.cut
	p.mu.Unlock()
	sent := 0
	for _, e := range events {
		// One event too early on purpose: a client must not hand it on twice.
		if e.GetSequence() < req.GetAfterSequence() {
			continue
		}
		if err := stream.Send(&pb.WatchEventsResponse{Event: e}); err != nil {
			return err
		}
		if sent++; cut > 0 && sent == cut {
			return unreachable()
		}
	}
	if req.GetFollow() {
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	return nil
}

func (p *fakePeer) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	if err := p.handle(stream.Context(), "logs", ""); err != nil {
		return err
	}
	return p.logs(req, func(e *pb.LogEntry) error { return stream.Send(&pb.FollowLogsResponse{Entry: e}) })
}

func (p *fakePeer) SubscribeMessages(_ *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
	if err := p.handle(stream.Context(), "subscribe", ""); err != nil {
		return err
	}
	if err := stream.Send(&pb.SubscribeMessagesResponse{}); err != nil {
		return err
	}
	for _, m := range p.messages {
		if err := stream.Send(&pb.SubscribeMessagesResponse{Message: m}); err != nil {
			return err
		}
	}
	return unreachable()
}

func (p *fakePeer) UploadModule(stream grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := p.handle(stream.Context(), "upload", first.GetHeader().GetRequestId()); err != nil {
		return err
	}
	var got []byte
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		got = append(got, m.GetChunk()...)
	}
	p.mu.Lock()
	p.upload = got
	p.mu.Unlock()
	return stream.SendAndClose(&pb.UploadModuleResponse{Module: &pb.Module{
		Name: first.GetHeader().GetName(), Digest: first.GetHeader().GetDigest(), SizeBytes: uint64(len(got)),
	}})
}

func (p *fakePeer) FetchModule(_ *pb.FetchModuleRequest, stream grpc.ServerStreamingServer[pb.FetchModuleResponse]) error {
	for _, b := range p.upload {
		if err := stream.Send(&pb.FetchModuleResponse{Chunk: []byte{b}}); err != nil {
			return err
		}
	}
	return nil
}

func (p *fakePeer) SnapshotSave(_ *pb.SnapshotSaveRequest, stream grpc.ServerStreamingServer[pb.SnapshotSaveResponse]) error {
	for _, b := range p.upload {
		if err := stream.Send(&pb.SnapshotSaveResponse{Chunk: []byte{b}, Index: 42}); err != nil {
			return err
		}
	}
	return nil
}

func (p *fakePeer) SnapshotRestore(stream grpc.ClientStreamingServer[pb.SnapshotRestoreRequest, pb.SnapshotRestoreResponse]) error {
	if err := p.handle(stream.Context(), "restore", ""); err != nil {
		return err
	}
	var got []byte
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			p.mu.Lock()
			p.upload = got
			p.mu.Unlock()
			return stream.SendAndClose(&pb.SnapshotRestoreResponse{Index: 43})
		}
		if err != nil {
			return err
		}
		got = append(got, m.GetChunk()...)
	}
}
