package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

// epoch is when everything in the fake happened.
func epoch() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

// fake is a control plane in memory, as far as the CLI can tell.
type fake struct {
	pb.UnimplementedControlPlaneServiceServer
	pb.UnimplementedClusterServiceServer

	mu        sync.Mutex
	changed   chan struct{}
	fail      map[string]error // by method
	requests  []proto.Message
	seen      func(method string)
	made      int
	instances []*pb.Instance
	grants    []*pb.CapabilityAssignment
	providers []*pb.Provider
	nodes     []*pb.Node
	modules   []*pb.Module
	events    []*pb.Event
	logs      []*pb.LogEntry
	kv        map[string]string
	status    *pb.StatusResponse
	snapshot  []byte
	// opens is what a provider that is to run turns into; byHand leaves what a stop
	// or an update does to the test.
	opens  pb.ProviderState
	byHand bool
	// published are the messages so far, sequence is the number that each gets.
	published []*pb.Message
	sequence  uint64
	// listening is called once a subscription stands.
	listening func()
	// becomes is what a started instance turns into.
	becomes func(*pb.Instance)
	// kind is that of modules uploaded.
	kind    pb.ModuleKind
	imports []string
}

// bench is a command line with a fake cluster behind it.
type bench struct {
	t    *testing.T
	fake *fake
	home string
	in   string
	tick time.Duration // by how much the clock moves with each look at it
	mu   sync.Mutex
	now  time.Time
}

func newBench(t *testing.T) *bench {
	t.Helper()
	ca, err := identity.NewCA("dev")
	if err != nil {
		t.Fatal(err)
	}
	peer := issue(t, ca, identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleServer})
	id, err := identity.FromBundle(peer)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{
		changed: make(chan struct{}), fail: map[string]error{}, kv: map[string]string{}, kind: pb.ModuleKind_MODULE_KIND_REACTOR,
		opens:   pb.ProviderState_PROVIDER_STATE_RUNNING,
		becomes: func(i *pb.Instance) { i.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING },
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(append(rpc.ServerOptions(rpc.ServerConfig{Identity: id}), grpc.ChainUnaryInterceptor(f.intercept))...)
	pb.RegisterControlPlaneServiceServer(srv, f)
	pb.RegisterClusterServiceServer(srv, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		srv.Stop()
		<-done
	})
	b := &bench{t: t, fake: f, home: t.TempDir(), now: epoch().Add(90 * time.Second)}
	user := issue(t, ca, identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin})
	tlsDir := filepath.Join(b.home, "tls")
	if err := user.Save(tlsDir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.home, ".config", "wasmatrix", "contexts", "default.yaml")
	if err := client.SaveContext(path, client.Context{Name: "dev", Cluster: "dev", Addresses: []string{l.Addr().String()}, TLSDir: tlsDir}); err != nil {
		t.Fatal(err)
	}
	return b
}

