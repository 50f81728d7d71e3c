package modules

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testCluster is some peers' disks, connected in memory, and one registry for all.
type testCluster struct {
	t     *testing.T
	state *registry
	peers map[string]*testPeer
	order []PeerRef
}

type testPeer struct {
	id         string
	dir        string
	store      *Store
	replicator *Replicator
	metrics    *prometheus.Registry

	mu sync.Mutex
	// caller is who the peer takes all its clients for.
	caller identity.Subject
	// before runs before each call is served; an error refuses the call.
	before func(ctx context.Context, method string) error
}

// registry is a state that a test changes directly.
type registry struct {
	*fsm.State
	mu    sync.Mutex
	index uint64
}

func (r *registry) View(context.Context, *pb.ReadOptions) (fsm.View, error) {
	return r.State.View(), nil
}

func (r *registry) register(t *testing.T, m *pb.Module) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index++
	res := r.Apply(r.index, &pb.Command{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: m}}})
	if res.GetError() != nil {
		t.Fatal(res.GetError())
	}
}

// newCluster makes peers with the ids given; an id that ends in "?" is of a non-voter.
func newCluster(t *testing.T, ids ...string) *testCluster {
	t.Helper()
	c := &testCluster{t: t, state: &registry{State: fsm.New()}, peers: map[string]*testPeer{}}
	for _, id := range ids {
		name, nonVoter := strings.CutSuffix(id, "?")
		c.order = append(c.order, PeerRef{ID: name, Address: name + ":7400", Voter: !nonVoter})
	}
	conns := map[string]grpc.ClientConnInterface{}
	for _, ref := range c.order {
		p := &testPeer{id: ref.ID, dir: t.TempDir(), metrics: prometheus.NewRegistry()}
		p.caller = identity.Subject{Cluster: "test", Kind: identity.Node, Name: "other", Role: identity.RoleServer}
		p.store = newStore(t, p.dir)
		conns[ref.Address] = p.serve(t)
		r, err := NewReplicator(Config{
			Self: ref.ID, Store: p.store, Registry: c.state,
			Peers: func(context.Context) []PeerRef { return c.order },
			Conn: func(address string) (grpc.ClientConnInterface, error) {
				if conn, ok := conns[address]; ok {
					return conn, nil
				}
				return nil, fmt.Errorf("no such address %s", address)
			},
			Logger: slog.New(slog.DiscardHandler), Metrics: p.metrics,
		})
		if err != nil {
			t.Fatal(err)
		}
		p.replicator = r
		c.peers[ref.ID] = p
	}
	return c
}

func (p *testPeer) serve(t *testing.T) grpc.ClientConnInterface {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		p.mu.Lock()
		before, caller := p.before, p.caller
		p.mu.Unlock()
		if before != nil {
			if err := before(stream.Context(), info.FullMethod); err != nil {
				return err
			}
		}
		return next(srv, &callerStream{ServerStream: stream, caller: caller})
	}))
	NewService(p.store, slog.New(slog.DiscardHandler)).Register(server)
	go func() { _ = server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:"+p.id,
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return listener.Dial() }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
	})
	return conn
}

type callerStream struct {
	grpc.ServerStream
	caller identity.Subject
}

func (s *callerStream) Context() context.Context {
	return identity.WithCaller(s.ServerStream.Context(), s.caller)
}

func (p *testPeer) refuse(err error) { p.hook(func(context.Context, string) error { return err }) }

func (p *testPeer) hook(before func(ctx context.Context, method string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = before
}

// run starts a peer's Replicator until the end of the test.
func (c *testCluster) run(id string) {
	c.t.Helper()
	ctx := c.t.Context()
	done := make(chan error, 1)
	go func() { done <- c.peers[id].replicator.Run(ctx) }()
	c.t.Cleanup(func() {
		if err := <-done; err != nil {
			c.t.Errorf("Run of %s: %v", id, err)
		}
	})
}

// admit stores a guest on one peer's disk.
func (c *testCluster) admit(id string, wasm []byte) *pb.Module {
	c.t.Helper()
	m, err := c.peers[id].replicator.Admit(bytes.NewReader(wasm), "")
	if err != nil {
		c.t.Fatal(err)
	}
	return m
}

func (c *testCluster) has(id, digest string) bool {
	b, err := read(c.peers[id].store, digest)
	return err == nil && modulestest.Digest(b) == digest
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited 10s in vain for: %s", what)
		}
	}
}

