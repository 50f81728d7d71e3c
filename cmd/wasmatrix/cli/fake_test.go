package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
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
	// opens is what a provider that is to run turns into.
	opens pb.ProviderState
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

func (f *fake) add(id string, state pb.InstanceState) *pb.Instance {
	name, _, _ := strings.Cut(id, "-")
	i := &pb.Instance{
		Id: id, Name: name, Spec: &pb.WorkloadSpec{Name: name, Module: "sha256:" + strings.Repeat("ab", 32), Replicas: 1}, DesiredRunning: true,
		Placement: &pb.Placement{NodeId: "n1", Generation: 1}, CreatedAt: timestamppb.New(epoch()),
		Status: &pb.InstanceStatus{State: state, Generation: 1, Attempt: 1, StartedAt: timestamppb.New(epoch())},
	}
	f.instances = append(f.instances, i)
	return i
}

func (f *fake) find(target string) []*pb.Instance {
	var out []*pb.Instance
	for _, i := range f.instances {
		if i.GetId() == target || i.GetName() == target {
			out = append(out, i)
		}
	}
	return out
}

func copies(in []*pb.Instance) []*pb.Instance {
	out := make([]*pb.Instance, len(in))
	for n, i := range in {
		out[n], _ = proto.Clone(i).(*pb.Instance)
	}
	return out
}

func notFound(target string) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance has the id or name %q", target).Next("wasmatrix instance list")
}

func (f *fake) StartInstance(_ context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	f.mu.Lock()
	var made []*pb.Instance
	for range max(1, int(req.GetSpec().GetReplicas())) {
		f.made++
		i := f.add(fmt.Sprintf("%s-%05d", req.GetSpec().GetName(), f.made), pb.InstanceState_INSTANCE_STATE_PENDING)
		i.Name = req.GetSpec().GetName()
		i.Spec, _ = proto.Clone(req.GetSpec()).(*pb.WorkloadSpec)
		i.Spec.Replicas = 1
		made = append(made, i)
	}
	answer := copies(made)
	becomes := f.becomes
	f.mu.Unlock()
	go func() {
		for _, i := range made {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() { becomes(i) })
		}
	}()
	return &pb.StartInstanceResponse{Instances: answer, Index: 7}, nil
}

func (f *fake) StopInstance(_ context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	f.mu.Lock()
	found := f.find(req.GetTarget())
	answer := copies(found)
	f.mu.Unlock()
	if len(found) == 0 {
		return nil, notFound(req.GetTarget())
	}
	go func() {
		for _, i := range found {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STOPPED, i.GetId(), func() {
				i.DesiredRunning, i.Status.State = false, pb.InstanceState_INSTANCE_STATE_STOPPED
			})
		}
	}()
	return &pb.StopInstanceResponse{Instances: answer}, nil
}

func (f *fake) RestartInstance(_ context.Context, req *pb.RestartInstanceRequest) (*pb.RestartInstanceResponse, error) {
	f.mu.Lock()
	found := f.find(req.GetTarget())
	answer := copies(found)
	f.mu.Unlock()
	go func() {
		for _, i := range found {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() {
				i.DesiredRunning = true
				i.Status.Attempt++
				f.becomes(i)
			})
		}
	}()
	return &pb.RestartInstanceResponse{Instances: answer}, nil
}

func (f *fake) RemoveInstance(_ context.Context, req *pb.RemoveInstanceRequest) (*pb.RemoveInstanceResponse, error) {
	resp := &pb.RemoveInstanceResponse{InstanceIds: idsOf(f.find(req.GetTarget()))}
	f.change(pb.EventKind_EVENT_KIND_INSTANCE_REMOVED, req.GetTarget(), func() {
		f.instances = slices.DeleteFunc(f.instances, func(i *pb.Instance) bool { return slices.Contains(resp.GetInstanceIds(), i.GetId()) })
	})
	return resp, nil
}

func (f *fake) QueryInstance(_ context.Context, req *pb.QueryInstanceRequest) (*pb.QueryInstanceResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	found := f.find(req.GetTarget())
	if len(found) == 0 {
		return nil, notFound(req.GetTarget())
	}
	resp := &pb.QueryInstanceResponse{Instance: copies(found)[0]}
	for _, g := range f.grants {
		if g.GetInstanceId() == found[0].GetId() {
			resp.Assignments = append(resp.Assignments, g)
		}
	}
	return resp, nil
}

