//go:build linux

package harness

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
)

// socket opens a UDP socket on a host.
func socket(t *testing.T, w *Network, host int) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	err := w.hosts[host-1].do(func() (err error) {
		conn, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", net.JoinHostPort(w.Address(host), "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// arrives sends datagrams over a link until one arrives, or for a while where none shall.
func arrives(t *testing.T, from, to net.PacketConn, want bool) bool {
	t.Helper()
	patience := 10 * time.Second
	if !want {
		patience = 200 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := Until(ctx, "a datagram", func(context.Context) error {
		if _, err := from.WriteTo([]byte("x"), to.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_ = to.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		_, _, err := to.ReadFrom(make([]byte, 8))
		return err
	})
	return err == nil
}

func TestNetworkCutsAndHeals(t *testing.T) {
	w := NewNetwork(t, 3)
	a, b, c := socket(t, w, 1), socket(t, w, 2), socket(t, w, 3)
	expect := func(when string, from, to net.PacketConn, want bool) {
		t.Helper()
		if got := arrives(t, from, to, want); got != want {
			t.Errorf("%s: a datagram from %s arrives at %s: %v, want %v", when, from.LocalAddr(), to.LocalAddr(), got, want)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	expect("at first", a, b, true)
	do(w.Cut(1, 2))
	expect("cut one way", a, b, false)
	expect("cut one way", b, a, true)
	do(w.Split([]int{1}, []int{2, 3}))
	expect("split", a, b, false)
	expect("split", b, a, false)
	expect("split", c, a, false)
	expect("split", c, b, true)
	do(w.Heal())
	expect("healed", a, b, true)
	expect("healed", a, c, true)
}

func TestTheTestItselfCanBeCutOff(t *testing.T) {
	w := NewNetwork(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// A refused connection is an answer: the packet came and the answer came back.
	refused := func(i int) bool {
		conn, err := w.Dial(ctx, net.JoinHostPort(w.Address(i), "9"))
		if err == nil {
			err = errors.Join(errors.New("somebody listens"), conn.Close())
		}
		return strings.Contains(err.Error(), "connection refused")
	}
	if err := w.Split([]int{1}, []int{2}); err != nil {
		t.Fatal(err)
	}
	if !refused(1) || !refused(2) {
		t.Error("the test does not reach hosts that are cut from each other only")
	}
	if err := w.CutClients(2); err != nil {
		t.Fatal(err)
	}
	if !refused(1) || refused(2) {
		t.Error("cutting the test from host 2 does not cut it from host 2 alone")
	}
}
