package messaging

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	testProvider = "bus"
	testNode     = "n1"
	testPatience = 15 * time.Second
)

// handler is a guest's message handler.
type handler func(ctx context.Context, m *pb.Message) (*pb.MessageResult, error)

// desk is a node's records and guests: what a provider gets as provider.Messages.
type desk struct {
	mu       sync.Mutex
	subs     []provider.Subscription
	handlers map[string]handler // by instance
	changed  chan struct{}
}

func newDesk() *desk { return &desk{handlers: map[string]handler{}, changed: make(chan struct{})} }

func (d *desk) change(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
	slices.SortFunc(d.subs, func(a, b provider.Subscription) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Instance, b.Instance))
	})
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *desk) Subscriptions(id string) []provider.Subscription {
	d.mu.Lock()
	defer d.mu.Unlock()
	if id != testProvider {
		return nil
	}
	return slices.Clone(d.subs)
}

func (d *desk) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

func (d *desk) Record(_ context.Context, call provider.Call, id, subject string, subscribed bool) (existed bool, err error) {
	d.change(func() {
		n := len(d.subs)
		d.subs = slices.DeleteFunc(d.subs, func(s provider.Subscription) bool { return s.Instance == call.Instance && s.Subject == subject })
		existed = len(d.subs) < n
		if subscribed {
			d.subs = append(d.subs, provider.Subscription{
				Instance: call.Instance, Name: call.Name, Node: testNode, Generation: call.Generation, Created: call.Created,
				Provider: id, Subject: subject,
			})
		}
	})
	return existed, nil
}

// revoke takes an instance's subscriptions away, as the loss of a permission does.
func (d *desk) revoke(instance string) {
	d.change(func() {
		d.subs = slices.DeleteFunc(d.subs, func(s provider.Subscription) bool { return s.Instance == instance })
	})
}

func (d *desk) handle(instance string, h handler) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.handlers[instance] = h
}

func (d *desk) Deliver(ctx context.Context, to provider.Subscription, message []byte) ([]byte, error) {
	d.mu.Lock()
	h := d.handlers[to.Instance]
	d.mu.Unlock()
	if h == nil {
		return nil, provider.Errorf(provider.ErrConflict, "instance %s is not running", to.Instance)
	}
	m := &pb.Message{}
	if err := proto.Unmarshal(message, m); err != nil {
		panic(err)
	}
	result, err := h(ctx, m)
	if err != nil {
		return nil, err
	}
	answer, err := proto.Marshal(result)
	if err != nil {
		panic(err)
	}
	return answer, nil
}

// world is an open provider with its node.
type world struct {
	t *testing.T
	*desk

	kind     *Kind
	cfg      provider.Config
	registry *prometheus.Registry
	provider provider.Provider
}

// settings are pairs of a setting and its value; "driver" names the driver.
func open(t *testing.T, settings ...string) *world {
	t.Helper()
	w := &world{t: t, desk: newDesk(), registry: prometheus.NewPedanticRegistry()}
	var err error
	if w.kind, err = New(Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Registerer: w.registry}); err != nil {
		t.Fatal(err)
	}
	w.kind.linger, w.kind.grace = 200*time.Millisecond, 2*time.Second
	w.cfg = provider.Config{ID: testProvider, Dir: t.TempDir(), Node: testNode, Messages: w.desk, Settings: map[string]string{}}
	for i := 0; i < len(settings); i += 2 {
		if settings[i] == "driver" {
			w.cfg.Driver = settings[i+1]
			continue
		}
		w.cfg.Settings[settings[i]] = settings[i+1]
	}
	w.open()
	t.Cleanup(func() { _ = w.provider.Close() })
	return w
}

func (w *world) open() {
	w.t.Helper()
	var err error
	if w.provider, err = w.kind.Open(context.Background(), w.cfg); err != nil {
		w.t.Fatalf("Open: %v", err)
	}
}

func (w *world) close() {
	w.t.Helper()
	if err := w.provider.Close(); err != nil {
		w.t.Fatalf("Close: %v", err)
	}
}

