package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// threeInstances are two of hello and one of other.
func threeInstances(f *fake) {
	f.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_RUNNING)
	crashed := f.add("hello-bbbbb", pb.InstanceState_INSTANCE_STATE_CRASHED)
	crashed.Status.CrashCount, crashed.Status.Message = 3, "trap: unreachable\nstack"
	crashed.Status.NextRetryAt = timestamppb.New(epoch().Add(95 * time.Second))
	pending := f.add("other-ccccc", pb.InstanceState_INSTANCE_STATE_PENDING)
	pending.Placement = nil
}

func TestListInEveryForm(t *testing.T) {
	b := newBench(t)
	if got := b.want("ps"); got != "no instances\n" {
		t.Errorf("empty: %q", got)
	}
	threeInstances(b.fake)
	want := `ID           STATE    NODE  CRASHES  AGE    MESSAGE
hello-aaaaa  RUNNING  n1    0        1m30s
hello-bbbbb  CRASHED  n1    3        1m30s  trap: unreachable
other-ccccc  PENDING  -     0        1m30s
`
	for _, args := range [][]string{{"ps"}, {"instance", "ls"}, {"instance", "list"}, {"i", "ps"}} {
		if got := b.want(args...); got != want {
			t.Errorf("%v:\n%s\nwant\n%s", args, got, want)
		}
	}
	if got := b.want("ps", "-o", "name"); got != "hello-aaaaa\nhello-bbbbb\nother-ccccc\n" {
		t.Errorf("name: %q", got)
	}
	var shaped struct {
		Instances []struct{ ID, Name string }
		Index     string
	}
	if err := json.Unmarshal([]byte(b.want("ps", "-o", "json")), &shaped); err != nil || len(shaped.Instances) != 3 || shaped.Index != "9" {
		t.Errorf("json: %v, %+v", err, shaped)
	}
	if got := b.want("ps", "-o", "yaml"); !strings.Contains(got, "desired_running: true") {
		t.Errorf("yaml does not use the names of manifests:\n%s", got)
	}
	b.want("ps", "hello", "--node", "n1", "--state", "running", "--stale")
	// The same request is sent again for the next page.
	req := request[*pb.ListInstancesRequest](b.fake)
	if req.GetName() != "hello" || req.GetNodeId() != "n1" || req.GetStates()[0] != pb.InstanceState_INSTANCE_STATE_RUNNING || !req.GetRead().GetStale() {
		t.Errorf("request is %v", req)
	}
}

