package provider_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// fakeKind is a capability whose requests are "<provider>|<key>". Its operation
// "get" reads, "set" writes; everything else is unknown.
type fakeKind struct {
	typ  string
	open func(cfg provider.Config) (provider.Provider, error)
}

func (k *fakeKind) Type() string { return k.typ }

func (k *fakeKind) Demand(operation string, payload []byte) (provider.Demand, error) {
	target, key, ok := strings.Cut(string(payload), "|")
	if !ok {
		return provider.Demand{}, provider.Errorf(provider.ErrInvalid, "malformed")
	}
	action, ok := map[string]string{"get": "read", "set": "write"}[operation]
	if !ok {
		return provider.Demand{}, provider.Errorf(provider.ErrInvalid, "operation %q is unknown", operation)
	}
	return provider.Demand{Provider: target, Need: permission.Need{Capability: k.typ, Action: action, Resource: key}}, nil
}

func (k *fakeKind) Repeatable(operation string) bool { return operation == "get" }

func (k *fakeKind) Open(_ context.Context, cfg provider.Config) (provider.Provider, error) {
	if k.open != nil {
		return k.open(cfg)
	}
	return &fakeProvider{}, nil
}

// fakeProvider answers with what it was called with; gate, when set, holds it up.
type fakeProvider struct {
	gate   chan struct{}
	deaf   bool // it does not look at its context
	err    error
	closed sync.Once
	onEnd  func()
}

func (p *fakeProvider) Invoke(ctx context.Context, c provider.Call) ([]byte, error) {
	switch {
	case p.gate != nil && p.deaf:
		<-p.gate
	case p.gate != nil:
		select {
		case <-p.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if p.err != nil {
		return nil, p.err
	}
	return fmt.Appendf(nil, "%s/%s/%d/%s/%s/%s", c.Instance, c.Name, c.Generation, c.Bucket, c.Operation, c.Payload), nil
}

func (p *fakeProvider) Close() error {
	p.closed.Do(func() {
		if p.onEnd != nil {
			p.onEnd()
		}
	})
	return nil
}

// fakeRemote records what it is asked.
type fakeRemote struct {
	mu      sync.Mutex
	address string
	calls   []provider.RemoteCall
}

func (r *fakeRemote) Invoke(_ context.Context, address string, call provider.RemoteCall) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.address = address
	r.calls = append(r.calls, call)
	return []byte("remote"), nil
}

func (r *fakeRemote) Probe(context.Context, string) error { return nil }

func set(t testing.TB, texts ...string) permission.Set {
	t.Helper()
	s, err := permission.ParseSet(texts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// node is one node n1 with a running local provider "kv" and instance "i"
// (generation 3) that may kv:read:orders/ on it.
type node struct {
	dir    *provider.Directory
	host   *provider.Host
	remote *fakeRemote
	router *provider.Router
	kind   *fakeKind
}

func newNode(t testing.TB, change func(*provider.RouterConfig)) *node {
	t.Helper()
	n := &node{dir: provider.NewDirectory("n1"), remote: &fakeRemote{}, kind: &fakeKind{typ: "kv"}}
	kinds := []provider.Kind{n.kind, &fakeKind{typ: "http"}}
	n.host = provider.NewHost(slog.New(slog.DiscardHandler), kinds...)
	cfg := provider.RouterConfig{Directory: n.dir, Host: n.host, Kinds: kinds, Remote: n.remote}
	if change != nil {
		change(&cfg)
	}
	var err error
	if n.router, err = provider.NewRouter(cfg); err != nil {
		t.Fatal(err)
	}
	if err := n.host.Start(t.Context(), "kv", provider.Config{ID: "kv"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.host.Close(context.Background()); err != nil {
			t.Errorf("close the host: %v", err)
		}
	})
	n.dir.Replace(records(t))
	return n
}

func (n *node) log() *slog.Logger { return slog.New(slog.DiscardHandler) }

func records(t testing.TB) provider.Records {
	return provider.Records{
		Instances: []provider.InstanceRecord{
			{ID: "i", Name: "hello", Node: "n1", NodeEpoch: 5, Generation: 3},
			{ID: "far", Name: "far", Node: "n2", NodeEpoch: 2, Generation: 7},
		},
		Providers: []provider.ProviderRecord{
			{ID: "kv", Type: "kv", Node: "n1", Running: true, State: "running"},
			{ID: "there", Type: "kv", Node: "n2", Running: true, State: "running"},
			{ID: "web", Type: "http", Node: "n1", Running: true, State: "running"},
		},
		Assignments: []provider.Assignment{
			{Instance: "i", Provider: "kv", Permissions: set(t, "kv:read:orders/"), Bucket: "hello"},
			{Instance: "far", Provider: "kv", Permissions: set(t, "kv:read", "kv:write"), Bucket: "far"},
		},
		Nodes: []provider.NodeRecord{{ID: "n2", AgentAddress: "10.0.0.2:7400"}},
	}
}

// wantError checks sentinel, text and next step of a refusal.
func wantError(t *testing.T, err, sentinel error, mentions, next string) {
	t.Helper()
	var e *provider.Error
	switch {
	case !errors.Is(err, sentinel):
		t.Errorf("got %v, want %v", err, sentinel)
	case !errors.As(err, &e):
		t.Errorf("%v is no *provider.Error", err)
	case !strings.Contains(e.Error(), mentions):
		t.Errorf("%q does not mention %q", e.Error(), mentions)
	case !strings.Contains(e.Next, next):
		t.Errorf("next step %q does not contain %q", e.Next, next)
	}
}
