package capability

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// kind is one capability with an effect that can be counted afterwards.
type kind struct {
	name string
	// tags are those of the relay guest.
	tags string
	spec *pb.ProviderSpec
	// update is another configuration, with the same effect.
	update map[string]string
	// permissions let the relay have the effect.
	permissions []string
	// do has the effect once, named id.
	do func(ctx context.Context, r *relay, id string) error
	// seen returns how often each effect was had.
	seen func(ctx context.Context, c *harness.Cluster, provider string) (map[string]int, error)
	// hold makes effects wait in the provider until the returned function is
	// called; nil where that cannot be.
	hold func() (release func())
	// held is how many effects wait.
	held func() int
	// prepare makes ready what seen asks; nil where nothing is needed.
	prepare func(t *testing.T, c *harness.Cluster, provider string)
	// twice is true where an effect may be had again after a failure of the
	// provider's node, as a redelivered message.
	twice bool
}

func kinds(t *testing.T) []kind {
	t.Helper()
	return []kind{kvKind(), httpKind(t), externalKind(t), messagingKind()}
}

func kvKind() kind {
	return kind{
		name: "kv", tags: "kv",
		spec:        &pb.ProviderSpec{Type: "kv", Driver: "bbolt"},
		update:      map[string]string{"max_bytes": "512MiB"},
		permissions: slices.Concat(baseKV, []string{"kv:write:effect/"}),
		do: func(ctx context.Context, r *relay, id string) error {
			return r.call(ctx, "kv/cas", &pb.KvCasRequest{Key: []byte("effect/" + id), Value: []byte(id)}, &pb.KvCasResponse{})
		},
		seen: func(ctx context.Context, c *harness.Cluster, provider string) (map[string]int, error) {
			return keys(ctx, c, provider, "shared", "effect/")
		},
	}
}

// keys lists the keys of a bucket and how often each was written.
func keys(ctx context.Context, c *harness.Cluster, provider, bucket, prefix string) (map[string]int, error) {
	all := map[string]int{}
	req := &pb.KvListRequest{Prefix: []byte(prefix), Limit: 1000, KeysOnly: true}
	for {
		payload, err := proto.Marshal(req)
		if err != nil {
			return nil, err
		}
		answer, err := c.Client.CallProvider(ctx, &pb.CallProviderRequest{
			ProviderId: provider, Capability: "kv", Operation: "list", Payload: payload, Bucket: bucket,
		})
		if err != nil {
			return nil, err
		}
		page := &pb.KvListResponse{}
		if err := proto.Unmarshal(answer.Payload, page); err != nil {
			return nil, err
		}
		for _, e := range page.Entries {
			all[strings.TrimPrefix(string(e.Key), prefix)]++
		}
		if req.Cursor = page.NextCursor; len(req.Cursor) == 0 {
			return all, nil
		}
	}
}

// messagingKind publishes durable messages; a workload that is subscribed notes
// what it was given.
func messagingKind() kind {
	return kind{
		name: "messaging", tags: "messaging", twice: true,
		spec:        &pb.ProviderSpec{Type: "messaging", Config: map[string]string{"durable": "true", "ack_wait": "2s"}},
		update:      map[string]string{"durable": "true", "ack_wait": "2s", "max_in_flight": "32"},
		permissions: slices.Concat(baseMessaging, []string{"msg:publish:life"}),
		do: func(ctx context.Context, r *relay, id string) error {
			return r.call(ctx, "messaging/publish", &pb.MsgPublishRequest{Subject: "life", Payload: []byte(id)}, &pb.MsgPublishResponse{})
		},
		prepare: func(t *testing.T, c *harness.Cluster, provider string) {
			t.Helper()
			startRelay(t, c, "kv,messaging", &pb.WorkloadSpec{
				Name: "witness-" + provider, Limits: &pb.InstanceLimits{Concurrency: 8}, Placement: &pb.PlacementRules{Node: "n1"},
				Triggers: []*pb.Trigger{{Trigger: &pb.Trigger_Subscribe{Subscribe: "life"}}},
				Capabilities: []*pb.CapabilityGrant{
					{Provider: "kv", Permissions: slices.Concat(baseKV, []string{"kv:write:seen/"}), Bucket: provider},
					{Provider: provider, Permissions: slices.Concat(baseMessaging, []string{"msg:subscribe:life"})},
				},
			})
		},
		seen: func(ctx context.Context, c *harness.Cluster, provider string) (map[string]int, error) {
			return keys(ctx, c, "kv", provider, "seen/")
		},
	}
}