func TestGetDescribesAnInstance(t *testing.T) {
	b := newBench(t)
	threeInstances(b.fake)
	b.fake.grants = []*pb.CapabilityAssignment{{InstanceId: "hello-bbbbb", ProviderId: "kv", Permissions: []string{"kv:read"}, Bucket: "hello"}}
	got := b.want("instance", "describe", "hello-bbbbb")
	for _, want := range []string{"state        CRASHED trap: unreachable\n", "node         n1, generation 1\n", "next retry   in 5s\n", "may use      kv: kv:read (bucket hello)\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if code, _, stderr := b.run("instance", "get", "nope"); code != 3 || !strings.Contains(stderr, "try:  wasmatrix instance list\n") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestStopRestartAndRemoveWaitForTheOutcome(t *testing.T) {
	b := newBench(t)
	threeInstances(b.fake)
	code, stdout, stderr := b.run("instance", "stop", "hello")
	if code != 0 || stdout != "" || !strings.Contains(stderr, "✓ hello-aaaaa stopped") || !strings.Contains(stderr, "✓ hello-bbbbb stopped") {
		t.Errorf("stop: exit %d, %q\n%s", code, stdout, stderr)
	}
	if got := b.want("instance", "start", "hello", "-o", "name"); got != "hello-aaaaa\nhello-bbbbb\n" {
		t.Errorf("start: %q", got)
	}
	if got := b.want("instance", "stop", "other", "--no-wait"); !strings.Contains(got, "other-ccccc  PENDING") {
		t.Errorf("no-wait: %q", got)
	}
	b.fake.becomes = func(i *pb.Instance) { i.Status.State = pb.InstanceState_INSTANCE_STATE_FAILED }
	if code, _, stderr := b.run("instance", "restart", "hello-aaaaa"); code != 8 || !strings.Contains(stderr, "hello-aaaaa failed") {
		t.Errorf("failing restart: exit %d\n%s", code, stderr)
	}
	if got := b.want("instance", "rm", "hello", "--force"); got != "hello-aaaaa removed\nhello-bbbbb removed\n" {
		t.Errorf("rm: %q", got)
	}
}

func TestInvokePrintsTheAnswerAsItIs(t *testing.T) {
	b := newBench(t)
	if got := b.want("invoke", "hello", "-d", "Ada"); got != "hello, Ada" {
		t.Errorf("text: %q", got)
	}
	if got := b.want("invoke", "hello", "-d", "@"+b.file("in", "\x00\xff")); got != "hello, \x00\xff" {
		t.Errorf("file: %q", got)
	}
	b.in = "piped"
	if got := b.want("instance", "invoke", "hello", "-d", "-", "--content-type", "text/plain"); got != "hello, piped" {
		t.Errorf("standard input: %q", got)
	}
	if req := request[*pb.InvokeRequest](b.fake); req.GetContentType() != "text/plain" {
		t.Errorf("request is %v", req)
	}
	b.in = strings.Repeat("x", maxPayload+1)
	if code, _, stderr := b.run("invoke", "hello", "-d", "-"); code != 2 || !strings.Contains(stderr, "larger than 4 MiB") {
		t.Errorf("too much: exit %d\n%s", code, stderr)
	}
}

func TestLogsNameTheInstanceOnceThereAreSeveral(t *testing.T) {
	b := newBench(t)
	at := timestamppb.New(epoch())
	b.fake.logs = []*pb.LogEntry{
		{InstanceId: "a", Time: at, Message: "one", Stream: pb.LogStream_LOG_STREAM_STDOUT},
		{InstanceId: "b", Time: at, Message: "two", Stream: pb.LogStream_LOG_STREAM_LOG, Level: pb.LogLevel_LOG_LEVEL_WARN, Attributes: map[string]string{"k": "v", "a": "b"}},
		{InstanceId: "a", Time: at, Message: "three", Stream: pb.LogStream_LOG_STREAM_SYSTEM},
	}
	if got := b.want("logs", "a", "b"); got != "one\nb | WARN two a=b k=v\na | · three\n" {
		t.Errorf("got %q", got)
	}
	if got := b.want("logs", "a", "-o", "name"); got != "a\nb\na\n" {
		t.Errorf("name: %q", got)
	}
	if got := b.want("logs", "a", "--tail", "0", "--since", "10m", "-o", "json"); strings.Count(got, "\n") != 3 {
		t.Errorf("json is not one line an entry:\n%s", got)
	}
	if req := request[*pb.FollowLogsRequest](b.fake); req.GetTail() != -1 || req.GetSince().AsDuration() != 10*time.Minute {
		t.Errorf("request is %v", req)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	time.AfterFunc(100*time.Millisecond, cancel)
	if code, _, stderr := b.runIn(ctx, "logs", "a", "-f"); code != 0 {
		t.Errorf("Ctrl-C ends following with exit %d\n%s", code, stderr)
	}
}

func TestEvents(t *testing.T) {
	b := newBench(t)
	b.fake.events = []*pb.Event{{
		Sequence: 100, Time: timestamppb.New(epoch()), Kind: pb.EventKind_EVENT_KIND_INSTANCE_CRASHED,
		InstanceId: "hello-aaaaa", NodeId: "n1", Message: "trap: unreachable",
	}}
	code, stdout, stderr := b.run("events", "--for", "instance/hello", "--kind", "instance_crashed", "--after", "7")
	if code != 0 || !strings.HasSuffix(stdout, "  INSTANCE_CRASHED       hello-aaaaa n1  trap: unreachable\n") || stderr != "older events are no longer kept\n" {
		t.Errorf("exit %d, %q\n%s", code, stdout, stderr)
	}
	req := request[*pb.WatchEventsRequest](b.fake)
	if req.GetSubject() != "hello" || req.GetAfterSequence() != 7 || len(req.GetKinds()) != 1 || req.GetFollow() {
		t.Errorf("request is %v", req)
	}
	if got := b.want("instance", "events", "hello", "-o", "name"); got != "100\n" {
		t.Errorf("name: %q", got)
	}
}

func TestWaitEndsWithTheState(t *testing.T) {
	b := newBench(t)
	threeInstances(b.fake)
	b.fake.providers = []*pb.Provider{
		newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_STARTING), newProvider("broken", "kv", pb.ProviderState_PROVIDER_STATE_FAILED),
	}
	b.fake.providers[1].Status.Message = "no such driver"
	b.fake.nodes = []*pb.Node{{Id: "n1", State: pb.NodeState_NODE_STATE_READY, Draining: true}, {Id: "n2", State: pb.NodeState_NODE_STATE_LOST, Draining: true}}
	for _, tt := range []struct {
		subject, state string
		want           int
		say            string
	}{
		{"instance/hello-aaaaa", "RUNNING", 0, "hello-aaaaa is RUNNING"},
		{"hello-aaaaa", "running", 0, ""},
		{"instance/hello", "RUNNING", 7, "found  1 RUNNING, 1 CRASHED"},
		{"instance/none", "GONE", 0, ""},
		{"instance/none", "RUNNING", 3, ""},
		{"provider/kv", "STARTING", 0, ""},
		{"provider/kv", "RUNNING", 7, "found  STARTING"},
		{"provider/broken", "RUNNING", 8, "error: provider broken failed: no such driver"},
		{"provider/broken", "FAILED", 0, ""},
		{"provider/none", "GONE", 0, ""},
		{"node/n1", "READY", 0, ""},
		{"node/n1", "DRAINED", 7, "found  READY draining, 2 instances"},
		{"node/n2", "DRAINED", 0, ""},
		{"node/n9", "READY", 3, "try:  wasmatrix node list"},
	} {
		limit := "10s"
		if tt.want == exitDegraded {
			limit = "300ms"
		}
		code, _, stderr := b.run("wait", tt.subject, "--for", tt.state, "--timeout", limit)
		if code != tt.want || !strings.Contains(stderr, tt.say) {
			t.Errorf("%s %s: exit %d, want %d\n%s", tt.subject, tt.state, code, tt.want, stderr)
		}
	}
	b.fake.instances[1].Status.State = pb.InstanceState_INSTANCE_STATE_FAILED
	if code, _, stderr := b.run("instance", "wait", "hello", "--for", "RUNNING"); code != 8 {
		t.Errorf("one failed: exit %d\n%s", code, stderr)
	}
}

func TestWaitIsWokenByEventsAndRidesThroughFailures(t *testing.T) {
	b := newBench(t)
	i := b.fake.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_STARTING)
	b.fake.fail["QueryInstance"] = apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "slow")
	looked := make(chan struct{}, 100)
	b.fake.seen = func(method string) {
		if method == "ListInstances" {
			looked <- struct{}{}
		}
	}
	go func() {
		<-looked
		b.fake.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() { i.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING })
	}()
	began := time.Now()
	b.want("wait", "hello", "--for", "RUNNING")
	if d := time.Since(began); d > lookEvery {
		t.Errorf("it took %s: the event did not wake it", d)
	}
}

