package gossip

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func metadata(id string) *pb.PeerMetadata {
	return &pb.PeerMetadata{Cluster: "test", PeerId: id, RaftAddress: "127.0.0.1:7402", ApiAddress: "127.0.0.1:7400"}
}

type testMember struct {
	*Gossip
	stop func()
}

func start(t *testing.T, cfg Config, meta *pb.PeerMetadata) *testMember {
	t.Helper()
	if cfg.Bind == "" {
		cfg.Bind = "127.0.0.1:0"
	}
	cfg.Logger = slog.New(slog.NewTextHandler(newTestWriter(t), &slog.HandlerOptions{Level: slog.LevelInfo}))
	g, err := New(cfg, meta)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	m := &testMember{Gossip: g}
	m.stop = func() {
		cancel()
		if err, ok := <-done; ok && err != nil {
			t.Errorf("run: %v", err)
		}
		close(done)
		m.stop = func() {}
	}
	t.Cleanup(func() { m.stop() })
	eventually(t, "the member listens", func() bool { return g.Address() != "" })
	return m
}

// testWriter logs to a test until it ends: goroutines of memberlist outlive it.
type testWriter struct {
	mu sync.Mutex
	t  *testing.T
}

func newTestWriter(t *testing.T) *testWriter {
	w := &testWriter{t: t}
	t.Cleanup(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.t = nil
	})
	return w
}

func (w *testWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t != nil {
		w.t.Logf("%s", strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("waited too long until %s", what)
		case <-tick.C:
		}
	}
}

func alive(g *Gossip) string {
	var ids []string
	for _, m := range g.Members() {
		if m.Alive {
			ids = append(ids, m.Metadata.GetPeerId())
		}
	}
	return strings.Join(ids, " ")
}

func expectEvent(t *testing.T, g *Gossip, kind EventKind, id string) Member {
	t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	for {
		select {
		case e := <-g.Events():
			if e.Kind == kind && e.Member.Metadata.GetPeerId() == id {
				return e.Member
			}
		case <-deadline.C:
			t.Fatalf("no event %s %s", kind, id)
		}
	}
}

// knowEachOther waits until n2 knows n1 as n1 knows n2: it can say farewell only then.
func knowEachOther(t *testing.T, n2 *testMember) {
	t.Helper()
	eventually(t, "n2 knows n1", func() bool { return alive(n2.Gossip) == "n1 n2" })
}

func TestMembersFindEachOtherThroughOneAddress(t *testing.T) {
	key := []byte(strings.Repeat("k", 32))
	a := start(t, Config{Key: key}, metadata("n1"))
	b := start(t, Config{Key: key, Join: []string{a.Address()}}, metadata("n2"))
	c := start(t, Config{Key: key, Join: []string{a.Address()}}, metadata("n3"))
	for _, m := range []*testMember{a, b, c} {
		eventually(t, "all three are known everywhere", func() bool { return alive(m.Gossip) == "n1 n2 n3" })
	}
}

func TestEventsTellJoinUpdateAndLeave(t *testing.T) {
	a := start(t, Config{}, metadata("n1"))
	b := start(t, Config{Join: []string{a.Address()}}, metadata("n2"))
	expectEvent(t, a.Gossip, Joined, "n2")

	changed := metadata("n2")
	changed.Bootstrapped = true
	if err := b.Update(changed); err != nil {
		t.Fatal(err)
	}
	if m := expectEvent(t, a.Gossip, Updated, "n2"); !m.Metadata.GetBootstrapped() {
		t.Error("the update did not carry the new metadata")
	}

	b.stop()
	m := expectEvent(t, a.Gossip, Left, "n2")
	if m.Alive || !m.Left {
		t.Errorf("a member that left: alive %v, left %v", m.Alive, m.Left)
	}
}

