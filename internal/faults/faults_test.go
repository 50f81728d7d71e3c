package faults

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is two nodes that listen on loopback, each with its injector, and a
// connection that a dialled to b.
type pair struct {
	t            *testing.T
	path         string
	rules        *Rules
	a, b         *Injector
	atB          net.Listener
	dialled, got net.Conn
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{t: t, path: filepath.Join(t.TempDir(), "rules.json")}
	// The port of b is only known once it listens.
	p.rules = &Rules{Nodes: map[string]Node{"a": {Source: "127.0.0.11"}, "b": {Source: "127.0.0.12"}}}
	p.change(func(*Rules) {})
	p.a, p.b = p.open("a"), p.open("b")
	var err error
	if p.atB, err = p.b.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.atB.Close() })
	tcp, ok := p.atB.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("b listens on %v", p.atB.Addr())
	}
	port := tcp.Port
	p.change(func(r *Rules) { r.Nodes["b"] = Node{Source: "127.0.0.12", FirstPort: port, LastPort: port} })
	p.applied(func(in *Injector) bool { return in.rules.Nodes["b"].FirstPort == port })
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := p.atB.Accept()
		accepted <- conn
	}()
	if p.dialled, err = p.a.DialContext(t.Context(), "tcp", p.atB.Addr().String()); err != nil {
		t.Fatal(err)
	}
	p.got = <-accepted
	t.Cleanup(func() {
		// What is held back goes out, else it would be tried for a while.
		p.change(func(r *Rules) { r.Links = nil })
		p.applied(func(in *Injector) bool { return len(in.rules.Links) == 0 })
		_, _ = p.dialled.Close(), p.got.Close()
	})
	return p
}

func (p *pair) open(self string) *Injector {
	p.t.Helper()
	in, err := Open(p.path, self, slog.New(slog.DiscardHandler))
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // cleanups need it still
	done := make(chan struct{})
	go func() { defer close(done); _ = in.Run(ctx) }()
	p.t.Cleanup(func() { cancel(); <-done })
	return in
}

func (p *pair) change(f func(*Rules)) {
	p.t.Helper()
	f(p.rules)
	if err := p.rules.Save(p.path); err != nil {
		p.t.Fatal(err)
	}
}

// applied waits until both injectors have rules for which ok holds.
func (p *pair) applied(ok func(*Injector) bool) {
	p.t.Helper()
	deadline := time.After(10 * time.Second)
	for _, in := range []*Injector{p.a, p.b} {
		for {
			in.mu.Lock()
			done, changed := ok(in), in.changed
			in.mu.Unlock()
			if done {
				break
			}
			select {
			case <-changed:
			case <-deadline:
				p.t.Fatal("the injectors do not see the rules")
			}
		}
	}
}

// link sets what a sends to b, or b to a, and waits until both know.
func (p *pair) link(from, to string, f func(*Link)) {
	p.t.Helper()
	p.change(func(r *Rules) { r.Change(from, to, f) })
	want := p.rules.Link(from, to)
	p.applied(func(in *Injector) bool { return in.rules.Link(from, to) == want })
}

// says writes a byte on one end and reports whether the other gets it within d.
func says(t *testing.T, from, to net.Conn, d time.Duration) bool {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	return hears(t, to, d)
}

func hears(t *testing.T, to net.Conn, d time.Duration) bool {
	t.Helper()
	if err := to.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	_, err := io.ReadFull(to, make([]byte, 1))
	return err == nil
}

const (
	soon = 10 * time.Second
	not  = 150 * time.Millisecond
)

func TestALinkIsCutOneWayAndHeals(t *testing.T) {
	p := newPair(t)
	if !says(t, p.dialled, p.got, soon) || !says(t, p.got, p.dialled, soon) {
		t.Fatal("a whole link does not carry")
	}
	p.link("a", "b", func(l *Link) { l.Cut = true })
	if says(t, p.dialled, p.got, not) {
		t.Error("a cut link carries")
	}
	if !says(t, p.got, p.dialled, soon) {
		t.Error("the other direction does not carry")
	}
	p.link("a", "b", func(l *Link) { l.Cut = false })
	if !hears(t, p.got, soon) {
		t.Error("what was written meanwhile is lost")
	}
	p.link("b", "a", func(l *Link) { l.Cut = true })
	if says(t, p.got, p.dialled, not) {
		t.Error("what the accepting side sends is not cut")
	}
}

func TestACutLinkTakesNoConnectionsEitherWay(t *testing.T) {
	p := newPair(t)
	for _, cut := range [][2]string{{"a", "b"}, {"b", "a"}} {
		p.link(cut[0], cut[1], func(l *Link) { l.Cut = true })
		ctx, cancel := context.WithTimeout(t.Context(), not)
		_, err := p.a.DialContext(ctx, "tcp", p.atB.Addr().String())
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial with %s cut from %s: %v, want to wait", cut[0], cut[1], err)
		}
		p.link(cut[0], cut[1], func(l *Link) { l.Cut = false })
	}
}

func TestDelayKeepsTheOrder(t *testing.T) {
	p := newPair(t)
	const delay, count = 100 * time.Millisecond, 20
	p.link("a", "b", func(l *Link) { l.Delay = delay })
	began := time.Now()
	for i := range count {
		if i == count/2 {
			p.link("a", "b", func(l *Link) { l.Delay = 0 })
		}
		if _, err := p.dialled.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, count)
	if err := p.got.SetReadDeadline(time.Now().Add(soon)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.got, got); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < delay {
		t.Errorf("it took %s, want at least the delay", took)
	}
	for i, b := range got {
		if int(b) != i {
			t.Fatalf("they came as %v", got)
		}
	}
}

func TestAFullSendBufferBlocksUntilTheDeadline(t *testing.T) {
	p := newPair(t)
	p.link("a", "b", func(l *Link) { l.Cut = true })
	if _, err := p.dialled.Write(make([]byte, sendBuffer)); err != nil {
		t.Fatal(err)
	}
	if err := p.dialled.SetWriteDeadline(time.Now().Add(not)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.dialled.Write([]byte{1}); !isTimeout(err) {
		t.Errorf("a write into a full buffer: %v, want a timeout", err)
	}
	p.link("a", "b", func(l *Link) { l.Cut = false })
	if _, err := io.ReadFull(p.got, make([]byte, sendBuffer)); err != nil {
		t.Fatal(err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestDatagramsAreLostOnACutLink(t *testing.T) {
	p := newPair(t)
	address, sent := p.atB.Addr().String(), make(chan struct{}, 1)
	send := func() { sent <- struct{}{} }
	p.a.Send(address, send)
	<-sent
	p.link("a", "b", func(l *Link) { l.Cut = true })
	p.a.Send(address, send)
	if len(sent) != 0 {
		t.Error("a datagram went over a cut link")
	}
	p.link("a", "b", func(l *Link) { l.Cut, l.Delay = false, 20*time.Millisecond })
	p.a.Send(address, send)
	<-sent
	var none *Injector
	none.Send(address, send)
	<-sent
}

func TestStrangersAreLeftAlone(t *testing.T) {
	p := newPair(t)
	p.link("a", "b", func(l *Link) { l.Cut = true })
	p.link("b", "a", func(l *Link) { l.Cut = true })
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := p.atB.Accept()
		accepted <- conn
	}()
	mine, err := net.Dial("tcp", p.atB.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	theirs := <-accepted
	defer theirs.Close()
	if !says(t, mine, theirs, soon) || !says(t, theirs, mine, soon) {
		t.Error("a client that is no node is cut off")
	}
}