func TestExplainTellsWhyNot(t *testing.T) {
	b := newBench(t)
	threeInstances(b.fake)
	want := `other-ccccc is PENDING on -
NODE  VERDICT  REASONS
n1    no       no room: 64 MiB of 64 MiB taken
n2    best     load 0 %
`
	if got := b.want("explain", "other-ccccc"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestGrantRevokeAndCan(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", 0), newProvider("bus", "messaging", 0)}
	want := `INSTANCE  PROVIDER  BUCKET  PERMISSIONS
hello     kv        shared  kv:read kv:write:a/
hello     bus               msg:publish:x
`
	if got := b.want("grant", "hello", "kv:read", "msg:publish:x", "kv:write:a/", "--bucket", "shared"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	b.want("revoke", "hello", "kv:read")
	if req := request[*pb.RevokeCapabilityRequest](b.fake); req.GetProviderId() != "kv" || len(req.GetPermissions()) != 1 {
		t.Errorf("revoke: %v", req)
	}
	if got := b.want("revoke", "hello", "--all", "--provider", "bus"); got != "nothing is granted any more\n" {
		t.Errorf("revoke --all: %q", got)
	}
	if req := request[*pb.RevokeCapabilityRequest](b.fake); req.GetProviderId() != "bus" || len(req.GetPermissions()) != 0 {
		t.Errorf("revoke --all: %v", req)
	}

	threeInstances(b.fake)
	b.fake.grants = []*pb.CapabilityAssignment{
		{InstanceId: "hello-aaaaa", ProviderId: "kv", Permissions: []string{"kv:read:a/"}},
		{InstanceId: "hello-aaaaa", ProviderId: "kv2", Permissions: []string{"kv:read"}},
		{InstanceId: "hello-bbbbb", ProviderId: "kv", Permissions: []string{"kv:read:a/"}},
	}
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"hello", "kv:read:a/1"}, 0, "hello-aaaaa  allowed: kv:read:a/1 by kv:read:a/ on kv\nhello-bbbbb  allowed: kv:read:a/1 by kv:read:a/ on kv\n"},
		{[]string{"hello-aaaaa", "kv:read:b"}, 0, "hello-aaaaa  allowed: kv:read:b by kv:read on kv2\n"},
		{[]string{"hello", "kv:read:b"}, 5, "hello-bbbbb  denied: kv:read:b: not covered by kv:read:a/"},
		{[]string{"hello-aaaaa", "kv:read:b", "--provider", "kv"}, 5, "denied"},
		{[]string{"other-ccccc", "kv:read"}, 5, "denied"},
	} {
		code, stdout, stderr := b.run(append([]string{"can"}, tt.args...)...)
		if code != tt.code || !strings.Contains(stdout, tt.want) || stderr != "" {
			t.Errorf("can %v: exit %d, %q, %q", tt.args, code, stdout, stderr)
		}
	}
}

