package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestEveryErrorCodeHasAnExitCodeAndAnExplanation(t *testing.T) {
	want := map[string]int{
		"INVALID_REQUEST": 2, "INSTANCE_NOT_FOUND": 3, "PROVIDER_NOT_FOUND": 3, "MODULE_NOT_FOUND": 3, "NODE_NOT_FOUND": 3,
		"PERMISSION_DENIED": 5, "RESOURCE_EXHAUSTED": 7, "PROVIDER_UNAVAILABLE": 7, "COMMUNICATION_FAILURE": 6, "TIMEOUT": 7,
		"CONFLICT": 4, "NO_LEADER": 6, "INTERNAL_ERROR": 1,
	}
	explained := map[string]bool{}
	for _, topic := range topics() {
		explained[topic.name] = topic.means != "" && topic.causes != "" && topic.next != ""
	}
	values := pb.ErrorCode(0).Descriptor().Values()
	for i := 1; i < values.Len(); i++ {
		name := shortName(string(values.Get(i).Name()), "ERROR_CODE_")
		code, known := want[name]
		if !known {
			t.Errorf("this test does not know %s", name)
		}
		if got := exitOfCode(name); got != code {
			t.Errorf("%s exits with %d, want %d", name, got, code)
		}
		if !explained[name] {
			t.Errorf("wasmatrix docs %s explains nothing", name)
		}
	}
}

func TestOtherFailuresHaveTheirExitCodes(t *testing.T) {
	ambiguous := apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "several").With("matches", "a, b")
	for name, tt := range map[string]struct {
		err  error
		want int
	}{
		"none":               {nil, 0},
		"usage":              {usagef("x"), 2},
		"wrapped usage":      {fmt.Errorf("run: %w", Usage(errors.New("x"))), 2},
		"ambiguous":          {ambiguous, 3},
		"workload failed":    {fail(exitFailed, verdict("x")), 8},
		"silent":             {ExitWith(9), 9},
		"Ctrl-C":             {fmt.Errorf("run: %w", context.Canceled), 130},
		"anything else":      {errors.New("disk full"), 1},
		"deadline":           {context.DeadlineExceeded, 7},
		"expired identity":   {fmt.Errorf("context dev: %w: x", identity.ErrExpired), 5},
		"identity elsewhere": {fmt.Errorf("context dev: %w: x", identity.ErrWrongCluster), 5},
	} {
		var out locked
		if tt.err == nil {
			if got := exitCode(nil); got != 0 {
				t.Errorf("%s: exit %d", name, got)
			}
			continue
		}
		if got := report(t.Context(), Env{Stderr: &out}, formTable, tt.err); got != tt.want {
			t.Errorf("%s: exit %d, want %d", name, got, tt.want)
		}
		if silent := name == "silent"; (out.String() == "") != silent {
			t.Errorf("%s: printed %q", name, out.String())
		}
	}
}

func TestErrorHasFourParts(t *testing.T) {
	b := newBench(t)
	b.fake.fail["ListNodes"] = apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the node is busy").
		With("n1", "READY").With("longer", "2 instances").Next("wasmatrix node list")
	code, stdout, stderr := b.run("node", "list", "--correlation-id", "my-id")
	want := `error: the node is busy
  longer  2 instances
  n1      READY
try:  wasmatrix node list
code CONFLICT · exit 4 · x-correlation-id my-id
`
	if code != 4 || stdout != "" || stderr != want {
		t.Errorf("exit %d, stdout %q, stderr\n%s\nwant\n%s", code, stdout, stderr, want)
	}

	code, _, stderr = b.run("node", "list", "-o", "json")
	var shaped struct {
		Code, Message, CorrelationID, NextStep, Timestamp string
		Details                                           map[string]string
	}
	if err := json.Unmarshal([]byte(stderr), &shaped); err != nil {
		t.Fatalf("%v in %s", err, stderr)
	}
	if code != 4 || shaped.Code != "ERROR_CODE_CONFLICT" || shaped.Details["n1"] != "READY" || shaped.CorrelationID == "" || shaped.Timestamp == "" {
		t.Errorf("exit %d, %+v", code, shaped)
	}
}

