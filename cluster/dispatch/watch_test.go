package dispatch

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-memdb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func names(m *pb.WatchAssignmentsResponse) []string {
	var out []string
	for _, c := range m.GetChanges() {
		name, put := describe(c)
		if !put {
			name = "no " + name
		}
		out = append(out, name)
	}
	return out
}

func wantChanges(t *testing.T, what string, m *pb.WatchAssignmentsResponse, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, names(m)); diff != "" {
		t.Errorf("%s: changes (-want +got)\n%s", what, diff)
	}
}

func TestStreamTellsWhatANodeMustKnow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		for _, id := range []string{"n1", "n2", "n3"} {
			l.register(t, id, 0)
		}
		secret := map[string]string{"password": "hunter2"}
		r.addProvider(t, "here", "n1", secret)
		r.addProvider(t, "there", "n2", secret)
		r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1", "a-2", "a-3")
		r.place(t, "a-1", "n1")
		r.place(t, "a-2", "n3")
		for _, id := range []string{"a-1", "a-2", "a-3"} {
			r.grant(t, id, "here")
			r.grant(t, id, "there")
		}
		s := l.watch(t, "n1", 1)
		full := s.take(t)
		if !full.GetComplete() || full.GetMore() || full.GetAppliesTo() != 0 || full.GetResultsIn() != 1 || full.GetIndex() != r.state.View().Index() {
			t.Errorf("the first message is not the full set: %v", full)
		}
		wantChanges(t, "full set", full,
			"node n2", "node n3", "provider here", "provider there",
			"assignment a-1 here", "assignment a-1 there", "assignment a-2 here",
			"remote a-2", "instance a-1")
		if got := s.known["provider here"].GetPutProvider().GetSpec().GetConfig(); !maps.Equal(got, secret) {
			t.Errorf("the host got the configuration %v", got)
		}
		if got := s.known["provider there"].GetPutProvider().GetSpec().GetConfig(); len(got) != 0 {
			t.Errorf("a node that only uses a provider got its configuration: %v", got)
		}
		if got := s.known["remote a-2"].GetPutRemoteInstance(); got.GetName() != "a" || got.GetPlacement().GetNodeId() != "n3" || got.GetPlacement().GetGeneration() != 1 {
			t.Errorf("remote instance %v", got)
		}

		r.place(t, "a-3", "n2")
		wantChanges(t, "a caller is placed", s.take(t), "assignment a-3 here", "remote a-3")
		r.do(t, &pb.Command{Payload: &pb.Command_RevokeCapability{RevokeCapability: &pb.RevokeCapabilityCommand{InstanceIds: []string{"a-1"}, ProviderId: "there"}}})
		wantChanges(t, "the last use of a provider is revoked", s.take(t), "no assignment a-1 there", "no provider there")
		r.report(t, r.instanceReport("n2", "a-3", pb.InstanceState_INSTANCE_STATE_COMPLETED))
		wantChanges(t, "a caller has ended", s.take(t), "no remote a-3", "no assignment a-3 here", "no node n2")
		moved := nodeInfo("n3")
		moved.AgentAddress = "n3:7500"
		r.do(t, &pb.Command{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{Info: moved, Epoch: 1}}})
		wantChanges(t, "a node has another address", s.take(t), "node n3")
		r.do(t, &pb.Command{Payload: &pb.Command_AssignCapability{AssignCapability: &pb.AssignCapabilityCommand{
			InstanceIds: []string{"a-1"}, Grant: &pb.CapabilityGrant{Provider: "here", Permissions: []string{"kv:write"}},
		}}})
		wantChanges(t, "a permission is added", s.take(t), "assignment a-1 here")
		if got := s.known["assignment a-1 here"].GetPutAssignment().GetPermissions(); !slices.Equal(got, []string{"kv:read", "kv:write"}) {
			t.Errorf("permissions %v", got)
		}
		r.stop(t, "a-1")
		wantChanges(t, "a stop is asked for", s.take(t), "instance a-1")
		if s.known["instance a-1"].GetPutInstance().GetDesiredRunning() {
			t.Error("the agent is not told to stop the instance")
		}
		r.report(t, r.instanceReport("n1", "a-1", pb.InstanceState_INSTANCE_STATE_STOPPED))
		if m := s.take(t); m != nil {
			t.Errorf("the agent's own report came back: %v", m)
		}
		r.do(t, &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n3", Epoch: 1}}})
		if m := s.take(t); m != nil {
			t.Errorf("a caller on a lost node loses its rights before it runs elsewhere: %v", m)
		}
		r.place(t, "a-2", "n1")
		wantChanges(t, "a caller moves here", s.take(t),
			"no remote a-2", "no node n3", "node n2", "provider there", "assignment a-2 there", "instance a-2")
	})
}

func TestStatusAloneIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		l.register(t, "n2", 0)
		r.addProvider(t, "kv", "n1", nil)
		r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1", "a-2")
		r.place(t, "a-1", "n1")
		r.place(t, "a-2", "n2")
		r.grant(t, "a-1", "kv")
		r.grant(t, "a-2", "kv")
		host, user := l.watch(t, "n1", 1), l.watch(t, "n2", 1)
		host.take(t)
		user.take(t)
		for _, state := range []pb.InstanceState{
			pb.InstanceState_INSTANCE_STATE_PREPARING, pb.InstanceState_INSTANCE_STATE_RUNNING, pb.InstanceState_INSTANCE_STATE_CRASHED,
		} {
			r.report(t, r.instanceReport("n1", "a-1", state))
			r.report(t, r.instanceReport("n2", "a-2", state))
			if h, u := host.take(t), user.take(t); h != nil || u != nil {
				t.Errorf("%s: sent %v and %v", state, h, u)
			}
		}
		r.report(t, r.providerReport("n1", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING))
		if m := host.take(t); m != nil {
			t.Errorf("the host got its own report: %v", m)
		}
		wantChanges(t, "whether a used provider runs", user.take(t), "provider kv")
		if got := user.known["provider kv"].GetPutProvider().GetStatus().GetState(); got != pb.ProviderState_PROVIDER_STATE_RUNNING {
			t.Errorf("state %s, want RUNNING", got)
		}
		r.do(t, &pb.Command{Payload: &pb.Command_SetProviderRunning{SetProviderRunning: &pb.SetProviderRunningCommand{ProviderId: "kv"}}})
		wantChanges(t, "a stop of the provider, at its host", host.take(t), "provider kv")
		wantChanges(t, "a stop of the provider, at its user", user.take(t), "provider kv")
	})
}

func TestFirstDeliveryCarriesWhatTheAgentGoesOnFrom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1", "a-2", "a-3")
		for _, id := range []string{"a-1", "a-2", "a-3"} {
			r.place(t, id, "n1")
		}
		crashed := r.instanceReport("n1", "a-1", pb.InstanceState_INSTANCE_STATE_CRASHED)
		crashed.Instances[0].Status.CrashCount = 3
		r.report(t, crashed)
		r.report(t, r.instanceReport("n1", "a-2", pb.InstanceState_INSTANCE_STATE_COMPLETED))
		s := l.watch(t, "n1", 1)
		s.take(t)
		if got := s.known["instance a-1"].GetPutInstance().GetStatus().GetCrashCount(); got != 3 {
			t.Errorf("crash count %d, want 3", got)
		}
		if got := s.known["instance a-2"].GetPutInstance().GetStatus().GetState(); got != pb.InstanceState_INSTANCE_STATE_COMPLETED {
			t.Errorf("an ended instance is delivered as %s", got)
		}
		// A new agent process gets what runs again, with the count, and not what ended.
		again := l.register(t, "n1", 0)
		wantCode(t, "the old stream", <-s.ended, conflict)
		s = l.watch(t, "n1", again.Epoch)
		wantChanges(t, "full set of the new process", s.take(t), "instance a-1", "instance a-3")
		got := s.known["instance a-1"].GetPutInstance()
		if got.GetStatus().GetCrashCount() != 3 || got.GetPlacement().GetGeneration() != 2 {
			t.Errorf("instance %v, want 3 crashes and generation 2", got)
		}
	})
}

func TestSlowAgentGetsChangesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		l.register(t, "n1", 0)
		s := l.watch(t, "n1", 1)
		synctest.Wait() // the full set, empty, is on its way
		r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1", "a-2", "a-3")
		for _, id := range []string{"a-1", "a-2", "a-3"} {
			r.place(t, id, "n1")
		}
		r.do(t, &pb.Command{Payload: &pb.Command_RemoveInstances{RemoveInstances: &pb.RemoveInstancesCommand{InstanceIds: []string{"a-2"}, Force: true}}})
		wantChanges(t, "full set", s.take(t))
		wantChanges(t, "all that gathered", s.take(t), "instance a-1", "instance a-3")
		if m := s.take(t); m != nil {
			t.Errorf("one message too many: %v", m)
		}
	})
}

func TestStreamEndsWithItsEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		l := newLead(t, r, "p1").settle(t)
		wantCode(t, "a node that never registered",
			l.WatchAssignments(&pb.WatchAssignmentsRequest{NodeId: "n1", Epoch: 1}, streamOf(as(t.Context(), "n1"))), conflict)
		l.register(t, "n1", 0)
		s := l.watch(t, "n1", 1)
		s.take(t)
		if got := l.metric(t, "wasmatrix_node_sessions"); got != 1 {
			t.Errorf("%v sessions, want 1", got)
		}
		pass(held(DefaultLeaseTTL))
		wantCode(t, "the stream of a lost node", <-s.ended, conflict)
		if got := l.metric(t, "wasmatrix_node_sessions"); got != 0 {
			t.Errorf("%v sessions, want 0", got)
		}
	})
}