// large is a guest that takes several messages to transfer.
func large() []byte {
	return append(modulestest.Reactor(), modulestest.Section(0, append(modulestest.Name("x"), make([]byte, 3*chunkSize+17)...))...)
}

func TestReplicateBringsAModuleToAllPeers(t *testing.T) {
	c := newCluster(t, "a", "b", "c", "d?")
	for _, id := range []string{"a", "b", "c", "d"} {
		c.run(id)
	}
	m := c.admit("a", large())
	if err := c.peers["a"].replicator.Replicate(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"b", "c", "d"} {
		eventually(t, "the module on "+id, func() bool { return c.has(id, m.GetDigest()) })
	}
}

func TestReplicateAcknowledgesAtAMajorityOfTheVoters(t *testing.T) {
	down := status.Error(codes.Unavailable, "connection refused")
	full := apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "no space").GRPCStatus().Err()
	tests := []struct {
		name    string
		peers   []string
		refuse  map[string]error
		code    pb.ErrorCode
		details []string
	}{
		{name: "alone", peers: []string{"a"}},
		{name: "alone with a non-voter that is down", peers: []string{"a", "b?"}, refuse: map[string]error{"b": down}},
		{name: "one of three is down", peers: []string{"a", "b", "c"}, refuse: map[string]error{"b": down}},
		{
			name: "two of three are down", peers: []string{"a", "b", "c"}, refuse: map[string]error{"b": down, "c": down},
			code: pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, details: []string{"peer_b", "peer_c"},
		},
		{
			name: "one of two is down", peers: []string{"a", "b"}, refuse: map[string]error{"b": down},
			code: pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, details: []string{"peer_b"},
		},
		{
			name: "a non-voter does not count", peers: []string{"a", "b", "c", "d?", "e?"}, refuse: map[string]error{"b": down, "c": down},
			code: pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, details: []string{"peer_b", "peer_c"},
		},
		{
			name: "an uploading non-voter does not count", peers: []string{"a?", "b", "c"}, refuse: map[string]error{"b": down},
			code: pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, details: []string{"peer_b"},
		},
		{
			name: "full disks", peers: []string{"a", "b", "c"}, refuse: map[string]error{"b": full, "c": down},
			code: pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, details: []string{"peer_b", "peer_c"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster(t, test.peers...)
			for id, err := range test.refuse {
				c.peers[id].refuse(err)
			}
			c.run("a")
			m := c.admit("a", modulestest.Command())
			err := c.peers["a"].replicator.Replicate(t.Context(), m)
			if apierror.CodeOf(err) != test.code {
				t.Fatalf("error is %v, want code %v", err, test.code)
			}
			for _, key := range test.details {
				if apierror.From(err).Detail(key) == "" {
					t.Errorf("the error does not name %s: %v", key, apierror.From(err).Proto(t.Context()))
				}
			}
		})
	}
}

func TestReplicateDoesNotWaitForASlowPeerAndGoesOnWithIt(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	release := make(chan struct{})
	c.peers["c"].hook(func(ctx context.Context, _ string) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	c.run("a")
	m := c.admit("a", large())
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.peers["a"].replicator.Replicate(ctx, m); err != nil {
		t.Fatal(err)
	}
	// The call that asked for it is over; the transfer to c is not.
	cancel()
	if c.has("c", m.GetDigest()) {
		t.Fatal("c has the module before it was let go on")
	}
	close(release)
	eventually(t, "the module on c", func() bool { return c.has("c", m.GetDigest()) })
}

func TestReplicateEndsWithItsContextAndWithRun(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	for _, id := range []string{"b", "c"} {
		c.peers[id].hook(func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		})
	}
	m := c.admit("a", modulestest.Command())
	r := c.peers["a"].replicator
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := r.Replicate(ctx, m); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v, want DeadlineExceeded", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := r.Run(ended); err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := r.Replicate(t.Context(), m); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
		t.Errorf("after the end of Run the error is %v, want COMMUNICATION_FAILURE", err)
	}
}

