package kv_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// process is a server of a test's own, which it may kill and start again.
type process struct {
	t       testing.TB
	binary  string
	args    []string
	log     string
	address string
	ready   func(ctx context.Context, address string) error
	cmd     *exec.Cmd
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (p *process) start() {
	p.t.Helper()
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer out.Close()
	p.cmd = exec.Command(p.binary, p.args...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		err := p.ready(ctx, p.address)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(p.log)
			p.t.Fatalf("%s is not ready: %v\n%s", p.binary, err, log)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// signal sends one signal to the server.
func (p *process) signal(sig syscall.Signal) {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("signal %s: %v", sig, err)
	}
}

// kill ends the server as a power failure of its process would.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	_ = p.cmd.Wait()
}

func answers(request, want string) func(context.Context, string) error {
	return func(ctx context.Context, address string) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write([]byte(request)); err != nil {
			return err
		}
		buf := make([]byte, 512)
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		if got := string(buf[:n]); !strings.HasPrefix(got, want) {
			return fmt.Errorf("answered %q", got)
		}
		return nil
	}
}

// redisServer starts a Redis server that has synced every write it acknowledged.
func redisServer(t testing.TB, more ...string) *process {
	t.Helper()
	dir, address := t.TempDir(), freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	p := &process{
		t: t, binary: providertest.Program(t, "redis-server"), address: address, log: filepath.Join(dir, "log"),
		args: append([]string{
			"--bind", "127.0.0.1", "--port", port, "--dir", dir, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
		}, more...),
		ready: answers("PING\r\n", greeting(more)),
	}
	p.start()
	t.Cleanup(p.kill)
	return p
}

func redisClient(t testing.TB, p *process) *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: p.address, DisableIdentity: true})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// natsServer starts a NATS server with JetStream and the given lines of configuration.
func natsServer(t testing.TB, config ...string) *process {
	t.Helper()
	dir, address := t.TempDir(), freeAddress(t)
	file := filepath.Join(dir, "nats.conf")
	lines := append([]string{fmt.Sprintf("listen: %q", address), fmt.Sprintf("jetstream { store_dir: %q }", dir)}, config...)
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &process{
		t: t, binary: providertest.Program(t, "nats-server"), address: address, log: filepath.Join(dir, "log"),
		args: []string{"-c", file}, ready: answers("", "INFO "),
	}
	p.start()
	t.Cleanup(p.kill)
	return p
}

// greeting is how a Redis server answers a ping.
func greeting(args []string) string {
	if slices.Contains(args, "--requirepass") {
		return "-NOAUTH"
	}
	return "+PONG"
}