// ListInstances answers in pages of two, so that everyone has to go on.
func (f *fake) ListInstances(_ context.Context, req *pb.ListInstancesRequest) (*pb.ListInstancesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*pb.Instance
	for _, i := range f.instances {
		if (req.GetName() == "" || i.GetName() == req.GetName()) &&
			(req.GetNodeId() == "" || i.GetPlacement().GetNodeId() == req.GetNodeId()) && i.GetId() > req.GetPageToken() {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b *pb.Instance) int { return strings.Compare(a.GetId(), b.GetId()) })
	resp := &pb.ListInstancesResponse{Instances: copies(all[:min(2, len(all))]), Index: 9}
	if len(all) > 2 {
		resp.NextPageToken = all[1].GetId()
	}
	return resp, nil
}

func (f *fake) Explain(_ context.Context, req *pb.ExplainRequest) (*pb.ExplainResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &pb.ExplainResponse{Instance: copies(f.find(req.GetTarget()))[0], Nodes: []*pb.NodeVerdict{
		{NodeId: "n1", Reasons: []string{"no room: 64 MiB of 64 MiB taken"}}, {NodeId: "n2", Eligible: true, Chosen: true, Reasons: []string{"load 0 %"}},
	}}, nil
}

func (f *fake) AssignCapability(_ context.Context, req *pb.AssignCapabilityRequest) (*pb.AssignCapabilityResponse, error) {
	g := req.GetGrant()
	return &pb.AssignCapabilityResponse{Assignments: []*pb.CapabilityAssignment{
		{InstanceId: req.GetTarget(), ProviderId: g.GetProvider(), Permissions: g.GetPermissions(), Bucket: g.GetBucket()},
	}}, nil
}

func (f *fake) RevokeCapability(context.Context, *pb.RevokeCapabilityRequest) (*pb.RevokeCapabilityResponse, error) {
	return &pb.RevokeCapabilityResponse{}, nil
}

func (f *fake) UploadModule(stream grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	for {
		_, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	h := first.GetHeader()
	return stream.SendAndClose(&pb.UploadModuleResponse{Module: &pb.Module{
		Digest: h.GetDigest(), SizeBytes: h.GetSizeBytes(), Name: h.GetName(), Kind: f.kind, Imports: f.imports, CreatedAt: timestamppb.New(epoch()),
	}})
}

func (f *fake) ListModules(context.Context, *pb.ListModulesRequest) (*pb.ListModulesResponse, error) {
	return &pb.ListModulesResponse{Modules: f.modules}, nil
}

func (f *fake) provider(id string) *pb.Provider {
	for _, p := range f.providers {
		if p.GetId() == id {
			return p
		}
	}
	return nil
}

func (f *fake) setProvider(id string, running bool, state pb.ProviderState) (*pb.Provider, error) {
	f.mu.Lock()
	p := f.provider(id)
	f.mu.Unlock()
	if p == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", id)
	}
	answer, _ := proto.Clone(p).(*pb.Provider)
	go f.change(pb.EventKind_EVENT_KIND_PROVIDER_STARTED, "", func() { p.DesiredRunning, p.Status.State = running, state })
	return answer, nil
}

func (f *fake) RegisterProvider(_ context.Context, req *pb.RegisterProviderRequest) (*pb.RegisterProviderResponse, error) {
	f.mu.Lock()
	f.providers = append(f.providers, newProvider(req.GetSpec().GetId(), req.GetSpec().GetType(), pb.ProviderState_PROVIDER_STATE_PENDING))
	f.mu.Unlock()
	p, err := f.setProvider(req.GetSpec().GetId(), true, f.opens)
	return &pb.RegisterProviderResponse{Provider: p}, err
}

func (f *fake) UpdateProvider(_ context.Context, req *pb.UpdateProviderRequest) (*pb.UpdateProviderResponse, error) {
	p, err := f.setProvider(req.GetSpec().GetId(), true, f.opens)
	return &pb.UpdateProviderResponse{Provider: p}, err
}