func TestMemberThatComesBackElsewhereIsFoundAgain(t *testing.T) {
	a := start(t, Config{}, metadata("n1"))
	b := start(t, Config{Join: []string{a.Address()}}, metadata("n2"))
	expectEvent(t, a.Gossip, Joined, "n2")
	knowEachOther(t, b)
	old := b.Address()
	b.stop()
	expectEvent(t, a.Gossip, Left, "n2")

	moved := metadata("n2")
	moved.RaftAddress = "127.0.0.1:9999"
	again := start(t, Config{Join: []string{a.Address()}}, moved)
	if again.Address() == old {
		t.Skip("the same port was picked again")
	}
	m := expectEvent(t, a.Gossip, Joined, "n2")
	if m.Metadata.GetRaftAddress() != "127.0.0.1:9999" {
		t.Errorf("raft address %s, want the new one", m.Metadata.GetRaftAddress())
	}
}

func TestLostMembersAreTriedAgain(t *testing.T) {
	a := start(t, Config{Rejoin: 100 * time.Millisecond}, metadata("n1"))
	b := start(t, Config{Join: []string{a.Address()}}, metadata("n2"))
	expectEvent(t, a.Gossip, Joined, "n2")
	knowEachOther(t, b)
	address := b.Address()
	b.stop()
	expectEvent(t, a.Gossip, Left, "n2")
	// n2 comes back at its old address and knows nobody: only n1 can find it.
	start(t, Config{Bind: address}, metadata("n2"))
	expectEvent(t, a.Gossip, Joined, "n2")
}

func TestOtherClustersAndOtherKeysStayOutside(t *testing.T) {
	key := []byte(strings.Repeat("k", 32))
	a := start(t, Config{Key: key}, metadata("n1"))
	foreign := metadata("n2")
	foreign.Cluster = "other"
	b := start(t, Config{Key: key, Join: []string{a.Address()}}, foreign)
	c := start(t, Config{Key: []byte(strings.Repeat("x", 32)), Join: []string{a.Address()}}, metadata("n3"))
	d := start(t, Config{Key: key, Join: []string{a.Address()}}, metadata("n4"))
	eventually(t, "n4 is known", func() bool { return alive(a.Gossip) == "n1 n4" })
	if got := alive(b.Gossip) + " " + alive(c.Gossip); got != "n2 n3" {
		t.Errorf("outsiders know %q", got)
	}
	eventually(t, "n1 is known", func() bool { return alive(d.Gossip) == "n1 n4" })
}

func TestNewRefusesBadConfiguration(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no port":   {Bind: "127.0.0.1"},
		"bad port":  {Bind: "127.0.0.1:http"},
		"short key": {Bind: "127.0.0.1:0", Key: []byte("short")},
		"advertise": {Bind: "127.0.0.1:0", Advertise: "nowhere"},
	} {
		if _, err := New(cfg, metadata("n1")); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := New(Config{Bind: "127.0.0.1:0"}, &pb.PeerMetadata{}); err == nil {
		t.Error("empty metadata accepted")
	}
}

func TestRosterCoalescesAndForgets(t *testing.T) {
	r := newRoster("self")
	at := time.Unix(0, 0)
	note := func(kind EventKind, id string, alive bool) {
		at = at.Add(time.Second)
		r.record(kind, Member{Metadata: metadata(id), Alive: alive, Since: at})
	}
	note(Joined, "n1", true)
	note(Updated, "n1", true)
	note(Joined, "n2", true)
	note(Failed, "n2", false)
	note(Joined, "self", true)
	var got []string
	for e, ok := r.next(); ok; e, ok = r.next() {
		got = append(got, e.Kind.String()+" "+e.Member.Metadata.GetPeerId())
	}
	if want := "joined n1, failed n2"; strings.Join(got, ", ") != want {
		t.Errorf("events %q, want %q", strings.Join(got, ", "), want)
	}
	if since := r.known["n1"].Since; !since.Equal(time.Unix(1, 0)) {
		t.Errorf("an update moved the time since n1 is alive to %v", since)
	}
	for i := range 2 * maxLost {
		note(Failed, fmt.Sprintf("lost-%03d", i), false)
	}
	if len(r.known) > maxLost+1 {
		t.Errorf("%d members remembered", len(r.known))
	}
	if _, ok := r.known["n1"]; !ok {
		t.Error("a live member was forgotten")
	}
	if _, ok := r.known["lost-000"]; ok {
		t.Error("the member lost longest was kept")
	}
}