// tally counts effects that reach the test's own process.
type tally struct {
	mu    sync.Mutex
	count map[string]int
	gate  chan struct{} // closed while effects need not wait
	held  int
}

func newTally() *tally {
	open := make(chan struct{})
	close(open)
	return &tally{count: map[string]int{}, gate: open}
}

// had counts an effect, once the gate is open.
func (e *tally) had(ctx context.Context, id string) error {
	e.mu.Lock()
	gate := e.gate
	e.held++
	e.mu.Unlock()
	var err error
	select {
	case <-gate:
	case <-ctx.Done():
		err = ctx.Err()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held--
	if err == nil {
		e.count[id]++
	}
	return err
}

// waiting returns how many effects wait for the gate.
func (e *tally) waiting() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.held
}

func (e *tally) seen(context.Context, *harness.Cluster, string) (map[string]int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.count), nil
}

// hold closes the gate and returns what opens it.
func (e *tally) hold() func() {
	gate := make(chan struct{})
	e.mu.Lock()
	e.gate = gate
	e.mu.Unlock()
	return sync.OnceFunc(func() { close(gate) })
}

func httpKind(t *testing.T) kind {
	t.Helper()
	effects := newTally()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := io.ReadAll(r.Body)
		if err == nil {
			err = effects.had(r.Context(), string(id))
		}
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	return kind{
		name: "http", tags: "http",
		spec:        &pb.ProviderSpec{Type: "http"},
		update:      map[string]string{"max_response_bytes": "1MiB"},
		permissions: []string{"http:request", "http:domain:" + host},
		do: func(ctx context.Context, r *relay, id string) error {
			resp := &pb.HttpResponse{}
			err := r.call(ctx, "http/request", &pb.HttpRequest{Method: "POST", Url: server.URL + "/effects", Body: []byte(id)}, resp)
			if err == nil && resp.Status != http.StatusOK {
				return &refusal{&pb.Error{Message: fmt.Sprintf("status %d", resp.Status)}}
			}
			return err
		},
		seen: effects.seen, hold: effects.hold, held: effects.waiting,
	}
}

// externalServer is a provider of somebody's own.
type externalServer struct {
	pb.UnimplementedProviderServiceServer
	effects *tally
}

func (s *externalServer) Describe(context.Context, *pb.ProviderServiceDescribeRequest) (*pb.ProviderServiceDescribeResponse, error) {
	return &pb.ProviderServiceDescribeResponse{Operations: []*pb.ProviderOperation{{Name: "effect"}}, Version: "test"}, nil
}

func (s *externalServer) Invoke(ctx context.Context, req *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
	if err := s.effects.had(ctx, string(req.Payload)); err != nil {
		return nil, err
	}
	return &pb.ProviderServiceInvokeResponse{Payload: req.Payload}, nil
}

func externalKind(t *testing.T) kind {
	t.Helper()
	effects := newTally()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterProviderServiceServer(server, &externalServer{effects: effects})
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	return kind{
		name: "external", tags: "provider",
		spec:        &pb.ProviderSpec{Type: "external", Config: map[string]string{"address": l.Addr().String()}},
		update:      map[string]string{"address": l.Addr().String(), "timeout": "20s"},
		permissions: nil, // provider:<id>:effect; see grants
		do: func(ctx context.Context, r *relay, id string) error {
			return r.call(ctx, "provider/call", &pb.ProviderCallRequest{Operation: "effect", Payload: []byte(id)}, &pb.ProviderCallResponse{})
		},
		seen: effects.seen, hold: effects.hold, held: effects.waiting,
	}
}

// grants are the permissions with which a relay uses a provider of this kind.
func (k *kind) grants(provider string) []*pb.CapabilityGrant {
	grant := &pb.CapabilityGrant{Provider: provider, Permissions: k.permissions}
	switch k.name {
	case "kv":
		grant.Bucket = "shared"
	case "external":
		grant.Permissions = []string{"provider:" + provider + ":effect"}
	}
	return []*pb.CapabilityGrant{grant}
}
