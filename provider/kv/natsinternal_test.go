package kv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	natsd "github.com/nats-io/nats-server/v2/server"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

// inProcess starts a NATS server of this process, of the version that the
// messaging provider embeds.
func inProcess(t *testing.T, dir string, port int) *natsd.Server {
	t.Helper()
	s, err := natsd.NewServer(&natsd.Options{Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("the server is not ready")
	}
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	return s
}

// natsClient is a store at a server, as a provider whose clock can be moved.
func natsClient(t *testing.T, s *natsd.Server, ahead *time.Duration) (client, *natsStore) {
	t.Helper()
	o, err := natsSettings(provider.Config{ID: "kv", Settings: map[string]string{"url": s.ClientURL()}}, New(Options{}).log)
	if err != nil {
		t.Fatal(err)
	}
	store, err := openNats(t.Context(), &o)
	if err != nil {
		t.Fatal(err)
	}
	// Without a sweeper of its own: the test sweeps.
	svc := &service{store: store, now: func() time.Time { return time.Now().Add(*ahead) }, log: o.log, stop: func() {}, swept: make(chan struct{})}
	close(svc.swept)
	t.Cleanup(func() { _ = svc.Close() })
	return client{t, svc}, store
}

// The suite against the server that is embedded elsewhere, which is years younger
// than the one that TestNatsConforms runs.
func TestNatsEmbeddedConforms(t *testing.T) {
	s := inProcess(t, t.TempDir(), natsd.RANDOM_PORT)
	n := 0
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		if strings.HasSuffix(t.Name(), "/a_random_history_agrees_with_a_model") {
			t.Skip("TestNatsConforms runs it")
		}
		n++
		p, err := New(Options{Now: now}).Open(t.Context(), provider.Config{
			ID: "kv", Driver: "nats", Settings: map[string]string{"url": s.ClientURL(), "namespace": fmt.Sprint("test-", n)},
		})
		if err != nil {
			t.Fatal(err)
		}
		return p
	})
}

func (s *natsStore) messages(t *testing.T) uint64 {
	t.Helper()
	info, err := s.stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info.State.Msgs
}

func (s *natsStore) sweepAll(t *testing.T, now time.Time) int {
	t.Helper()
	n, err := s.sweep(t.Context(), now.UnixNano(), sweepBatch)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// hasFollowed waits until the store knows all that is in the stream.
func (s *natsStore) hasFollowed(t *testing.T) {
	t.Helper()
	info, err := s.stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.link.mu.Lock()
	index := s.link.index
	s.link.mu.Unlock()
	if err := index.wait(t.Context(), info.State.LastSeq); err != nil {
		t.Fatal(err)
	}
}

func TestNatsSweepsWhatIsNeededNoMore(t *testing.T) {
	s := inProcess(t, t.TempDir(), natsd.RANDOM_PORT)
	var ahead time.Duration
	c, store := natsClient(t, s, &ahead)
	other, second := natsClient(t, s, &ahead)
	large := bytes.Repeat([]byte("x"), MaxValue)
	for range 3 { // leaves two rests behind
		if err := c.set("large", large); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"deleted", "stays"} {
		if err := c.set(key, []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
	for operation, m := range map[string]*pb.KvSetRequest{"set": {Key: []byte("expires"), TtlMs: 1000}, "delete": {Key: []byte("deleted")}} {
		if _, err := c.call(t.Context(), operation, m); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.set("last", []byte("v")); err != nil {
		t.Fatal(err)
	}
	before := store.messages(t) // large, 3 rests, deleted, stays, expires, last, and perhaps a mark
	if n := store.sweepAll(t, time.Now()); n != 2 {
		t.Errorf("%d messages were removed at once, want the 2 rests of overwritten values", n)
	}
	ahead = time.Hour
	if n := store.sweepAll(t, time.Now().Add(ahead)); n != 0 {
		t.Errorf("%d messages were removed before it was safe", n)
	}
	store.keep, second.keep = -time.Second, -time.Second
	if n := store.sweepAll(t, time.Now().Add(ahead)); n != 2 {
		t.Errorf("%d messages were removed, want those of the deleted and of the expired key", n)
	}
	if got := store.messages(t); got != before-4 {
		t.Errorf("the stream holds %d messages, want %d", got, before-4)
	}
	second.hasFollowed(t)
	if n := second.sweepAll(t, time.Now().Add(ahead)); n == 0 {
		t.Error("another replica does not notice what was removed")
	}
	if n := second.sweepAll(t, time.Now().Add(ahead)); n != 0 {
		t.Errorf("another replica removes %d messages again", n)
	}
	for _, at := range []client{c, other} {
		for key, want := range map[string][]byte{"large": large, "stays": []byte("v"), "last": []byte("v"), "deleted": nil, "expires": nil} {
			if got, found, err := at.get(key); err != nil || found != (want != nil) || !bytes.Equal(got, want) {
				t.Errorf("%s after the sweep: %d bytes, %v, %v", key, len(got), found, err)
			}
		}
	}
	fresh, _ := natsClient(t, s, &ahead)
	answer, err := fresh.call(t.Context(), opList, &pb.KvListRequest{KeysOnly: true})
	if err != nil || bytes.Contains(answer, []byte("deleted")) || bytes.Contains(answer, []byte("expires")) || !bytes.Contains(answer, []byte("stays")) {
		t.Errorf("a replica that was opened later lists %q, %v", answer, err)
	}
}

// A server that comes back without its last writes, or without any, is noticed:
// nothing is decided upon what is not there any more.
func TestNatsServerThatWasSetBack(t *testing.T) {
	dir := t.TempDir()
	s := inProcess(t, dir, natsd.RANDOM_PORT)
	address, ok := s.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("no address")
	}
	ahead := time.Duration(0)
	c, _ := natsClient(t, s, &ahead)
	if err := c.set("kept", []byte("v")); err != nil {
		t.Fatal(err)
	}
	restart := func(change func()) {
		s.Shutdown()
		s.WaitForShutdown()
		change()
		s = inProcess(t, dir, address.Port)
	}
	image := t.TempDir()
	restart(func() {
		if err := os.CopyFS(image, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	})
	eventually(t, "a write after the restart", func() error { return c.set("lost", []byte("v")) })
	for i := range 5 {
		if err := c.set(fmt.Sprint("lost-", i), []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
	restart(func() {
		if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(image))); err != nil {
			t.Fatal(err)
		}
	})
	eventually(t, "a write after the server was set back", func() error { return c.set("new", []byte("v")) })
	answer, err := c.call(t.Context(), opList, &pb.KvListRequest{KeysOnly: true})
	if err != nil || bytes.Contains(answer, []byte("lost")) || !bytes.Contains(answer, []byte("new")) || !bytes.Contains(answer, []byte("kept")) {
		t.Errorf("after the server was set back the list is %q, %v", answer, err)
	}
	restart(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	})
	eventually(t, "calls fail without the stream", func() error {
		if err := c.set("k", nil); !errors.Is(err, provider.ErrUnavailable) {
			return fmt.Errorf("%w instead of ErrUnavailable", err)
		}
		return nil
	})
}

// eventually waits until something works.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s: %v", what, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
