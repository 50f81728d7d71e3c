package cli

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// threeInstances are two of hello and one of other.
func threeInstances(f *fake) {
	first := f.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_RUNNING)
	first.Status.Runtime, first.Status.Isolation = "microvm", "emulated"
	crashed := f.add("hello-bbbbb", pb.InstanceState_INSTANCE_STATE_CRASHED)
	crashed.Status.Runtime, crashed.Status.Isolation = "wasm", "sandbox"
	crashed.Status.CrashCount, crashed.Status.Message = 3, "trap: unreachable\nstack"
	crashed.Status.NextRetryAt = timestamppb.New(epoch().Add(95 * time.Second))
	pending := f.add("other-ccccc", pb.InstanceState_INSTANCE_STATE_PENDING)
	pending.Placement = nil
}

func TestReasonOfACrash(t *testing.T) {
	b := newBench(t)
	st := b.fake.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_CRASHED).Status
	st.CrashCount, st.Reason = 1, pb.ExitReason_EXIT_REASON_TRAP
	if got := b.want("instance", "get", "hello-aaaaa"); !strings.Contains(got, "1, last: TRAP\n") {
		t.Errorf("crashed:\n%s", got)
	}
	st.State, st.Reason = pb.InstanceState_INSTANCE_STATE_RUNNING, pb.ExitReason_EXIT_REASON_UNSPECIFIED
	if got := b.want("instance", "get", "hello-aaaaa"); !strings.Contains(got, "1, why: wasmatrix instance events hello-aaaaa\n") {
		t.Errorf("running again:\n%s", got)
	}
}

func TestListInEveryForm(t *testing.T) {
	b := newBench(t)
	if got := b.want("ps"); got != "no instances\n" {
		t.Errorf("empty: %q", got)
	}
	threeInstances(b.fake)
	want := `ID           STATE    NODE  RUNTIME             CRASHES  AGE    MESSAGE
hello-aaaaa  RUNNING  n1    microvm (emulated)  0        1m30s
hello-bbbbb  CRASHED  n1    wasm                3        1m30s  trap: unreachable
other-ccccc  PENDING  -     -                   0        1m30s
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
NODE  VERDICT  RUNTIME             REASONS
n1    no       -                   no room: 64 MiB of 64 MiB taken
n2    best     microvm (hardware)  load 0 %
`
	if got := b.want("explain", "other-ccccc"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
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
	b.fake.nodes[0].Info.Runtimes = []string{"microvm", "wasm"}
	if got := b.want("node", "list"); !strings.Contains(got, "  microvm, wasm  ") {
		t.Errorf("nodes whose agents tell names only:\n%s", got)
	}
	b.fake.nodes[0].Info.RuntimeInfo = []*pb.RuntimeInfo{
		{Name: "microvm", Isolation: "emulated", Accelerator: "tcg"}, {Name: "wasm", Isolation: "sandbox", IsDefault: true},
	}
	if got := b.want("node", "list"); !strings.Contains(got, "  wasm, microvm (emulated)  ") {
		t.Errorf("nodes:\n%s", got)
	}
	if code, stdout, stderr := b.run("node", "drain", "n3"); code != 0 || stdout != "n3 drains\n" || !strings.Contains(stderr, "✓ n3 has no instances") {
		t.Errorf("drain: exit %d, %q\n%s", code, stdout, stderr)
	}
	if got := b.want("node", "undrain", "n3"); got != "n3 takes work again\n" {
		t.Errorf("undrain: %q", got)
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