func TestRunPullsWhatIsRegisteredAndMissing(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	before := c.admit("a", large())
	c.state.register(t, before)
	c.run("c")
	eventually(t, "the module registered before Run", func() bool { return c.has("c", before.GetDigest()) })

	after := c.admit("b", modulestest.Command())
	c.state.register(t, after)
	eventually(t, "the module registered during Run", func() bool { return c.has("c", after.GetDigest()) })
	// The counter moves just after the file has its name.
	eventually(t, "wasmatrix_module_pulls_total{result=ok} to be 2", func() bool {
		return testutil.ToFloat64(c.peers["c"].replicator.metrics.pulls.WithLabelValues("ok")) == 2
	})
}

func TestRunPullsLaterWhatNobodyCouldGive(t *testing.T) {
	c := newCluster(t, "a", "b")
	m := c.admit("a", modulestest.Command())
	asked := make(chan struct{}, 100)
	c.peers["a"].hook(func(context.Context, string) error {
		asked <- struct{}{}
		return status.Error(codes.Unavailable, "connection refused")
	})
	c.state.register(t, m)
	c.run("b")
	<-asked
	c.peers["a"].hook(nil)
	eventually(t, "the module on b", func() bool { return c.has("b", m.GetDigest()) })
}

func TestADamagedModuleIsFetchedAgainFromASoundPeer(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	wasm := large()
	m := c.admit("a", wasm)
	for _, id := range []string{"b", "c"} {
		c.admit(id, wasm)
	}
	c.state.register(t, m)
	for _, id := range []string{"a", "b"} {
		damaged := bytes.Clone(wasm)
		damaged[100] ^= 1
		if err := os.WriteFile(files(t, c.peers[id].dir)[0], damaged, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.run("b")
	body, err := c.peers["a"].replicator.Open(t.Context(), m.GetDigest())
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(body)
	if err := errors.Join(err, body.Close()); err != nil || !bytes.Equal(got, wasm) {
		t.Errorf("read %d bytes, %v; want the %d sound ones", len(got), err, len(wasm))
	}
	if !c.has("a", m.GetDigest()) {
		t.Error("the sound copy was not kept")
	}
	if n := testutil.ToFloat64(c.peers["a"].replicator.metrics.damaged); n != 1 {
		t.Errorf("wasmatrix_modules_damaged_total is %v, want 1", n)
	}
	// b finds its own damage when it is read there, and is mended too.
	if _, err := read(c.peers["b"].store, m.GetDigest()); err == nil {
		t.Fatal("b read a damaged module")
	}
	body, err = c.peers["b"].replicator.Open(t.Context(), m.GetDigest())
	if err != nil {
		t.Fatal(err)
	}
	_ = body.Close()
}

func TestOpenTellsWhyAModuleCannotBeHad(t *testing.T) {
	c := newCluster(t, "a", "b")
	digest := modulestest.Digest([]byte("nowhere"))
	_, err := c.peers["a"].replicator.Open(t.Context(), digest)
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND {
		t.Errorf("nobody has it: error is %v, want MODULE_NOT_FOUND", err)
	}
	c.peers["b"].refuse(status.Error(codes.Unavailable, "connection refused"))
	_, err = c.peers["a"].replicator.Open(t.Context(), digest)
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE || apierror.From(err).Detail("peer_b") == "" {
		t.Errorf("b may have it and is down: error is %v, want COMMUNICATION_FAILURE that names b", err)
	}
	_, err = c.peers["a"].replicator.Open(t.Context(), "sha256:short")
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
		t.Errorf("malformed digest: error is %v, want INVALID_REQUEST", err)
	}
}

func TestManyReadersCauseOneTransfer(t *testing.T) {
	c := newCluster(t, "a", "b")
	m := c.admit("b", large())
	var mu sync.Mutex
	transfers := 0
	c.peers["b"].hook(func(context.Context, string) error {
		mu.Lock()
		defer mu.Unlock()
		transfers++
		return nil
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			body, err := c.peers["a"].replicator.Open(t.Context(), m.GetDigest())
			if err != nil {
				t.Error(err)
				return
			}
			_ = body.Close()
		})
	}
	wg.Wait()
	if transfers != 1 {
		t.Errorf("%d transfers, want 1", transfers)
	}
}