// callOf is a call of an instance such as "orders-1" of the workload "orders".
func callOf(instance, operation string, req proto.Message) provider.Call {
	payload, err := proto.Marshal(req)
	if err != nil {
		panic(err)
	}
	name := instance
	if i := slices.Index([]byte(instance), '-'); i > 0 {
		name = instance[:i]
	}
	return provider.Call{Instance: instance, Name: name, Generation: 1, Created: 1, Operation: operation, Payload: payload}
}

func (w *world) call(instance, operation string, req, resp proto.Message) error {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testPatience)
	defer cancel()
	answer, err := w.provider.Invoke(ctx, callOf(instance, operation, req))
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer, resp)
}

// subscribe lets an instance handle the messages of a subject.
func (w *world) subscribe(instance, subject string, h handler) {
	w.t.Helper()
	w.handle(instance, h)
	if err := w.call(instance, opSubscribe, &pb.MsgSubscribeRequest{Subject: subject}, &pb.MsgSubscribeResponse{}); err != nil {
		w.t.Fatalf("subscribing %s to %s: %v", instance, subject, err)
	}
}

func (w *world) unsubscribe(instance, subject string) bool {
	w.t.Helper()
	resp := &pb.MsgUnsubscribeResponse{}
	if err := w.call(instance, opUnsubscribe, &pb.MsgUnsubscribeRequest{Subject: subject}, resp); err != nil {
		w.t.Fatalf("unsubscribing %s from %s: %v", instance, subject, err)
	}
	return resp.GetExisted()
}

func (w *world) publish(subject, payload string, headers ...string) uint64 {
	w.t.Helper()
	req := &pb.MsgPublishRequest{Subject: subject, Payload: []byte(payload)}
	for i := 0; i < len(headers); i += 2 {
		req.Headers = append(req.Headers, &pb.MessageHeader{Name: headers[i], Value: headers[i+1]})
	}
	resp := &pb.MsgPublishResponse{}
	if err := w.call("sender-1", opPublish, req, resp); err != nil {
		w.t.Fatalf("publishing to %s: %v", subject, err)
	}
	return resp.GetSequence()
}

func (w *world) request(subject, payload string, timeout time.Duration) (string, error) {
	w.t.Helper()
	resp := &pb.MsgRequestResponse{}
	err := w.call("asker-1", opRequest, &pb.MsgRequestRequest{
		Subject: subject, Payload: []byte(payload), TimeoutMs: uint32(timeout.Milliseconds()),
	}, resp)
	return string(resp.GetPayload()), err
}

// inbox collects what a handler gets.
type inbox struct {
	mu   sync.Mutex
	got  []*pb.Message
	more chan struct{}
}

func newInbox() *inbox { return &inbox{more: make(chan struct{}, 1)} }

func (b *inbox) take(_ context.Context, m *pb.Message) (*pb.MessageResult, error) {
	b.mu.Lock()
	b.got = append(b.got, m)
	b.mu.Unlock()
	select {
	case b.more <- struct{}{}:
	default:
	}
	return &pb.MessageResult{}, nil
}

func (b *inbox) messages() []*pb.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.got)
}

func (b *inbox) payloads() []string {
	var out []string
	for _, m := range b.messages() {
		out = append(out, string(m.GetPayload()))
	}
	slices.Sort(out)
	return out
}

// wait waits until n messages are here.
func (b *inbox) wait(t *testing.T, n int) []*pb.Message {
	t.Helper()
	eventually(t, fmt.Sprintf("%d messages have come", n), func() bool { return len(b.messages()) >= n })
	return b.messages()
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(testPatience)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("after %s it does not hold that %s", testPatience, what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// metric returns the value of a counter or gauge with these label values.
func (w *world) metric(name string, labels ...string) float64 {
	w.t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			matches := true
			for _, want := range labels {
				has := false
				for _, l := range m.GetLabel() {
					has = has || l.GetValue() == want
				}
				matches = matches && has
			}
			if matches {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func need(action, subject string) permission.Need {
	return permission.Need{Capability: permission.Messaging, Action: action, Resource: subject}
}