func TestProviders(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}
	if got := b.want("provider", "list"); !strings.Contains(got, "kv  kv    -       RUNNING  n2    1m30s") {
		t.Errorf("list:\n%s", got)
	}
	if got := b.want("provider", "get", "kv"); !strings.Contains(got, "  a=1\n") {
		t.Errorf("get:\n%s", got)
	}
	if code, stdout, stderr := b.run("provider", "stop", "kv"); code != 0 || stdout != "" || !strings.Contains(stderr, "✓ kv stopped on n2") {
		t.Errorf("stop: exit %d, %q\n%s", code, stdout, stderr)
	}
	b.want("provider", "start", "kv")
	b.want("provider", "update", "kv", "--driver", "memory", "--config", "b=2")
	if spec := request[*pb.UpdateProviderRequest](b.fake).GetSpec(); spec.GetDriver() != "memory" || spec.GetConfig()["a"] != "1" || spec.GetConfig()["b"] != "2" {
		t.Errorf("update: %v", spec)
	}
	b.want("provider", "register", "-f", b.file("p.yaml", "id: cache\ntype: kv\n"), "--driver", "memory")
	if spec := request[*pb.RegisterProviderRequest](b.fake).GetSpec(); spec.GetId() != "cache" || spec.GetDriver() != "memory" {
		t.Errorf("register: %v", spec)
	}
	if got := b.want("provider", "deregister", "cache"); got != "cache removed\n" {
		t.Errorf("deregister: %q", got)
	}
	b.fake.opens = pb.ProviderState_PROVIDER_STATE_FAILED
	for _, args := range [][]string{{"register", "bad", "--type", "kv"}, {"update", "kv", "--driver", "bbolt"}, {"start", "bad"}} {
		if code, _, stderr := b.run(append([]string{"provider"}, args...)...); code != 8 || !strings.Contains(stderr, "failed") {
			t.Errorf("%v of one that fails: exit %d\n%s", args, code, stderr)
		}
	}
	b.fake.opens = pb.ProviderState_PROVIDER_STATE_RUNNING
	b.want("provider", "update", "kv", "--driver", "memory")
	b.fake.grants = []*pb.CapabilityAssignment{{InstanceId: "hello-aaaaa", ProviderId: "kv"}}
	code, _, stderr := b.run("provider", "stop", "kv")
	if code != 2 || !strings.Contains(stderr, "kv (kv, n2) is used by hello-aaaaa. Drain and stop?\ntry:  say so with --yes") {
		t.Errorf("in use: exit %d\n%s", code, stderr)
	}
	b.want("provider", "stop", "kv", "--yes")
}