func TestWrongCommandLinesAreUsageErrors(t *testing.T) {
	b := newBench(t)
	text := b.file("text.wasm", "hello there")
	component := b.file("component.wasm", "\x00asm\x0d\x00\x01\x00")
	for _, tt := range []struct {
		args []string
		want string // on standard error
	}{
		{[]string{"instnce", "list"}, "unknown command \"instnce\" for \"wasmatrix\"\ntry:  wasmatrix instance\n"},
		{[]string{"instance", "lst"}, "unknown command \"lst\" for \"wasmatrix instance\"\ntry:  wasmatrix instance get, or wasmatrix instance list\n"},
		{[]string{"instance", "lst", "--nde", "x"}, "unknown command \"lst\""},
		{[]string{"cluster", "snapshot", "sav"}, "try:  wasmatrix cluster snapshot save\n"},
		{[]string{"instance", "list", "--nde", "x"}, "unknown flag: --nde\ntry:  --node\n"},
		{[]string{"ps", "--outptu", "x"}, "try:  --output\n"},
		{[]string{"instance", "get"}, "try:  wasmatrix instance get NAME [flags]\n"},
		{[]string{"status", "now"}, "wasmatrix status takes no argument, got \"now\"\n"},
		{[]string{"ps", "-o", "xml"}, "want table, json, yaml or name"},
		{[]string{"ps", "--state", "RUNN"}, "unknown state \"RUNN\""},
		{[]string{"ps", "--correlation-id", "a b"}, "--correlation-id \"a b\""},
		{[]string{"ps", "--timeout", "-1s"}, "negative"},
		{[]string{"ps", "--context", "nowhere"}, "try:  wasmatrix context list shows"},
		{[]string{"events", "--kind", "INSTANCE_CRASHD"}, "try:  --kind INSTANCE_CRASHED\n"},
		{[]string{"events", "--for", "pod/x"}, "want instance, workload, node or provider"},
		{[]string{"wait", "instance/x"}, "say what to wait for: --for STATE"},
		{[]string{"wait", "instance/x", "--for", "HAPPY"}, "an instance is never \"HAPPY\""},
		{[]string{"wait", "pod/x", "--for", "RUNNING"}, "unknown kind \"pod\""},
		{[]string{"run"}, "want one module or manifest"},
		{[]string{"run", "a.wasm", "b.wasm"}, "want one module or manifest"},
		{[]string{"run", b.home + "/tex.wasm"}, "no such file\ntry:  " + text + "\n"},
		{[]string{"run", b.home}, "is a directory"},
		{[]string{"run", text}, "is not a WebAssembly module: it begins with \"hello th\""},
		{[]string{"run", component}, "not a core WebAssembly module"},
		{[]string{"run", "sha256:" + strings.Repeat("0", 64)}, "give one with --name"},
		{[]string{"run", text, "--env", "A"}, "--env \"A\": want KEY=VALUE"},
		{[]string{"run", text, "--allow", "kv:raed"}, "wasmatrix docs permissions"},
		{[]string{"run", text, "--memory", "32MB"}, "--memory: want a number with KiB"},
		{[]string{"run", text, "--memory", "1KiB"}, "64KiB to 4GiB"},
		{[]string{"run", text, "--memory", "5GiB"}, "64KiB to 4GiB"},
		{[]string{"run", text, "--name", "Not_A_Name"}, "--name: want up to 53 lower-case letters"},
		{[]string{"run", text, "--timeout", "-1s"}, "--timeout: "},
		{[]string{"run", text, "--replicas", "1001"}, "--replicas: "},
		{[]string{"grant", "hello", "kv"}, "wasmatrix docs permissions"},
		{[]string{"revoke", "hello"}, "name the permissions to take"},
		{[]string{"apply"}, "name a manifest: -f FILE"},
		{[]string{"status", "--watch", "--check"}, "do not go together"},
		{[]string{"provider", "register", "cache"}, "a --type"},
		{[]string{"kv", "put", "k", "v", "--ttl", "1us"}, "at least 1ms"},
		{[]string{"docs", "NO_LEADR"}, "try:  wasmatrix docs NO_LEADER\n"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			code, stdout, stderr := b.run(tt.args...)
			if code != 2 || stdout != "" || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit %d, stdout %q, stderr\n%s\nwant exit 2 and %q", code, stdout, stderr, tt.want)
			}
			if !strings.HasPrefix(stderr, "error: ") || !strings.HasSuffix(stderr, "code INVALID_REQUEST · exit 2\n") {
				t.Errorf("not in the form of an error:\n%s", stderr)
			}
		})
	}
}

func TestCommandsAddedLaterAreHardenedToo(t *testing.T) {
	env := Env{Stdin: strings.NewReader(""), Stdout: &locked{}, Stderr: &locked{}, Getenv: func(string) string { return "" }}
	root := New(env)
	group := &cobra.Command{Use: "extra", Short: "x"}
	group.AddCommand(&cobra.Command{Use: "leaf", RunE: func(*cobra.Command, []string) error { return ExitWith(9) }})
	root.AddCommand(group)
	for args, want := range map[string]int{"extra leaf": 9, "extra laef": 2, "extra": 0} {
		root.SetArgs(strings.Fields(args))
		if got := Execute(t.Context(), root, env); got != want {
			t.Errorf("%s: exit %d, want %d", args, got, want)
		}
	}
}

func TestNoContextSaysWhatToDo(t *testing.T) {
	b := newBench(t)
	b.home = t.TempDir()
	code, _, stderr := b.run("ps")
	if code != 2 || !strings.Contains(stderr, "try:  wasmatrix dev starts a cluster") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestUnreachableClusterExitsWith6(t *testing.T) {
	b := newBench(t)
	code, _, stderr := b.runIn(t.Context(), "ps", "--address", "127.0.0.1:1", "--timeout", "200ms")
	if code != 6 || !strings.Contains(stderr, "127.0.0.1:1  dial tcp") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestNearest(t *testing.T) {
	for word, want := range map[string]string{"replcas": "replicas", "Name": "name", "zzz": "", "capabilties": "capabilities", "": ""} {
		if got := nearest(word, []string{"name", "replicas", "capabilities"}); got != want {
			t.Errorf("nearest(%q) = %q, want %q", word, got, want)
		}
	}
}
