package messaging

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

// natsProcess is a real nats-server with a file store.
type natsProcess struct {
	t       *testing.T
	dir     string
	address string
	cmd     *exec.Cmd
}

func startNATS(t *testing.T) *natsProcess {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &natsProcess{t: t, dir: t.TempDir(), address: listener.Addr().String()}
	_ = listener.Close()
	p.cmd = exec.Command(providertest.Program(t, "nats-server"))
	p.start()
	t.Cleanup(p.kill)
	return p
}

// start runs the server, again on the same disk after kill.
func (p *natsProcess) start() {
	p.t.Helper()
	host, port, _ := net.SplitHostPort(p.address)
	p.cmd = exec.Command(p.cmd.Path, "-a", host, "-p", port, "-js", "-sd", p.dir)
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	eventually(p.t, "nats-server serves", func() bool {
		nc, err := nats.Connect("nats://" + p.address)
		if err != nil {
			return false
		}
		defer nc.Close()
		js, _ := jetstream.New(nc)
		_, err = js.AccountInfo(context.Background())
		return err == nil
	})
}

// kill ends the server as SIGKILL does.
func (p *natsProcess) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

func (p *natsProcess) client() *nats.Conn {
	p.t.Helper()
	nc, err := nats.Connect("nats://" + p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(nc.Close)
	return nc
}

func (p *natsProcess) open(settings ...string) *world {
	p.t.Helper()
	return open(p.t, append([]string{"driver", "nats", "url", "nats://" + p.address}, settings...)...)
}

func TestPlainClientsInteroperate(t *testing.T) {
	server := startNATS(t)
	nc := server.client()
	for name, prefix := range map[string]string{"no prefix": "", "a prefix": "prod."} {
		t.Run(name, func(t *testing.T) {
			var settings []string
			if prefix != "" {
				settings = []string{"prefix", "prod"}
			}
			server.t = t
			w := server.open(settings...)
			seen, err := nc.SubscribeSync(prefix + "from.guests")
			if err != nil {
				t.Fatal(err)
			}
			_ = nc.Flush()
			w.publish("from.guests", "hello", "A", "b")
			if m, err := seen.NextMsg(testPatience); err != nil || string(m.Data) != "hello" || m.Header.Get("A") != "b" {
				t.Errorf("a client got %v, %v", m, err)
			}
			box := newInbox()
			w.subscribe("a-1", "to.*", box.take)
			_ = nc.PublishMsg(&nats.Msg{Subject: prefix + "to.guests", Data: []byte("hi"), Header: nats.Header{"C": {"d"}, "Nats-Secret": {"x"}, "bad": {"\xff"}}})
			m := box.wait(t, 1)[0]
			if m.GetSubject() != "to.guests" || string(m.GetPayload()) != "hi" || len(m.GetHeaders()) != 2 {
				t.Errorf("a guest got %v", m)
			}
			w.subscribe("a-1", "svc", echo)
			if m, err := nc.Request(prefix+"svc", []byte("x"), testPatience); err != nil || string(m.Data) != "re: x" {
				t.Errorf("a client's request: %v, %v", m, err)
			}
			if _, err := nc.Subscribe(prefix+"outside", func(m *nats.Msg) { _ = m.Respond([]byte("pong")) }); err != nil {
				t.Fatal(err)
			}
			_ = nc.Flush()
			if got, err := w.request("outside", "ping", 0); err != nil || got != "pong" {
				t.Errorf("a guest's request: %q, %v", got, err)
			}
		})
	}
}

// A guest that may subscribe to everything still sees nothing of NATS itself.
func TestReservedSubjectsAreOutOfReach(t *testing.T) {
	server := startNATS(t)
	nc := server.client()
	w := server.open()
	box := newInbox()
	for _, subject := range []string{">", "*.>", "*.secret"} {
		w.subscribe("a-1", subject, box.take)
	}
	listener := newInbox()
	stop := w.listen(">", func(m *pb.Message, _ uint64) error {
		_, err := listener.take(t.Context(), m)
		return err
	})
	for _, subject := range []string{"_INBOX.secret", "$JS.API.INFO", "$KV.secret", "_R_.secret"} {
		_ = nc.Publish(subject, []byte("secret"))
	}
	_ = nc.Publish("last", []byte("last"))
	listener.wait(t, 1)
	box.wait(t, 1)
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, m := range append(box.messages(), listener.messages()...) {
		if m.GetSubject() != "last" {
			t.Errorf("a guest or user got %v", m)
		}
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	k, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		kind     error
		settings map[string]string
	}{
		"nobody there": {provider.ErrUnavailable, map[string]string{"url": "nats://127.0.0.1:1"}},
		"no file":      {provider.ErrInvalid, map[string]string{"url": "nats://127.0.0.1:1", "creds_file": "/nowhere"}},
	} {
		_, err := k.Open(t.Context(), provider.Config{ID: "bus", Driver: "nats", Settings: c.settings})
		if !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The server is killed and comes back under load: calls fail clearly meanwhile
// and work again; no acknowledged message is lost; what comes twice says so.
func TestTheServerIsKilledUnderLoad(t *testing.T) {
	server := startNATS(t)
	w := server.open("durable", "true", "subjects", "jobs.>", "ack_wait", "1s", "backoff", "10ms", "max_in_flight", "16")
	var mu sync.Mutex
	seen := map[string][]uint32{}
	w.subscribe("a-1", "jobs.*", func(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
		mu.Lock()
		defer mu.Unlock()
		seen[string(m.GetPayload())] = append(seen[string(m.GetPayload())], m.GetDelivery())
		return &pb.MessageResult{}, nil
	})
	var acknowledged sync.Map
	var failures atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var writers sync.WaitGroup
	var sent atomic.Int64
	for n := range 4 {
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				payload := fmt.Sprintf("%d/%d", n, i)
				bounded, done := context.WithTimeout(context.Background(), 2*time.Second)
				_, err := w.provider.Invoke(bounded, callOf("s-1", opPublish, &pb.MsgPublishRequest{Subject: "jobs.x", Payload: []byte(payload)}))
				done()
				if err == nil {
					acknowledged.Store(payload, true)
					sent.Add(1)
					continue
				}
				failures.Add(1)
				if !errors.Is(err, provider.ErrUnavailable) && !errors.Is(err, provider.ErrCommunication) && !errors.Is(err, provider.ErrTimeout) {
					t.Errorf("a call failed with %v", err)
				}
				<-time.After(5 * time.Millisecond)
			}
		})
	}
	for range 2 {
		before := sent.Load()
		eventually(t, "messages are stored", func() bool { return sent.Load() > before+200 })
		server.kill()
		failed := failures.Load()
		eventually(t, "calls fail", func() bool { return failures.Load() > failed })
		server.start()
	}
	before := sent.Load()
	eventually(t, "calls work again", func() bool { return sent.Load() > before+200 })
	cancel()
	writers.Wait()
	eventually(t, "every acknowledged message was delivered", func() bool {
		mu.Lock()
		defer mu.Unlock()
		missing := false
		acknowledged.Range(func(payload, _ any) bool {
			missing = len(seen[fmt.Sprint(payload)]) == 0
			return !missing
		})
		return !missing
	})
	mu.Lock()
	defer mu.Unlock()
	for payload, deliveries := range seen {
		first := 0
		for _, d := range deliveries {
			if d == 1 {
				first++
			}
		}
		if first > 1 {
			t.Errorf("%s came %v: a duplicate does not say so", payload, deliveries)
		}
	}
}

// Two nodes deliver for one provider; the first is cut off without a word while
// it handles messages. What it had not acknowledged comes to the second.
func TestWhoeverComesNextGoesOn(t *testing.T) {
	server := startNATS(t)
	settings := []string{"durable", "true", "prefix", "p", "ack_wait", "500ms"}
	first, second := server.open(settings...), server.open(settings...)
	stuck := make(chan struct{})
	var taken atomic.Int32
	first.subscribe("a-1", "x", func(ctx context.Context, _ *pb.Message) (*pb.MessageResult, error) {
		if taken.Add(1) == 1 {
			close(stuck)
		}
		<-ctx.Done()
		return nil, provider.FromContext(ctx)
	})
	for i := range 20 {
		first.publish("x", fmt.Sprintf("%02d", i))
	}
	<-stuck
	serviceOf(first).link.nc.Close() // as the death of its node
	box := newInbox()
	second.subscribe("a-1", "x", box.take)
	again := 0
	for _, m := range box.wait(t, 20) {
		if m.GetDelivery() > 1 {
			again++
		}
	}
	if again == 0 || len(box.messages()) != 20 {
		t.Errorf("%d messages came, %d of them again", len(box.messages()), again)
	}
}