func TestKeyValue(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}
	if got := b.want("kv", "put", "a/1", "one", "--ttl", "2s", "--bucket", "hello"); got != "a/1 stored, version 2001\n" {
		t.Errorf("put: %q", got)
	}
	b.want("kv", "put", "a/2", "@"+b.file("value", "two\n\x00"), "--bucket", "hello")
	if got := b.want("kv", "get", "a/2", "--bucket", "hello"); got != "two\n\x00" {
		t.Errorf("get: %q", got)
	}
	want := `KEY  VERSION  SIZE  VALUE
a/1  3        3 B   one
a/2  3        5 B   two\n\x00
`
	if got := b.want("kv", "list", "a/", "--bucket", "hello"); got != want {
		t.Errorf("list:\n%s\nwant\n%s", got, want)
	}
	if got := b.want("kv", "ls", "--bucket", "hello", "-o", "name", "--limit", "1"); got != "a/1\n" {
		t.Errorf("limit: %q", got)
	}
	if got := b.want("kv", "ls", "--bucket", "other"); got != "no keys\n" {
		t.Errorf("another bucket: %q", got)
	}
	if code, _, stderr := b.run("kv", "get", "zzz"); code != 3 || !strings.Contains(stderr, "there is no key \"zzz\"") || !strings.Contains(stderr, "not found · exit 3") {
		t.Errorf("missing: exit %d\n%s", code, stderr)
	}
	if code, _, stderr := b.run("kv", "put", "a/1", "x", "--if-version", "9"); code != 4 || !strings.Contains(stderr, "  version  3\n") {
		t.Errorf("cas: exit %d\n%s", code, stderr)
	}
	if got := b.want("kv", "del", "a/1", "zzz", "--bucket", "hello"); got != "a/1 removed\nzzz did not exist\n" {
		t.Errorf("del: %q", got)
	}
	b.fake.providers = append(b.fake.providers, newProvider("kv2", "kv", 0))
	if code, _, stderr := b.run("kv", "ls"); code != 2 || !strings.Contains(stderr, "choose with --provider") {
		t.Errorf("two providers: exit %d\n%s", code, stderr)
	}
}