func TestLargeSetsComeInPieces(t *testing.T) {
	s := newSession(holder{"n1", 1}, newDirectories())
	var changes []*pb.AssignmentChange
	for k := range 20 {
		changes = append(changes, localInstance{&pb.Instance{
			Id: fmt.Sprintf("a-%d", k), Spec: &pb.WorkloadSpec{Stdin: make([]byte, 1<<20)},
		}}.put())
	}
	known, seq := agentSet{}, uint64(0)
	messages := s.pack(changes, true, 1)
	for k, m := range messages {
		if size := proto.Size(m); size > maxMessageBytes+1<<20 {
			t.Errorf("message %d has %d bytes", k, size)
		}
		if last := k == len(messages)-1; m.GetMore() == last || !m.GetComplete() {
			t.Errorf("message %d of %d: complete %t, more %t", k, len(messages), m.GetComplete(), m.GetMore())
		}
		if err := known.apply(m, &seq); err != nil {
			t.Fatal(err)
		}
	}
	if len(known) != len(changes) || len(messages) != 3 {
		t.Errorf("%d changes in %d messages, want 20 in 3", len(known), len(messages))
	}
	for _, m := range s.pack(changes, false, 2) {
		if m.GetMore() || m.GetComplete() {
			t.Error("a difference claims to be a part of a full set")
		}
		if err := known.apply(m, &seq); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDirectoryWakesWhoeverHasSeenSomethingElse(t *testing.T) {
	node := func(id, address string) *pb.Node {
		return &pb.Node{Id: id, Info: &pb.NodeInfo{AgentAddress: address}}
	}
	d := newDirectories().nodes
	d.sync([]*pb.Node{node("a", "a:1"), node("b", "b:1")})
	watch := func(id string, seen *pb.Node) memdb.WatchSet {
		ws := memdb.NewWatchSet()
		d.watch(ws, id, seen, seen != nil)
		return ws
	}
	a, b, c := watch("a", node("a", "a:1")), watch("b", node("b", "b:1")), watch("c", nil)
	if fired(a) || fired(b) || fired(c) {
		t.Errorf("nothing changed: a %t, b %t, c %t", fired(a), fired(b), fired(c))
	}
	d.sync([]*pb.Node{node("a", "a:2"), node("b", "b:1")})
	if !fired(a) || fired(b) || fired(c) {
		t.Errorf("a moved: a %t, b %t, c %t", fired(a), fired(b), fired(c))
	}
	if !fired(watch("a", node("a", "a:1"))) || fired(watch("a", node("a", "a:2"))) {
		t.Error("whoever saw a where it was, and nobody else, is to look again")
	}
	d.sync([]*pb.Node{node("a", "a:2"), node("c", "c:1")})
	if !fired(b) || !fired(c) {
		t.Errorf("b left and c came: b %t, c %t", fired(b), fired(c))
	}
	if !fired(watch("b", node("b", "b:1"))) || fired(watch("b", nil)) {
		t.Error("whoever saw b, and nobody else, is to look again")
	}
}

func TestOneChangeWakesOnlyTheSessionsConcerned(t *testing.T) {
	const nodes, each = 1000, 10
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		for k := range nodes {
			r.addNode(t, fmt.Sprintf("n%04d", k))
		}
		var decisions []*pb.PlaceDecision
		for k := range each {
			ids := make([]string, nodes)
			for n := range ids {
				ids[n] = fmt.Sprintf("w%d-%04d", k, n)
				decisions = append(decisions, &pb.PlaceDecision{InstanceId: ids[n], NodeId: fmt.Sprintf("n%04d", n), NodeEpoch: 1})
			}
			r.create(t, &pb.WorkloadSpec{Name: fmt.Sprintf("w%d", k)}, ids...)
		}
		r.do(t, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: decisions}}})
		r.addProvider(t, "kv", "n0000", nil)
		for n := range 3 {
			r.grant(t, fmt.Sprintf("w0-%04d", n+1), "kv")
		}
		l := newLead(t, r, "p1").settle(t)
		streams := make([]*agentStream, nodes)
		for n := range streams {
			streams[n] = l.watch(t, fmt.Sprintf("n%04d", n), 1)
		}
		synctest.Wait()
		for n, s := range streams {
			if m := <-s.messages; len(m.GetChanges()) < each {
				t.Fatalf("n%04d was told %d things", n, len(m.GetChanges()))
			}
		}
		synctest.Wait()
		woken := func(do func()) int {
			before := l.metric(t, "wasmatrix_node_session_wakes_total")
			do()
			synctest.Wait()
			return int(l.metric(t, "wasmatrix_node_session_wakes_total") - before)
		}
		// The first wakes may be late news from the followers of nodes and providers.
		woken(func() {})
		for name, c := range map[string]struct {
			do   func()
			want int
		}{
			"a stop":   {func() { r.stop(t, "w3-0500") }, 1},
			"a status": {func() { r.report(t, r.instanceReport("n0600", "w3-0600", pb.InstanceState_INSTANCE_STATE_RUNNING)) }, 1},
			// Besides the node's own session that of the host whose callers include a
			// replica on it: callers are watched by workload.
			"a lost node": {func() {
				r.do(t, &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: "n0700", Epoch: 1}}})
			}, 2},
			"a provider with three users": {func() { r.report(t, r.providerReport("n0000", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)) }, 3},
			"a new node":                  {func() { r.addNode(t, "n9999") }, 0},
			"a module": {func() {
				r.do(t, &pb.Command{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: &pb.Module{Digest: "sha256:" + strings.Repeat("b", 64)}}}})
			}, 0},
			"an instance without a node yet": {func() { r.create(t, &pb.WorkloadSpec{Name: "z"}, "z-1") }, 0},
		} {
			if got := woken(c.do); got != c.want {
				t.Errorf("%s woke %d sessions of %d, want %d", name, got, nodes, c.want)
			}
		}
	})
}