func TestPeerServiceIsForPeersOnly(t *testing.T) {
	c := newCluster(t, "a", "b")
	m := c.admit("a", modulestest.Command())
	for _, caller := range []identity.Subject{
		{},
		{Cluster: "test", Kind: identity.User, Name: "root", Role: identity.RoleAdmin},
		{Cluster: "test", Kind: identity.Node, Name: "w1", Role: identity.RoleWorker},
	} {
		for _, p := range c.peers {
			p.mu.Lock()
			p.caller = caller
			p.mu.Unlock()
		}
		err := c.peers["a"].replicator.push(t.Context(), m, c.order[1])
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED || c.has("b", m.GetDigest()) {
			t.Errorf("StoreModule by %v: %v, want PERMISSION_DENIED", caller, err)
		}
		err = c.peers["b"].replicator.pullFrom(t.Context(), m.GetDigest(), c.order[0])
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED || c.has("b", m.GetDigest()) {
			t.Errorf("ReadModule by %v: %v, want PERMISSION_DENIED", caller, err)
		}
	}
}

func TestStoreModuleTrustsNoDigest(t *testing.T) {
	c := newCluster(t, "a", "b")
	claimed := modulestest.Digest([]byte("what b is told"))
	client, err := c.peers["a"].replicator.client(c.order[1])
	if err != nil {
		t.Fatal(err)
	}
	for name, parts := range map[string][]*pb.StoreModuleRequest{
		"other bytes": {
			{Part: &pb.StoreModuleRequest_Module{Module: &pb.Module{Digest: claimed}}},
			{Part: &pb.StoreModuleRequest_Chunk{Chunk: []byte("what b gets")}},
		},
		"no digest":        {{Part: &pb.StoreModuleRequest_Module{Module: &pb.Module{}}}},
		"a path":           {{Part: &pb.StoreModuleRequest_Module{Module: &pb.Module{Digest: "sha256:../../etc/passwd"}}}},
		"bytes at once":    {{Part: &pb.StoreModuleRequest_Chunk{Chunk: []byte("x")}}},
		"nothing but name": {{Part: &pb.StoreModuleRequest_Module{Module: &pb.Module{Digest: claimed}}}},
	} {
		stream, err := client.StoreModule(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range parts {
			if err := stream.Send(part); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		_, err = stream.CloseAndRecv()
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
			t.Errorf("%s: error is %v, want INVALID_REQUEST", name, err)
		}
	}
	if left := files(t, c.peers["b"].dir); len(left) > 0 {
		t.Errorf("b keeps %v", left)
	}
}

func TestMetricsFollowTheRules(t *testing.T) {
	c := newCluster(t, "a")
	c.peers["a"].replicator.metrics.pulled(nil)
	c.peers["a"].replicator.metrics.pushed(nil)
	problems, err := testutil.GatherAndLint(c.peers["a"].metrics)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	names := []string{}
	families, err := c.peers["a"].metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		names = append(names, f.GetName())
	}
	if !slices.IsSorted(names) || len(names) != 3 {
		t.Errorf("metrics are %v, want 3", names)
	}
}
