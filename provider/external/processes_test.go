package external_test

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// example is one of the examples, as a command without its arguments.
type example struct {
	command []string
	seconds func(d time.Duration) string // how it is told a duration
}

// process is a running example.
type process struct {
	cmd     *exec.Cmd
	address string
	ended   chan error
}

func (e example) start(t *testing.T, address string, delay time.Duration) *process {
	t.Helper()
	args := slices.Concat(e.command[1:], []string{"--listen", address, "--delay", e.seconds(delay)})
	p := &process{cmd: exec.Command(e.command[0], args...), ended: make(chan error, 1)}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%v said nothing: %v", p.cmd.Args, err)
	}
	_, p.address, _ = strings.Cut(strings.TrimSpace(line), "listening at ")
	go func() { p.ended <- p.cmd.Wait() }()
	return p
}

func (p *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (p *process) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-p.ended:
		return err
	case <-time.After(patience):
		t.Fatalf("%v does not end", p.cmd.Args)
		return nil
	}
}

func TestExampleInGo(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "provider-go")
	build := exec.Command("go", "build", "-o", binary, "github.com/wasmatrix/wasmatrix/examples/provider-go")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	exercise(t, example{command: []string{binary}, seconds: time.Duration.String})
}

func TestExampleInPython(t *testing.T) {
	t.Parallel()
	const python = "/usr/bin/python3"
	if err := exec.Command(python, "-c", "import grpc, grpc_tools").Run(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s with grpcio and grpcio-tools is needed: %v", python, err)
		}
		t.Skipf("%s with grpcio and grpcio-tools is not here: %v", python, err)
	}
	exercise(t, example{
		command: []string{python, "../../examples/provider-python/inventory.py"},
		seconds: func(d time.Duration) string { return strings.TrimSuffix(d.String(), "s") },
	})
}

// exercise takes an example through its life.
func exercise(t *testing.T, e example) {
	n := newNode(t)
	p := e.start(t, "127.0.0.1:0", 0)
	n.open(t, p.address)
	t.Run("calls", func(t *testing.T) { callsOf(t, n, p.address) })

	p.signal(t, syscall.SIGTERM)
	if err := p.wait(t); err != nil {
		t.Fatalf("an idle one ends with %v", err)
	}
	within(t, "it is missed", func() bool {
		_, err := n.call(t.Context(), "all", "stock", `{"item":"bolt"}`)
		return errors.Is(err, provider.ErrUnavailable)
	})
	p = e.start(t, p.address, time.Second)
	n.awaitServing(t)
	t.Run("drained under calls", func(t *testing.T) { drained(t, n, p) })

	p = e.start(t, p.address, 9*time.Second)
	n.awaitOffered(t)
	t.Run("killed during a call", func(t *testing.T) { killed(t, n, p) })

	e.start(t, p.address, 0)
	n.awaitServing(t)
}

// awaitServing waits until calls are carried out.
func (n *node) awaitServing(t *testing.T) {
	t.Helper()
	within(t, "it serves", func() bool {
		_, err := n.call(t.Context(), "all", "stock", `{"item":"bolt"}`)
		return err == nil
	})
}

// awaitOffered waits until calls would be made, without making one.
func (n *node) awaitOffered(t *testing.T) {
	t.Helper()
	within(t, "it would serve", func() bool {
		_, err := n.call(t.Context(), "all", "no-such-operation", "")
		return errors.Is(err, provider.ErrInvalid)
	})
}

func callsOf(t *testing.T, n *node, address string) {
	for _, c := range []struct {
		instance, operation, payload, want string
		sentinel                           error
	}{
		{"reader", "stock", `{"item":"bolt"}`, `"available":100`, nil},
		{"all", "reserve", `{"request_id":"r1","item":"bolt","quantity":3}`, `"available":97`, nil},
		{"all", "reserve", `{"request_id":"r1","item":"bolt","quantity":3}`, `"available":97`, nil},
		{"all", "stock", `{"item":"bolt"}`, `"available":97`, nil},
		{"reader", "reserve", `{"request_id":"r2","item":"bolt","quantity":3}`, "provider:shop:reserve", provider.ErrDenied},
		{"stranger", "stock", `{"item":"bolt"}`, "provider:shop:stock", provider.ErrDenied},
		{"all", "destroy", `{}`, "it offers reserve, stock", provider.ErrInvalid},
		{"all", "reserve", `{"request_id":"r3","item":"bolt","quantity":98}`, "only 97", provider.ErrConflict},
		{"all", "reserve", `{"item":"bolt"}`, "request_id", provider.ErrInvalid},
		{"all", "stock", `nonsense`, "no JSON", provider.ErrInvalid},
		{"all", "stock", `{"item":"bolt"}`, `"available":97`, nil},
	} {
		got, err := n.call(t.Context(), c.instance, c.operation, c.payload)
		if err != nil {
			got = err.Error()
		}
		if !errors.Is(err, c.sentinel) || !strings.Contains(strings.ReplaceAll(got, ": 9", ":9"), c.want) && !strings.Contains(strings.ReplaceAll(got, ": 1", ":1"), c.want) {
			t.Errorf("%s %s %s: %q, %v; want %q, %v", c.instance, c.operation, c.payload, got, err, c.want, c.sentinel)
		}
	}
	// It keeps the newest generation itself: this one has seen 3 of "all".
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	for generation, want := range map[uint64]codes.Code{2: codes.PermissionDenied, 3: codes.OK} {
		_, err := pb.NewProviderServiceClient(conn).Invoke(t.Context(), &pb.ProviderServiceInvokeRequest{
			Operation: "stock", Payload: []byte(`{}`), InstanceId: "all", Generation: generation, CreatedIndex: 7,
		})
		if status.Code(err) != want {
			t.Errorf("generation %d: %v, want %v", generation, err, want)
		}
	}
}

// drained: what is under way when SIGTERM comes finishes, later calls are refused at once.
func drained(t *testing.T, n *node, p *process) {
	var wg sync.WaitGroup
	started := make(chan struct{}, 20)
	for range 20 {
		wg.Go(func() {
			started <- struct{}{}
			if _, err := n.call(t.Context(), "all", "stock", `{"item":"bolt"}`); err != nil {
				t.Errorf("a call under way: %v", err)
			}
		})
	}
	for range 20 {
		<-started
	}
	sent := time.NewTimer(300 * time.Millisecond) // of the second that they take
	<-sent.C
	p.signal(t, syscall.SIGTERM)
	within(t, "new calls are refused", func() bool {
		_, err := n.call(t.Context(), "all", "no-such-operation", "")
		return errors.Is(err, provider.ErrUnavailable)
	})
	wg.Wait()
	if err := p.wait(t); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// killed: nobody knows what became of the call.
func killed(t *testing.T, n *node, p *process) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		_, err := n.call(ctx, "all", "stock", `{"item":"bolt"}`)
		result <- err
	}()
	sent := time.NewTimer(300 * time.Millisecond) // of the nine seconds that it takes
	<-sent.C
	p.signal(t, syscall.SIGKILL)
	_ = p.wait(t)
	err := <-result
	if !errors.Is(err, provider.ErrCommunication) || outcome(err) != provider.OutcomeUnknown {
		t.Errorf("the call that was under way: %v, outcome %q", err, outcome(err))
	}
	within(t, "calls are refused", func() bool {
		_, err := n.call(t.Context(), "all", "stock", "{}")
		return errors.Is(err, provider.ErrUnavailable)
	})
}