func TestModulesAndNodes(t *testing.T) {
	b := newBench(t)
	if got := b.want("module", "push", b.file("hello.wasm", wasm)); !strings.HasPrefix(got, "sha256:93a44bbb") {
		t.Errorf("push: %q", got)
	}
	b.fake.modules = []*pb.Module{{Digest: "sha256:" + strings.Repeat("0", 64), Name: "hello.wasm", Kind: pb.ModuleKind_MODULE_KIND_COMMAND, SizeBytes: 3 << 20, CreatedAt: timestamppb.New(epoch())}}
	if got := b.want("module", "ls"); !strings.Contains(got, "sha256:000000000000  hello.wasm  command  3 MiB  1m30s  -\n") {
		t.Errorf("list:\n%s", got)
	}
	b.fake.nodes = []*pb.Node{{
		Id: "n1", State: pb.NodeState_NODE_STATE_READY, Labels: map[string]string{"zone": "b"}, StateChangedAt: timestamppb.New(epoch()),
		Info: &pb.NodeInfo{Capacity: &pb.NodeCapacity{Instances: 10, MemoryBytes: 4 << 30}, Labels: map[string]string{"zone": "a", "disk": "ssd"}},
	}}
	if got := b.want("node", "list"); !strings.Contains(got, "n1  READY  1m30s  2/10       4 GiB   -         -         -      disk=ssd,zone=b\n") {
		t.Errorf("nodes:\n%s", got)
	}
	if code, stdout, stderr := b.run("node", "drain", "n3"); code != 0 || stdout != "n3 drains\n" || !strings.Contains(stderr, "✓ n3 has no instances") {
		t.Errorf("drain: exit %d, %q\n%s", code, stdout, stderr)
	}
	if got := b.want("node", "undrain", "n3"); got != "n3 takes work again\n" {
		t.Errorf("undrain: %q", got)
	}
}

func healthy() *pb.StatusResponse {
	return &pb.StatusResponse{
		PeerId: "n2", Cluster: "dev", LeaderId: "n1", Term: 3, AppliedIndex: 42, Version: "1.0.0", NodesReady: 2,
		Instances: map[string]uint32{"RUNNING": 2, "PENDING": 1}, Providers: map[string]uint32{"RUNNING": 1},
		Peers: []*pb.PeerStatus{
			{Id: "n1", Voter: true, Leader: true, Alive: true, ApiAddress: "a:1", RaftAddress: "a:2"}, {Id: "n3", Alive: true}, {Id: "n2", Voter: true, Self: true},
		},
	}
}

func TestStatus(t *testing.T) {
	b := newBench(t)
	b.fake.status = healthy()
	want := `cluster dev · leader n1 · term 3 · index 42 · wasmatrix 1.0.0
  nodes      2 ready
  instances  1 PENDING, 2 RUNNING
  providers  1 RUNNING
PEER  ROLE       SEEN     API  RAFT  MESSAGE
n1    leader     yes      a:1  a:2
n2    follower   answers  -    -
n3    non-voter  yes      -    -
`
	if got := b.want("status", "--check"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := b.want("cluster", "peers", "-o", "name"); got != "n1\nn2\nn3\n" {
		t.Errorf("peers: %q", got)
	}
	for name, tt := range map[string]struct {
		breaks func(*pb.StatusResponse)
		code   int
		want   string
	}{
		"peer gone":        {func(s *pb.StatusResponse) { s.Peers[0].Alive = false }, 7, "the cluster is degraded: peer n1 is not seen"},
		"node lost":        {func(s *pb.StatusResponse) { s.NodesLost = 1 }, 7, "1 node lost"},
		"provider failed":  {func(s *pb.StatusResponse) { s.Providers["FAILED"] = 2 }, 7, "2 providers failed or lost"},
		"instances failed": {func(s *pb.StatusResponse) { s.Instances["FAILED"] = 2 }, 7, "2 instances failed"},
		"no leader": {func(s *pb.StatusResponse) {
			s.LeaderId, s.WithoutLeader, s.Peers[0].Leader, s.Peers[0].Alive = "", durationpb.New(12*time.Second), false, false
		}, 6, "error: no leader: 1 of 2 voting peers seen, quorum is 2"},
	} {
		b.fake.status = healthy()
		tt.breaks(b.fake.status)
		code, stdout, stderr := b.run("status", "--check")
		if code != tt.code || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d\n%s", name, code, stderr)
		}
		if !strings.Contains(stdout, "\n! ") {
			t.Errorf("%s: not marked in\n%s", name, stdout)
		}
		if code, _, _ := b.run("status"); code != 0 {
			t.Errorf("%s: without --check exit %d", name, code)
		}
	}
}

