package cluster

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/identity"
)

// openStreams listens as peer id and answers every connection with its id.
func openStreams(t *testing.T, l *lab, id string, known func(string) string) *streams {
	t.Helper()
	layer, err := l.identity(identity.Subject{Kind: identity.Node, Name: id, Role: identity.RoleServer}).StreamLayer("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &streams{StreamLayer: layer, known: known, open: map[*trackedConn]struct{}{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.WriteString(conn, id)
				_, _ = io.Copy(io.Discard, conn)
			}()
		}
	}()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return s
}

func nobody(string) string { return "" }

func TestConnectionIsBoundToThePeerThatIsMeant(t *testing.T) {
	l := newLab(t)
	a, b := openStreams(t, l, "n1", nobody), openStreams(t, l, "n2", nobody)
	at := b.Addr().String()
	conn, err := a.Dial(named("n2", at), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 2)
	if _, err := io.ReadFull(conn, buffer); err != nil || string(buffer) != "n2" {
		t.Errorf("read %q, %v", buffer, err)
	}
	if _, err := a.Dial(named("n3", at), time.Second); err == nil || !strings.Contains(err.Error(), `"n2" is there`) {
		t.Errorf("dialled n3, found n2: %v", err)
	}
	if _, err := a.Dial(raft.ServerAddress(at), time.Second); err == nil {
		t.Error("dialled without saying who is meant")
	}
	worker, err := l.identity(identity.Subject{Kind: identity.Node, Name: "n2", Role: identity.RoleWorker}).StreamLayer("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = worker.Close() })
	go func() {
		if conn, err := worker.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
	}()
	if _, err := a.Dial(named("n2", worker.Addr().String()), time.Second); err == nil {
		t.Error("a worker was taken for a peer")
	}
}

func TestConfiguredAddressIsTriedWhenTheHintIsWrong(t *testing.T) {
	l := newLab(t)
	b, c := openStreams(t, l, "n2", nobody), openStreams(t, l, "n3", nobody)
	a := openStreams(t, l, "n1", func(string) string { return b.Addr().String() })
	conn, err := a.Dial(named("n2", c.Addr().String()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if got := conn.RemoteAddr().String(); got != b.Addr().String() {
		t.Errorf("connected to %s, want %s", got, b.Addr())
	}
}

func TestCloseEndsAllConnections(t *testing.T) {
	l := newLab(t)
	a, b := openStreams(t, l, "n1", nobody), openStreams(t, l, "n2", nobody)
	conn, err := a.Dial(named("n2", b.Addr().String()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("the connection is still open")
	}
	if _, err := a.Dial(named("n2", b.Addr().String()), time.Second); err == nil {
		t.Error("dialled after close")
	}
}

func TestAddressesPreferGossip(t *testing.T) {
	hints := map[string]string{"n2": "h2:1"}
	configured := map[string]string{"n2": "c2:1", "n3": "c3:1"}
	a := &addresses{
		id: "n1", self: "s1:1",
		hint:  func(id string) string { return hints[id] },
		known: func(id string) string { return configured[id] },
	}
	for id, want := range map[raft.ServerID]raft.ServerAddress{"n1": "s1:1", "n2": "n2@h2:1", "n3": "n3@c3:1"} {
		if got, err := a.ServerAddr(id); err != nil || got != want {
			t.Errorf("%s is at %q, %v; want %q", id, got, err, want)
		}
	}
	if _, err := a.ServerAddr("n4"); err == nil {
		t.Error("an unknown peer has an address")
	}
}

func TestNewRefusesBadConfiguration(t *testing.T) {
	l := newLab(t)
	good := func() Config {
		return Config{
			ID: "n1", Cluster: "test", DataDir: t.TempDir(), RaftBind: "127.0.0.1:0", APIAdvertise: "127.0.0.1:1",
			Identity: l.identity(identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleServer}),
		}
	}
	if _, err := New(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no id":                  func(c *Config) { c.ID = "" },
		"another's certificate":  func(c *Config) { c.ID = "n2" },
		"another cluster":        func(c *Config) { c.Cluster = "other" },
		"no api":                 func(c *Config) { c.APIAdvertise = "" },
		"no directory":           func(c *Config) { c.DataDir = "" },
		"no identity":            func(c *Config) { c.Identity = nil },
		"one store of three":     func(c *Config) { c.Seams.Logs = raft.NewInmemStore() },
		"bootstrap of non-voter": func(c *Config) { c.NonVoter, c.BootstrapExpect = true, 3 },
		"negative expectation":   func(c *Config) { c.BootstrapExpect = -1 },
		"mad heartbeat":          func(c *Config) { c.Timers.Heartbeat = time.Millisecond },
		"a worker": func(c *Config) {
			c.Identity = l.identity(identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleWorker})
		},
	} {
		cfg := good()
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

var _ net.Addr = hostPort("")
