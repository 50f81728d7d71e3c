package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

var (
	unreachable = []byte{0x00}
	// growUntilRefused asks for a megabyte again and again, and traps when it gets none.
	growUntilRefused = runtimetest.Loop(runtimetest.I32Const(16), []byte{0x40, 0x00}, runtimetest.I32Const(-1), []byte{0x46},
		runtimetest.If(unreachable), runtimetest.Br(0))
)

// TestHostileWorkloads gives the cluster what it must refuse or survive. Each
// is a clear error or event and an exit code, and disturbs nothing else.
func TestHostileWorkloads(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 1})
	c.RunHello("bystander", "")
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	header := []byte{0, 'a', 's', 'm', 1, 0, 0, 0}
	huge := append(bytes.Clone(header), 0)
	huge = binary.AppendUvarint(huge, 65<<20)
	huge = append(huge, make([]byte, 65<<20)...)
	hello := filepath.Join(c.Guests, "hello.wasm")
	for _, tc := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"no such file", []string{"run", filepath.Join(dir, "nothing.wasm")}, 2, []string{"nothing.wasm"}},
		{"not wasm", []string{"run", write("bad.wasm", []byte("#!/bin/sh\n"))}, 2, []string{"INVALID_REQUEST"}},
		{"0 bytes", []string{"run", write("empty.wasm", nil)}, 2, []string{"empty"}},
		{"truncated", []string{"run", write("cut.wasm", append(bytes.Clone(header), 1, 0x7f, 1))}, 2, []string{"INVALID_REQUEST"}},
		{"component", []string{"run", write("component.wasm", []byte{0, 'a', 's', 'm', 0x0d, 0, 1, 0})}, 2, []string{"component"}},
		{"too large", []string{"run", write("huge.wasm", huge)}, 2, []string{"64 MiB"}},
		{"unknown import", []string{"run", write("import.wasm", runtimetest.Caller("wasi_snapshot_preview2", "get"))}, 2, []string{"wasi_snapshot_preview2"}},
		{"missing permission", []string{"run", hello, "--name", "denied"}, 5, []string{"wasmatrix:kv/v1", "--allow kv:read"}},
		{"manifest with a typo", []string{"apply", "-f", write("typo.yaml", []byte("name: hello\nmodul: sha256:00\n"))}, 2, []string{"modul", "module"}},
		{"unknown flag", []string{"run", hello, "--alow", "kv:read"}, 2, []string{"--alow"}},
		{"unknown command", []string{"instance", "lst"}, 2, []string{"list"}},
		{"unknown instance", []string{"instance", "get", "nobody"}, 3, []string{"INSTANCE_NOT_FOUND"}},
		{"traps at start", []string{"run", write("trap.wasm", runtimetest.Initializer(unreachable)), "--name", "trap", "--restart", "never"}, 8, []string{"unreachable"}},
		{"loops for ever at start", []string{"run", write("loop.wasm", runtimetest.Initializer(runtimetest.Loop(runtimetest.Br(0)))), "--name", "loop", "--timeout", "300ms", "--restart", "never"}, 8, []string{"time limit"}},
		{"allocates past its limit", []string{"run", write("grow.wasm", runtimetest.Initializer(growUntilRefused)), "--name", "grow", "--memory", "1MiB", "--restart", "never"}, 8, []string{"memory"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out := c.CLI(tc.args...)
			if out.Code != tc.code {
				t.Errorf("exit code %d, want %d", out.Code, tc.code)
			}
			for _, want := range tc.says {
				if !strings.Contains(out.Stderr, want) {
					t.Errorf("standard error does not say %q", want)
				}
			}
			if t.Failed() {
				t.Logf("stdout:\n%s\nstderr:\n%s", out.Stdout, out.Stderr)
			}
		})
	}
	invoke(t, c, "bystander", "Ada", "hello, Ada: visit 1\n")
}

// TestCommandGuest runs a WASI command with standard input and arguments.
func TestCommandGuest(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 1})
	out := c.CLIWithInput("the fox and the dog and the owl", "run", filepath.Join(c.Guests, "wordcount.wasm"), "--stdin", "-", "--", "-top", "2")
	if out.Code != 0 || out.Stdout != "     3 the\n     2 and\n" {
		t.Fatalf("wordcount: %+v", out)
	}
	out = c.CLI("run", filepath.Join(c.Guests, "wordcount.wasm"), "--name", "usage", "--restart", "never", "--", "-no-such-flag")
	if out.Code != 8 {
		t.Fatalf("a command that fails: exit code %d, want 8\n%s", out.Code, out.Stderr)
	}
}

// TestCorrelation follows one id from the call through the guest's log and the events.
func TestCorrelation(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 2})
	const id = "test-correlation-0001"
	run := c.CLI("run", filepath.Join(c.Guests, "hello.wasm"), "--name", "hello", "--node", "n2", "--allow", "kv:read", "--allow", "kv:write", "--correlation-id", id)
	if run.Code != 0 {
		t.Fatalf("run: %+v", run)
	}
	if out := c.CLI("events", "-o", "json"); !strings.Contains(out.Stdout, id) {
		t.Errorf("the events do not carry the correlation id:\n%s", out.Stdout)
	}
	if out := c.CLI("invoke", "hello", "-d", "Ada", "--correlation-id", id+"-invoke"); out.Code != 0 || out.Stdout != "hello, Ada: visit 1\n" {
		t.Fatalf("invoke: %+v", out)
	}
	logs := c.CLI("logs", "hello", "-o", "json")
	if !strings.Contains(logs.Stdout, id+"-invoke") {
		t.Errorf("the guest's log does not carry the correlation id:\n%s", logs.Stdout)
	}
	if out := c.CLI("instance", "get", "nobody", "--correlation-id", id+"-error"); !strings.Contains(out.Stderr, id+"-error") {
		t.Errorf("the error does not carry the correlation id:\n%s", out.Stderr)
	}
}

// TestRevocation takes a permission away from a running instance.
func TestRevocation(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 2})
	c.RunHello("hello", "n2")
	invoke(t, c, "hello", "Ada", "hello, Ada: visit 1\n")
	if out := c.CLI("revoke", "hello", "kv:write"); out.Code != 0 {
		t.Fatalf("revoke: %+v", out)
	}
	ctx := c.Context(5 * time.Second)
	for {
		_, err := c.Client.Invoke(ctx, &pb.InvokeRequest{Target: "hello", Payload: []byte("Ada")})
		if err != nil {
			if !strings.Contains(err.Error(), "kv:write") {
				t.Fatalf("a revoked permission: %v, want kv:write named", err)
			}
			break
		}
	}
	if out := c.CLI("grant", "hello", "kv:write"); out.Code != 0 {
		t.Fatalf("grant: %+v", out)
	}
	if out := c.CLI("instance", "get", "hello", "-o", "json"); !json.Valid([]byte(out.Stdout)) || !strings.Contains(out.Stdout, "RUNNING") {
		t.Fatalf("the instance did not survive: %+v", out)
	}
}