func TestWatchShowsAgainWhenSomethingHappened(t *testing.T) {
	b := newBench(t)
	b.fake.status = healthy()
	b.fake.status.AppliedIndex = 0
	i := b.fake.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_STARTING)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	shown := 0
	b.fake.seen = func(method string) {
		if method != "ListInstances" {
			return
		}
		shown++
		switch shown {
		case 1:
			go b.fake.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() { i.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING })
		case 2:
			time.AfterFunc(50*time.Millisecond, cancel)
		}
	}
	code, stdout, stderr := b.runIn(ctx, "ps", "--watch")
	first, second, again := strings.Cut(stdout, "\n\n")
	if code != 0 || !strings.Contains(first, "STARTING") || !again || !strings.Contains(second, "RUNNING") {
		t.Errorf("exit %d\n%s\n%s", code, stdout, stderr)
	}
}

func TestClusterCommands(t *testing.T) {
	b := newBench(t)
	if got := b.want("cluster", "transfer-leader", "n2"); got != "leadership moved from n1 to n2\n" {
		t.Errorf("transfer: %q", got)
	}
	if got := b.want("cluster", "remove", "n3", "--force"); got != "peer n3 removed\n" || !request[*pb.RemoveRequest](b.fake).GetForce() {
		t.Errorf("remove: %q", got)
	}
	if got := b.want("cluster", "promote", "n3"); got != "peer n3 votes\n" {
		t.Errorf("promote: %q", got)
	}
}

// aSnapshot is one in the format that package fsm writes.
func aSnapshot(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	records := []*pb.SnapshotRecord{
		{Record: &pb.SnapshotRecord_Header{Header: &pb.SnapshotHeader{Format: 1, Index: 42, Time: timestamppb.New(epoch()), StateHash: []byte{0xab}}}},
		{Record: &pb.SnapshotRecord_Instance{Instance: &pb.Instance{Id: "a"}}},
		{Record: &pb.SnapshotRecord_Instance{Instance: &pb.Instance{Id: "b"}}},
		{Record: &pb.SnapshotRecord_Event{Event: &pb.Event{Sequence: 1}}},
	}
	write := func(m proto.Message) {
		if _, err := protodelim.MarshalTo(&out, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range records {
		write(r)
	}
	sum := crc32.Checksum(out.Bytes(), crc32.MakeTable(crc32.Castagnoli))
	write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Trailer{Trailer: &pb.SnapshotTrailer{Records: uint64(len(records)), Crc32C: sum}}})
	return out.Bytes()
}

func TestSnapshotIsSavedInspectedAndRestored(t *testing.T) {
	b := newBench(t)
	b.fake.snapshot = aSnapshot(t)
	path := filepath.Join(b.home, "snap")
	if got := b.want("cluster", "snapshot", "save", path); !strings.HasPrefix(got, path+" saved: index 42, ") {
		t.Errorf("save: %q", got)
	}
	if got := b.want("cluster", "snapshot", "save", "-"); got != string(b.fake.snapshot) {
		t.Errorf("save to standard output: %d bytes", len(got))
	}
	got := b.want("cluster", "snapshot", "inspect", path)
	if !strings.HasPrefix(got, "format 1 · index 42 · 2026-01-02 03:04:05 UTC · ") || !strings.Contains(got, "  event       1\n  instance    2\nstate ab\n") {
		t.Errorf("inspect:\n%s", got)
	}
	if code, _, stderr := b.run("cluster", "snapshot", "restore", path); code != 2 || !strings.Contains(stderr, "say so with --yes") {
		t.Errorf("restore unasked: exit %d\n%s", code, stderr)
	}
	saved := b.fake.snapshot
	b.fake.snapshot = nil
	if got := b.want("cluster", "snapshot", "restore", path, "--yes"); !strings.HasSuffix(got, "the registry is at index 43\n") || !bytes.Equal(b.fake.snapshot, saved) {
		t.Errorf("restore: %q", got)
	}

	b.fake.fail["SnapshotSave"] = errors.New("disk broke")
	if code, _, _ := b.run("cluster", "snapshot", "save", path); code != 1 {
		t.Errorf("a failing save: exit %d", code)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, saved) {
		t.Errorf("a failing save changed the file: %v", err)
	}
	if entries, err := os.ReadDir(b.home); err != nil || len(entries) != 3 {
		t.Errorf("a failing save left something: %v, %v", entries, err)
	}
}

