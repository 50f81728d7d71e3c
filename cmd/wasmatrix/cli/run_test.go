package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestRunWaitsUntilAllReplicasRun(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("kv", "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}
	b.fake.imports = []string{"wasi_snapshot_preview1 fd_write", "wasmatrix:kv/v1 get", "wasmatrix:kv/v1 set"}
	module := b.file("Hello_World.wasm", wasm)
	code, stdout, stderr := b.run("run", module, "--replicas", "2", "--allow", "kv:read", "--env", "A=b=c", "--arg", "x", "--label", "zone=a",
		"--restart", "never", "--max-retries", "-1", "--memory", "32MiB", "--timeout", "2s", "--concurrency", "4", "--node", "n1", "--runtime", "wasm", "--", "-top", "3")
	if code != 0 || stdout != "" {
		t.Fatalf("exit %d, stdout %q\n%s", code, stdout, stderr)
	}
	for _, want := range []string{
		"Hello_World.wasm sha256:", "imports wasmatrix:kv/v1 get (kv:read granted), wasmatrix:kv/v1 set (kv:write not granted)\n",
		" ✓ stored ", " ✓ hello-world-00001 n1 running", " ✓ hello-world-00002 n1 running", "\nlogs: wasmatrix logs hello-world -f\n",
	} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in\n%s", want, stderr)
		}
	}
	spec := request[*pb.StartInstanceRequest](b.fake).GetSpec()
	got := fmt.Sprint(spec.GetName(), spec.GetReplicas(), spec.GetEnv(), spec.GetArgs(), spec.GetPlacement().GetLabels(), spec.GetPlacement().GetNode(),
		spec.GetRestart().GetPolicy(), spec.GetRestart().GetMaxRetries(), spec.GetLimits().GetMemory(), spec.GetLimits().GetTimeout().AsDuration(),
		spec.GetLimits().GetConcurrency(), spec.GetRuntime(), spec.GetCapabilities()[0].GetProvider(), spec.GetCapabilities()[0].GetPermissions())
	want := fmt.Sprint("hello-world", 2, map[string]string{"A": "b=c"}, []string{"x", "-top", "3"}, map[string]string{"zone": "a"}, "n1",
		"never", -1, "32MiB", 2*time.Second, 4, "wasm", "kv", []string{"kv:read"})
	if got != want {
		t.Errorf("spec is\n%s\nwant\n%s", got, want)
	}
}

func TestRunPrintsInEveryForm(t *testing.T) {
	b := newBench(t)
	module := b.file("hello.wasm", wasm)
	if got := b.want("run", module, "-o", "name"); got != "hello-00001\n" {
		t.Errorf("name: %q", got)
	}
	if got := b.want("run", module, "-o", "json"); !strings.Contains(got, `"state": "INSTANCE_STATE_RUNNING"`) {
		t.Errorf("json does not have the final state:\n%s", got)
	}
	b.fake.becomes = func(*pb.Instance) {}
	if got := b.want("run", module, "--no-wait"); !strings.Contains(got, "PENDING") {
		t.Errorf("no-wait: %q", got)
	}
}