func (f *fake) StartProvider(_ context.Context, req *pb.StartProviderRequest) (*pb.StartProviderResponse, error) {
	p, err := f.setProvider(req.GetProviderId(), true, f.opens)
	return &pb.StartProviderResponse{Provider: p}, err
}

func (f *fake) StopProvider(_ context.Context, req *pb.StopProviderRequest) (*pb.StopProviderResponse, error) {
	p, err := f.setProvider(req.GetProviderId(), false, pb.ProviderState_PROVIDER_STATE_STOPPED)
	return &pb.StopProviderResponse{Provider: p}, err
}

func (f *fake) DeregisterProvider(context.Context, *pb.DeregisterProviderRequest) (*pb.DeregisterProviderResponse, error) {
	return &pb.DeregisterProviderResponse{}, nil
}

func (f *fake) GetProvider(_ context.Context, req *pb.GetProviderRequest) (*pb.GetProviderResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.provider(req.GetProviderId())
	if p == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", req.GetProviderId())
	}
	resp := &pb.GetProviderResponse{Assignments: f.grants}
	resp.Provider, _ = proto.Clone(p).(*pb.Provider)
	return resp, nil
}

func (f *fake) ListProviders(context.Context, *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	return &pb.ListProvidersResponse{Providers: f.providers}, nil
}

func newProvider(id, kind string, state pb.ProviderState) *pb.Provider {
	return &pb.Provider{
		Id: id, Spec: &pb.ProviderSpec{Id: id, Type: kind, Config: map[string]string{"a": "1"}}, DesiredRunning: true,
		Placement: &pb.Placement{NodeId: "n2"}, CreatedAt: timestamppb.New(epoch()), Status: &pb.ProviderStatus{State: state},
	}
}

// CallProvider serves kv in the way of a real provider, without pages.
func (f *fake) CallProvider(_ context.Context, req *pb.CallProviderRequest) (*pb.CallProviderResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var answer proto.Message
	switch req.GetOperation() {
	case "get":
		in := &pb.KvGetRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		value, ok := f.kv[req.GetBucket()+"/"+string(in.GetKey())]
		answer = &pb.KvGetResponse{Found: ok, Value: []byte(value), Version: 3}
	case "set":
		in := &pb.KvSetRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		f.kv[req.GetBucket()+"/"+string(in.GetKey())] = string(in.GetValue())
		answer = &pb.KvSetResponse{Version: in.GetTtlMs() + 1}
	case "cas":
		answer = &pb.KvCasResponse{Swapped: false, Version: 3}
	case "delete":
		in := &pb.KvDeleteRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		_, ok := f.kv[req.GetBucket()+"/"+string(in.GetKey())]
		delete(f.kv, req.GetBucket()+"/"+string(in.GetKey()))
		answer = &pb.KvDeleteResponse{Existed: ok}
	case "list":
		in := &pb.KvListRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		answer = f.kvPage(req.GetBucket(), in)
	}
	payload, err := proto.Marshal(answer)
	return &pb.CallProviderResponse{Payload: payload}, err
}

// kvPage answers with one key a page.
func (f *fake) kvPage(bucket string, in *pb.KvListRequest) *pb.KvListResponse {
	var keys []string
	for full := range f.kv {
		key, ok := strings.CutPrefix(full, bucket+"/")
		if ok && strings.HasPrefix(key, string(in.GetPrefix())) && key > string(in.GetCursor()) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	resp := &pb.KvListResponse{}
	if len(keys) > 0 {
		resp.Entries = []*pb.KvEntry{{Key: []byte(keys[0]), Value: []byte(f.kv[bucket+"/"+keys[0]]), Version: 3}}
	}
	if len(keys) > 1 {
		resp.NextCursor = []byte(keys[0])
	}
	return resp
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

func (f *fake) Invoke(_ context.Context, req *pb.InvokeRequest) (*pb.InvokeResponse, error) {
	return &pb.InvokeResponse{Payload: append([]byte("hello, "), req.GetPayload()...), InstanceId: req.GetTarget() + "-00001", NodeId: "n2"}, nil
}

func (f *fake) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	logs := f.logs
	f.mu.Unlock()
	for _, e := range logs {
		if err := stream.Send(&pb.FollowLogsResponse{Entry: e}); err != nil {
			return err
		}
	}
	if req.GetFollow() {
		<-stream.Context().Done()
	}
	return nil
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