func TestOverGRPC(t *testing.T) {
	r := newRegistry(t)
	l := newLead(t, r, "p1")
	t.Cleanup(l.stop)
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(as(ctx, "n1"), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, &identified{ServerStream: ss})
		}),
	)
	l.Register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///p1",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := pb.NewAgentSessionServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	var session *pb.RegisterNodeResponse
	for session == nil {
		// The duty may not have begun yet; until then every call is answered NO_LEADER.
		session, err = client.RegisterNode(ctx, &pb.RegisterNodeRequest{Info: nodeInfo("n1")}, grpc.WaitForReady(true))
		if err != nil && ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	stream, err := client.WatchAssignments(ctx, &pb.WatchAssignmentsRequest{NodeId: "n1", Epoch: session.GetEpoch()})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || !m.GetComplete() {
		t.Fatalf("full set %v, error %v", m, err)
	}
	r.create(t, &pb.WorkloadSpec{Name: "a"}, "a-1")
	r.place(t, "a-1", "n1")
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	wantChanges(t, "difference", m, "instance a-1")
	report := r.instanceReport("n1", "a-1", pb.InstanceState_INSTANCE_STATE_RUNNING)
	if _, err := client.ReportStatus(ctx, report); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Heartbeat(ctx, &pb.HeartbeatRequest{NodeId: "n1", Epoch: session.GetEpoch()}); err != nil {
		t.Fatal(err)
	}
	l.stop()
	_, err = stream.Recv()
	wantCode(t, "the stream when leadership ends", err, noLeader)
}

// identified is a server stream with a caller.
type identified struct{ grpc.ServerStream }

func (s *identified) Context() context.Context { return as(s.ServerStream.Context(), "n1") }

// BenchmarkStatusAtABusyHost is the cost of a status report to the session of a
// node whose provider has ten thousand callers on other nodes.
func BenchmarkStatusAtABusyHost(b *testing.B) {
	r := newRegistry(b)
	r.addNode(b, "n1")
	r.addNode(b, "n2")
	r.addProvider(b, "kv", "n1", nil)
	for k := range 10 {
		ids := make([]string, 1000)
		var decisions []*pb.PlaceDecision
		for n := range ids {
			ids[n] = fmt.Sprintf("w%d-%04d", k, n)
			decisions = append(decisions, &pb.PlaceDecision{InstanceId: ids[n], NodeId: "n2", NodeEpoch: 1})
		}
		r.create(b, &pb.WorkloadSpec{Name: fmt.Sprintf("w%d", k), Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read"}}}}, ids...)
		r.do(b, &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: decisions}}})
	}
	s := newSession(holder{"n1", 1}, newDirectories())
	if m := s.next(r.state.View()); len(m[0].GetChanges()) < 20000 {
		b.Fatalf("%d changes in the full set", len(m[0].GetChanges()))
	}
	attempt := uint32(0)
	for b.Loop() {
		attempt++
		report := r.instanceReport("n2", "w0-0000", pb.InstanceState_INSTANCE_STATE_RUNNING)
		report.Instances[0].Status.Attempt = attempt
		r.report(b, report)
		if m := s.next(r.state.View()); m != nil {
			b.Fatalf("sent %v", m)
		}
		s.watch(memdb.NewWatchSet())
	}
}