func TestRunOfAFailingWorkloadExitsWith8(t *testing.T) {
	b := newBench(t)
	b.fake.becomes = func(i *pb.Instance) {
		i.Status.State, i.Status.Attempt, i.Status.Message = pb.InstanceState_INSTANCE_STATE_FAILED, 3, "trap: unreachable\nstack"
	}
	code, _, stderr := b.run("run", b.file("hello.wasm", wasm))
	if code != 8 || !strings.Contains(stderr, "error: hello-00001 failed: trap: unreachable\n  hello-00001  FAILED on n1 after 3 attempts, trap: unreachable\ntry:  wasmatrix logs hello\nworkload failed · exit 8") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestRunOfWhatNoNodeTakesExitsWith9(t *testing.T) {
	b := newBench(t)
	b.tick = 3 * time.Second
	b.fake.becomes = func(i *pb.Instance) { i.Status.Message = "no node has label gpu" }
	code, _, stderr := b.run("run", b.file("hello.wasm", wasm))
	if code != 9 || !strings.Contains(stderr, "no node can take hello-00001: no node has label gpu") || !strings.Contains(stderr, "  n1  no room") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestRunOfACommandShowsItsOutputAndItsEnd(t *testing.T) {
	b := newBench(t)
	b.fake.kind = pb.ModuleKind_MODULE_KIND_COMMAND
	line := func(n int, stream pb.LogStream, text string) *pb.LogEntry {
		return &pb.LogEntry{InstanceId: "count-00001", NodeId: "n1", Stream: stream, Message: text, Time: timestamppb.New(epoch().Add(time.Duration(n) * time.Second))}
	}
	b.fake.becomes = func(i *pb.Instance) {
		i.Status.State = pb.InstanceState_INSTANCE_STATE_COMPLETED
		b.fake.logs = []*pb.LogEntry{line(1, pb.LogStream_LOG_STREAM_STDOUT, "3 the"), line(2, pb.LogStream_LOG_STREAM_STDERR, "warning"), line(2, pb.LogStream_LOG_STREAM_STDOUT, "3 the")}
	}
	b.in = "the words"
	code, stdout, stderr := b.run("run", b.file("count.wasm", wasm), "--stdin", "-")
	if code != 0 || stdout != "3 the\n3 the\n" || !strings.Contains(stderr, "\nwarning\n") || !strings.Contains(stderr, "✓ count-00001 n1 completed") {
		t.Errorf("exit %d, stdout %q, stderr\n%s", code, stdout, stderr)
	}
	if got := request[*pb.StartInstanceRequest](b.fake).GetSpec().GetStdin(); string(got) != "the words" {
		t.Errorf("stdin is %q", got)
	}

	b.fake.becomes = func(i *pb.Instance) {
		i.Status.State, i.Status.Reason, i.Status.ExitCode = pb.InstanceState_INSTANCE_STATE_FAILED, pb.ExitReason_EXIT_REASON_EXIT_CODE, 3
	}
	if code, _, stderr := b.run("run", b.file("count.wasm", wasm)); code != 8 || !strings.Contains(stderr, "failed: exit code 3") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestRunGivesUpAndSaysWhatItFound(t *testing.T) {
	b := newBench(t)
	b.fake.becomes = func(i *pb.Instance) { i.Status.State = pb.InstanceState_INSTANCE_STATE_PREPARING }
	code, _, stderr := b.run("run", b.file("hello.wasm", wasm), "--wait-timeout", "150ms")
	if code != 7 || !strings.Contains(stderr, "gave up waiting for hello to run after 150ms\n  found  1 PREPARING\n") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestCtrlCLeavesTheWorkloadAndSaysSo(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b.fake.becomes = func(i *pb.Instance) { i.Status.State = pb.InstanceState_INSTANCE_STATE_PREPARING }
	b.fake.seen = func(method string) {
		if method == "QueryInstance" {
			cancel()
		}
	}
	code, _, stderr := b.runIn(ctx, "run", b.file("hello.wasm", wasm))
	if code != 130 || !strings.Contains(stderr, "hello stays in the cluster; wasmatrix instance stop hello\n") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestManifestIsRunAndFlagsWin(t *testing.T) {
	b := newBench(t)
	b.file("hello.wasm", wasm)
	path := b.file("hello.yaml", `
name: hello
module: ./hello.wasm
replicas: 1
env: {A: "1", B: "2"}
restart: {policy: on-failure, max_retries: 5, backoff: 1s}
limits: {memory: 32MiB, timeout: 2s}
capabilities:
  - {provider: kv, permissions: ["kv:read"]}
`)
	b.want("run", path, "--replicas", "3", "--env", "B=3", "--name", "other")
	spec := request[*pb.StartInstanceRequest](b.fake).GetSpec()
	if spec.GetName() != "other" || spec.GetReplicas() != 3 || spec.GetEnv()["A"] != "1" || spec.GetEnv()["B"] != "3" || spec.GetRestart().GetMaxRetries() != 5 || !strings.HasPrefix(spec.GetModule(), "sha256:") {
		t.Errorf("spec is %v", spec)
	}
}

func TestApplyStartsWhatDoesNotRunAndReplacesOnlyWhenAsked(t *testing.T) {
	b := newBench(t)
	b.file("hello.wasm", wasm)
	manifest := func(replicas int, env string) string {
		return b.file("hello.yaml", fmt.Sprintf("name: hello\nmodule: hello.wasm\nreplicas: %d\nenv: {A: %q}\n", replicas, env))
	}
	b.want("apply", "-f", manifest(2, "1"))
	before := idsOf(b.fake.instances)
	if got := b.want("apply", "-f", manifest(2, "1")); got != "hello unchanged, 2 instances\n" {
		t.Errorf("unchanged: %q", got)
	}
	for _, replicas := range []int{1, 3} {
		code, _, stderr := b.run("apply", "-f", manifest(replicas, "1"))
		want := fmt.Sprintf("2 of its instances run already and the manifest wants %d\ntry:  wasmatrix apply --replace, which removes its 2 instances", replicas)
		if code != 4 || !strings.Contains(stderr, want) || !strings.Contains(stderr, "wasmatrix instance rm hello --force") {
			t.Errorf("%d replicas: exit %d\n%s", replicas, code, stderr)
		}
		if now := idsOf(b.fake.instances); !slices.Equal(now, before) {
			t.Errorf("%d replicas: %v after %v", replicas, now, before)
		}
	}
	b.want("apply", "-f", manifest(3, "1"), "--replace")
	after := idsOf(b.fake.instances)
	if len(after) != 3 || slices.Contains(after, before[0]) {
		t.Errorf("three replicas: %v after %v", after, before)
	}
	code, _, stderr := b.run("apply", "-f", manifest(3, "2"))
	if code != 4 || !strings.Contains(stderr, "runs with another spec") {
		t.Errorf("another spec: exit %d\n%s", code, stderr)
	}
	b.want("apply", "-f", manifest(1, "2"), "--replace")
	if got := idsOf(b.fake.instances); len(got) != 1 || slices.Contains(after, got[0]) {
		t.Errorf("replaced: %v after %v", got, after)
	}
	if got := b.want("delete", "-f", manifest(1, "2")); !strings.HasSuffix(got, " removed\n") || len(b.fake.instances) != 0 {
		t.Errorf("delete: %q", got)
	}
	if got := b.want("delete", "-f", manifest(1, "2")); got != "hello has no instances\n" {
		t.Errorf("delete again: %q", got)
	}
}

func TestValidateNeedsNoCluster(t *testing.T) {
	b := newBench(t)
	b.file("hello.wasm", wasm)
	path := b.file("hello.yaml", "name: hello\nmodule: hello.wasm\nreplicas: 2\n")
	code, stdout, stderr := b.run("validate", "-f", path, "--address", "127.0.0.1:1")
	if code != 0 || stdout != path+" is valid: hello, 2 replicas\n" {
		t.Errorf("exit %d, %q\n%s", code, stdout, stderr)
	}
	b.in = "name: hello\nmodule: " + b.home + "/hello.wasm\n"
	if got := b.want("validate", "-f", "-"); got != "- is valid: hello, 1 replica\n" {
		t.Errorf("from standard input: %q", got)
	}
}

func TestManifestMistakesAreShownWhereTheyAre(t *testing.T) {
	b := newBench(t)
	for name, tt := range map[string]struct{ text, want string }{
		"a typo": {
			"name: hello\nmodule: x.wasm\nreplcas: 2\n",
			"m.yaml:3:1 unknown field \"replcas\"; did you mean \"replicas\"?\n   3 | replcas: 2\n   3 | ^\n",
		},
		"a nested typo": {
			"name: hello\nmodule: x.wasm\nlimits:\n  memroy: 1MiB\n",
			"m.yaml:4:3 unknown field \"memroy\"; did you mean \"memory\"?\n   4 |   memroy: 1MiB\n   4 | ..^\n",
		},
		"nothing alike":    {"name: hello\nmodule: x.wasm\nzzz: 2\n", "unknown field \"zzz\"; known are name, module, "},
		"a broken rule":    {"name: Hello\nmodule: x.wasm\n", "m.yaml:1:7 name: does not match regex pattern"},
		"a wrong type":     {"name: hello\nmodule: x.wasm\nreplicas: many\n", "m.yaml:3:11 "},
		"no YAML":          {"name: hello\nmodule: [x\nreplicas: 2\n", "m.yaml:"},
		"tabs":             {"name: hello\n\tmodule: x\n", "m.yaml:2:2 found a tab character that violates indentation\n   2 | \tmodule: x\n   2 | .^"},
		"empty":            {"", "m.yaml is empty"},
		"two documents":    {"name: a\nmodule: x\n---\nname: b\n", "m.yaml:3 holds more than one document"},
		"a bad permission": {"name: a\nmodule: x\ncapabilities: [{provider: kv, permissions: [\"kv:raed\"]}]\n", "capabilities[0].permissions"},
		"oci":              {"name: a\nmodule: oci://x\n", "oci:// is not supported yet"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := b.run("validate", "-f", b.file("m.yaml", tt.text))
			if code != 2 || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit %d\n%s\nwant %q", code, stderr, tt.want)
			}
		})
	}
}

func TestNameFrom(t *testing.T) {
	for path, want := range map[string]string{
		"hello.wasm": "hello", "/a/b/My App_2.wasm": "my-app-2", "--x--.wasm": "x", strings.Repeat("a", 60) + ".wasm": strings.Repeat("a", 53),
		strings.Repeat("a", 52) + "-b.wasm": strings.Repeat("a", 52),
	} {
		if got := nameFrom(path); got != want {
			t.Errorf("nameFrom(%q) = %q, want %q", path, got, want)
		}
	}
}

func TestChooseProviders(t *testing.T) {
	kv, kv2 := newProvider("kv", "kv", 0), newProvider("kv2", "kv", 0)
	bus := newProvider("bus", "messaging", 0)
	for _, tt := range []struct {
		name        string
		known       []*pb.Provider
		permissions []string
		named       []string
		want        string
	}{
		{name: "the only one of its type", known: []*pb.Provider{kv, bus}, permissions: []string{"kv:read", "msg:publish:a", "kv:write"}, want: "kv[kv:read kv:write] bus[msg:publish:a] "},
		{name: "named", known: []*pb.Provider{kv, kv2}, permissions: []string{"kv:read"}, named: []string{"kv2"}, want: "kv2[kv:read] "},
		{name: "named for one type only", known: []*pb.Provider{kv, kv2, bus}, permissions: []string{"kv:read", "msg:publish"}, named: []string{"kv2"}, want: "kv2[kv:read] bus[msg:publish] "},
		{name: "ambiguous", known: []*pb.Provider{kv, kv2}, permissions: []string{"kv:read"}, want: "kv:read could be meant for any of the providers kv, kv2: choose with --provider"},
		{name: "none of the type", known: []*pb.Provider{kv}, permissions: []string{"http:request"}, want: "http:request is served by a provider of type http, and there is none"},
		{name: "unknown name", known: []*pb.Provider{kv}, permissions: []string{"kv:read"}, named: []string{"x"}, want: `no provider has the id "x"`},
		{name: "named in vain", known: []*pb.Provider{kv, bus}, permissions: []string{"kv:read"}, named: []string{"bus"}, want: "--provider bus serves none of the permissions kv:read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			grants, err := chooseProviders(tt.known, tt.permissions, tt.named)
			got := ""
			for _, g := range grants {
				got += fmt.Sprintf("%s%v ", g.GetProvider(), g.GetPermissions())
			}
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