func issue(t *testing.T, ca *identity.CA, s identity.Subject) *identity.Bundle {
	t.Helper()
	b, err := ca.Issue(s, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs one command line.
func (b *bench) run(args ...string) (code int, stdout, stderr string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	return b.runIn(ctx, args...)
}

func (b *bench) runIn(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	b.t.Helper()
	var out, errOut locked
	env := Env{
		Stdin: strings.NewReader(b.in), Stdout: &out, Stderr: &errOut,
		Getenv: func(key string) string {
			if key == "HOME" {
				return b.home
			}
			return ""
		},
		Now: func() time.Time {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.now = b.now.Add(b.tick)
			return b.now
		},
	}
	cmd := New(env)
	cmd.SetArgs(args)
	code = Execute(ctx, cmd, env)
	return code, out.String(), errOut.String()
}

// want runs a command line that must succeed and returns its standard output.
func (b *bench) want(args ...string) string {
	b.t.Helper()
	code, stdout, stderr := b.run(args...)
	if code != 0 {
		b.t.Fatalf("%s: exit %d\n%s", strings.Join(args, " "), code, stderr)
	}
	return stdout
}

// locked is a buffer that may be written from several goroutines.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// file writes a file into the home directory and returns its path.
func (b *bench) file(name, content string) string {
	b.t.Helper()
	path := filepath.Join(b.home, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// wasm is an empty module.
const wasm = "\x00asm\x01\x00\x00\x00"

func (f *fake) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	f.mu.Lock()
	if m, ok := req.(proto.Message); ok {
		f.requests = append(f.requests, m)
	}
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	err, seen := f.fail[method], f.seen
	f.mu.Unlock()
	if seen != nil {
		seen(method)
	}
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// request returns the last request of its kind.
func request[M proto.Message](f *fake) (m M) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if found, ok := r.(M); ok {
			m = found
		}
	}
	return m
}

// change runs edit and wakes all who watch.
func (f *fake) change(kind pb.EventKind, instance string, edit func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	edit()
	n := uint64(len(f.events) + 1)
	f.events = append(f.events, &pb.Event{Sequence: n, Index: n, Time: timestamppb.New(epoch()), Kind: kind, InstanceId: instance})
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) ListNodes(context.Context, *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &pb.ListNodesResponse{Nodes: f.nodes, InstanceCounts: map[string]uint32{"n1": 2}}, nil
}

func (f *fake) DrainNode(_ context.Context, req *pb.DrainNodeRequest) (*pb.DrainNodeResponse, error) {
	go f.change(pb.EventKind_EVENT_KIND_NODE_DRAINED, "", func() {
		f.nodes = []*pb.Node{{Id: req.GetNodeId(), State: pb.NodeState_NODE_STATE_READY, Draining: true}}
	})
	return &pb.DrainNodeResponse{Node: &pb.Node{Id: req.GetNodeId()}}, nil
}

func (f *fake) UndrainNode(_ context.Context, req *pb.UndrainNodeRequest) (*pb.UndrainNodeResponse, error) {
	return &pb.UndrainNodeResponse{Node: &pb.Node{Id: req.GetNodeId()}}, nil
}

func (f *fake) WatchEvents(req *pb.WatchEventsRequest, stream grpc.ServerStreamingServer[pb.WatchEventsResponse]) error {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	f.mu.Unlock()
	for next := 0; ; {
		f.mu.Lock()
		events, changed := f.events[next:], f.changed
		next = len(f.events)
		f.mu.Unlock()
		for _, e := range events {
			if e.GetSequence() <= req.GetAfterSequence() {
				continue
			}
			if err := stream.Send(&pb.WatchEventsResponse{Event: e, Gap: e.GetSequence() == 100}); err != nil {
				return err
			}
		}
		if !req.GetFollow() {
			return nil
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (f *fake) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status, nil
}

func (f *fake) TransferLeadership(_ context.Context, req *pb.TransferLeadershipRequest) (*pb.TransferLeadershipResponse, error) {
	return &pb.TransferLeadershipResponse{LeaderId: req.GetPeerId(), PreviousLeaderId: "n1"}, nil
}

func (f *fake) Remove(context.Context, *pb.RemoveRequest) (*pb.RemoveResponse, error) {
	return &pb.RemoveResponse{}, nil
}

func (f *fake) Promote(context.Context, *pb.PromoteRequest) (*pb.PromoteResponse, error) {
	return &pb.PromoteResponse{}, nil
}

func (f *fake) SnapshotSave(_ *pb.SnapshotSaveRequest, stream grpc.ServerStreamingServer[pb.SnapshotSaveResponse]) error {
	half := len(f.snapshot) / 2
	for _, chunk := range [][]byte{f.snapshot[:half], f.snapshot[half:]} {
		if err := stream.Send(&pb.SnapshotSaveResponse{Chunk: chunk, Index: 42}); err != nil {
			return err
		}
		if err := f.fail["SnapshotSave"]; err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) SnapshotRestore(stream grpc.ClientStreamingServer[pb.SnapshotRestoreRequest, pb.SnapshotRestoreResponse]) error {
	var got []byte
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			f.snapshot = got
			return stream.SendAndClose(&pb.SnapshotRestoreResponse{Index: 43})
		}
		if err != nil {
			return err
		}
		got = append(got, m.GetChunk()...)
	}
}
