package identity_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/identity"
)

func raftLayer(t *testing.T, id *identity.Identity) *identity.StreamLayer {
	t.Helper()
	l, err := id.StreamLayer("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// echoOnce serves one connection and returns what its read came to.
func echoOnce(l net.Listener) <-chan error {
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = conn.Close() }()
		_, err = io.CopyN(conn, conn, 5)
		done <- err
	}()
	return done
}

func TestPeersReachEachOtherOnTheRaftPort(t *testing.T) {
	ca := newCA(t, "dev")
	server := raftLayer(t, issue(t, ca, identity.Node, "n1", identity.RoleServer))
	client := raftLayer(t, issue(t, ca, identity.Node, "n2", identity.RoleBoth))
	served := echoOnce(server)
	conn, err := client.Dial(server.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestOnlyPeersGetThroughTheRaftPort(t *testing.T) {
	ca := newCA(t, "dev")
	peer := issue(t, ca, identity.Node, "n1", identity.RoleServer)
	tests := map[string]*tls.Config{
		"a worker":            issue(t, ca, identity.Node, "w1", identity.RoleWorker).ClientTLS(nil),
		"a user":              issue(t, ca, identity.User, "ann", identity.RoleAdmin).ClientTLS(nil),
		"a stranger":          trusting(issue(t, newCA(t, "dev"), identity.Node, "n2", identity.RoleServer)),
		"without certificate": {InsecureSkipVerify: true},
	}
	for name, config := range tests {
		t.Run(name, func(t *testing.T) {
			layer := raftLayer(t, peer)
			served := echoOnce(layer)
			conn, err := tls.Dial("tcp", layer.Addr().String(), config)
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
				_ = conn.Close()
			}
			if err == nil {
				t.Error("the client got through")
			}
			if err := <-served; err == nil || !strings.Contains(err.Error(), "refuse raft connection from 127.0.0.1:") {
				t.Errorf("the server got %v, want a refusal that names the client's address", err)
			}
		})
	}
}

func TestPeerDoesNotSpeakRaftToAWorker(t *testing.T) {
	ca := newCA(t, "dev")
	worker := issue(t, ca, identity.Node, "w1", identity.RoleWorker)
	l, err := tls.Listen("tcp", "127.0.0.1:0", worker.ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	served := echoOnce(l)
	_, err = raftLayer(t, issue(t, ca, identity.Node, "n1", identity.RoleServer)).Dial(l.Addr().String(), 5*time.Second)
	if !errors.Is(err, identity.ErrNotAllowed) {
		t.Errorf("got %v, want ErrNotAllowed", err)
	}
	if err := <-served; err == nil {
		t.Error("the worker got a Raft connection")
	}
}

func TestSilentClientDoesNotBlockAccept(t *testing.T) {
	ca := newCA(t, "dev")
	layer := raftLayer(t, issue(t, ca, identity.Node, "n1", identity.RoleServer))
	silent, err := net.Dial("tcp", layer.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	first, err := layer.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = first.Close() }()
	served := echoOnce(layer)
	conn, err := raftLayer(t, issue(t, ca, identity.Node, "n2", identity.RoleServer)).Dial(layer.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatalf("a second client waits for the silent one: %v", err)
	}
	_, _ = conn.Write([]byte("hello"))
	if err := <-served; err != nil {
		t.Error(err)
	}
	_ = conn.Close()
}

func TestStreamLayerAdvertisesTheGivenAddress(t *testing.T) {
	id := issue(t, newCA(t, "dev"), identity.Node, "n1", identity.RoleServer)
	advertise := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 7402}
	l, err := id.StreamLayer("127.0.0.1:0", advertise)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if l.Addr() != advertise {
		t.Errorf("Addr is %v", l.Addr())
	}
}
