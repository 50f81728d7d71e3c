package identity_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/wasmatrix/wasmatrix/identity"
)

// notedNetwork is the usual network; it notes what is asked of it.
type notedNetwork struct {
	mu   sync.Mutex
	seen []string
}

func (n *notedNetwork) note(what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen = append(n.seen, what)
}

func (n *notedNetwork) Listen(network, address string) (net.Listener, error) {
	n.note("listen")
	return net.Listen(network, address)
}

func (n *notedNetwork) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	n.note("dial " + address)
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

func (n *notedNetwork) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	n.note("dial " + address)
	return net.DialTimeout(network, address, timeout)
}

func (n *notedNetwork) expect(t *testing.T, want ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.seen) != len(want) {
		t.Fatalf("the network saw %q, want %q", n.seen, want)
	}
	for i := range want {
		if n.seen[i] != want[i] {
			t.Errorf("the network saw %q, want %q", n.seen, want)
		}
	}
}

func TestConnectionsGoOverTheGivenNetwork(t *testing.T) {
	ca, network := newCA(t, "dev"), &notedNetwork{}
	server := raftLayer(t, issue(t, ca, identity.Node, "n1", identity.RoleServer))
	id := issue(t, ca, identity.Node, "n2", identity.RoleServer)
	client := raftLayer(t, id.Over(network))
	served := echoOnce(server)
	conn, err := client.Dial(server.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}

	address, _ := serve(t, issue(t, ca, identity.Node, "n3", identity.RoleServer))
	pool := id.Over(network).NewPool(nil)
	defer func() { _ = pool.Close() }()
	shared, err := pool.Conn(address)
	if err == nil {
		_, err = grpc_health_v1.NewHealthClient(shared).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	}
	if err != nil {
		t.Fatal(err)
	}
	network.expect(t, "listen", "dial "+server.Addr().String(), "dial "+address)
}

func TestASilentPeerDoesNotHoldADialUp(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	id := issue(t, newCA(t, "dev"), identity.Node, "n1", identity.RoleServer)
	if conn, err := raftLayer(t, id.Over(&notedNetwork{})).Dial(silent.Addr().String(), 100*time.Millisecond); err == nil {
		t.Error("a handshake with nobody succeeded")
		_ = conn.Close()
	}
}