func TestDamagedSnapshotIsToldAndNeverSent(t *testing.T) {
	b := newBench(t)
	good := aSnapshot(t)
	for i := range good {
		damaged := bytes.Clone(good)
		damaged[i] ^= 4
		if s, err := inspect(bytes.NewReader(damaged)); err == nil {
			t.Errorf("a flipped bit in byte %d was not noticed: %+v", i, s)
		}
		if _, err := inspect(bytes.NewReader(good[:i])); err == nil {
			t.Errorf("a snapshot cut to %d bytes was not noticed", i)
		}
	}
	if _, err := inspect(bytes.NewReader(append(bytes.Clone(good), 0))); err == nil {
		t.Error("a byte too many was not noticed")
	}
	code, _, stderr := b.run("cluster", "snapshot", "restore", b.file("snap", string(good[:20])), "--yes")
	if code != 2 || !strings.Contains(stderr, "is not a complete snapshot") || b.fake.snapshot != nil {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestContextsAreShown(t *testing.T) {
	b := newBench(t)
	got := b.want("context", "show")
	for _, want := range []string{"cluster      dev\n", "subject      spiffe://dev/user/ann/admin\n", "certificate  " + filepath.Join(b.home, "tls") + "\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := b.want("context", "show", "-o", "name"); got != filepath.Join(b.home, "tls")+"\n" {
		t.Errorf("name: %q", got)
	}
	dir := filepath.Join(b.home, ".config", "wasmatrix", "contexts")
	if err := os.WriteFile(filepath.Join(dir, "prod.yaml"), []byte("addresses: ['p:1']\ncluster: prod\ntls_dir: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := b.want("context", "list"); !strings.Contains(got, "*  default  dev") || !strings.Contains(got, "   prod     prod     p:1\n") {
		t.Errorf("list:\n%s", got)
	}
	code, stdout, _ := b.run("context", "show", "--context", "prod")
	if code == 0 || !strings.Contains(stdout, "subject      unusable: ") {
		t.Errorf("unusable: exit %d\n%s", code, stdout)
	}
}

func TestVersionAndDocs(t *testing.T) {
	b := newBench(t)
	if got := b.want("version"); got != "wasmatrix unknown\n" {
		t.Errorf("version: %q", got)
	}
	if got := b.want("docs", "error_code_no_leader"); !strings.HasPrefix(got, "NO_LEADER · exit 6\n") {
		t.Errorf("docs: %q", got)
	}
	if got := b.want("docs", "-o", "name"); strings.Count(got, "\n") != len(topics()) {
		t.Errorf("docs: %q", got)
	}
}

func TestNumbersForPeople(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "2 KiB", 1 << 20: "1 MiB", 3 << 19: "1.5 MiB", 64 << 20: "64 MiB", 4 << 30: "4 GiB", 1 << 40: "1 TiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-1: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 90 * time.Minute: "1h30m", 50 * time.Hour: "2d"} {
		if got := humanDuration(d); got != want {
			t.Errorf("humanDuration(%s) = %q, want %q", d, got, want)
		}
	}
	if took(41*time.Millisecond) != "41 ms" || took(1200*time.Millisecond) != "1.2 s" {
		t.Error("took")
	}
	if got := printable([]byte(strings.Repeat("ä", 80))); len([]rune(got)) != 60 {
		t.Errorf("printable: %q", got)
	}
}
