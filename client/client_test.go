package client_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func stop(t *testing.T, ctx context.Context, c *client.Client) error {
	t.Helper()
	_, err := c.StopInstance(ctx, &pb.StopInstanceRequest{Target: "hello"})
	return err
}

// deadAddress returns an address at which nobody listens.
func deadAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func TestCallGoesToTheFirstPeerThatAnswersAndStaysThere(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n2")
	c := w.client(t, client.Config{Addresses: []string{deadAddress(t), p.address}})
	for range 3 {
		if err := stop(t, t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.count("stop"); got != 3 {
		t.Errorf("%d calls, want 3", got)
	}
}

func TestMutatingCallRidesThroughAnElectionWithOneRequestID(t *testing.T) {
	w := newWorld(t)
	electing := func(_ string, n int) error {
		switch n {
		case 1:
			return noLeader()
		case 2:
			return unreachable()
		default:
			return nil
		}
	}
	a, b := w.peer(t, "n1").answers(electing), w.peer(t, "n2").answers(electing)
	c := w.client(t, client.Config{Addresses: []string{a.address, b.address}})
	if err := stop(t, t.Context(), c); err != nil {
		t.Fatal(err)
	}
	ids := append(a.seen(), b.seen()...)
	if len(ids) != 5 || ids[0] == "" || len(slices.Compact(ids)) != 1 {
		t.Errorf("request ids %q, want one id in 5 attempts", ids)
	}
}

func TestOwnRequestIDIsKeptAndTheRequestIsNotChanged(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	own, none := &pb.StopInstanceRequest{Target: "x", RequestId: "mine"}, &pb.StopInstanceRequest{Target: "x"}
	for _, req := range []*pb.StopInstanceRequest{own, none, none} {
		if _, err := c.StopInstance(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	ids := p.seen()
	if ids[0] != "mine" || ids[1] == "" || ids[1] == ids[2] {
		t.Errorf("request ids %q, want the own one and two different new ones", ids)
	}
	if none.GetRequestId() != "" {
		t.Errorf("the caller's request was changed: %v", none)
	}
}

func TestOnlySafeCallsAreRepeated(t *testing.T) {
	w := newWorld(t)
	invoke := func(ctx context.Context, c *client.Client) error {
		_, err := c.Invoke(ctx, &pb.InvokeRequest{Target: "hello"})
		return err
	}
	provider := func(operation string) func(context.Context, *client.Client) error {
		return func(ctx context.Context, c *client.Client) error {
			_, err := c.CallProvider(ctx, &pb.CallProviderRequest{ProviderId: "kv", Capability: "kv", Operation: operation})
			return err
		}
	}
	remove := func(ctx context.Context, c *client.Client) error {
		_, err := c.Remove(ctx, &pb.RemoveRequest{PeerId: "n9"})
		return err
	}
	list := func(ctx context.Context, c *client.Client) error {
		_, err := c.ListNodes(ctx, &pb.ListNodesRequest{})
		return err
	}
	conflict := func() error { return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "name in use") }
	unavailable := func() error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "kv is stopped")
	}
	tests := []struct {
		name, kind string
		call       func(context.Context, *client.Client) error
		failure    func() error
		want       int
	}{
		{name: "Invoke that may have run", kind: "invoke", call: invoke, failure: unreachable, want: 1},
		{name: "Invoke without a leader", kind: "invoke", call: invoke, failure: noLeader, want: 1},
		{name: "kv set that may have run", kind: "set", call: provider("set"), failure: unreachable, want: 1},
		{name: "kv get", kind: "get", call: provider("get"), failure: unreachable, want: 2},
		{name: "kv get of a stopped provider", kind: "get", call: provider("get"), failure: unavailable, want: 1},
		{name: "Remove without a leader", kind: "remove", call: remove, failure: noLeader, want: 2},
		{name: "Remove that may have run", kind: "remove", call: remove, failure: unreachable, want: 1},
		{name: "a read", kind: "nodes", call: list, failure: unreachable, want: 2},
		{name: "a refusal", kind: "nodes", call: list, failure: conflict, want: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := w.peer(t, "n1").answers(func(_ string, n int) error {
				if n == 1 {
					return tt.failure()
				}
				return nil
			})
			c := w.client(t, client.Config{Addresses: []string{p.address}})
			err := tt.call(t.Context(), c)
			if got := p.count(tt.kind); got != tt.want {
				t.Errorf("it was called %d times, want %d", got, tt.want)
			}
			if (err == nil) != (tt.want == 2) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestInvokeThatWasNeverSentGoesToTheNextPeer(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n2")
	c := w.client(t, client.Config{Addresses: []string{deadAddress(t), p.address}})
	if _, err := c.Invoke(t.Context(), &pb.InvokeRequest{Target: "hello"}); err != nil {
		t.Fatal(err)
	}
}

func TestInvokeIsNotRepeatedWhenThePeerDiesUnderIt(t *testing.T) {
	w := newWorld(t)
	dying, other := w.peer(t, "n1"), w.peer(t, "n2")
	dying.answers(func(string, int) error {
		go dying.server.Stop()
		<-t.Context().Done()
		return nil
	})
	c := w.client(t, client.Config{Addresses: []string{dying.address, other.address}})
	if _, err := c.Invoke(t.Context(), &pb.InvokeRequest{Target: "hello"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
		t.Errorf("got %v, want COMMUNICATION_FAILURE", err)
	}
	if got := other.count("invoke"); got != 0 {
		t.Errorf("it was repeated %d times", got)
	}
	if err := stop(t, t.Context(), c); err != nil {
		t.Errorf("the next call does not find the other peer: %v", err)
	}
}

func TestGivingUpExplainsItself(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(correlation.With(t.Context(), "cid-1"), time.Second)
	defer cancel()

	dead := deadAddress(t)
	err := stop(t, ctx, w.client(t, client.Config{Addresses: []string{dead}}))
	got := apierror.From(err).Proto(t.Context())
	if got.GetCode() != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE || !strings.HasPrefix(got.GetMessage(), "no peer could be reached within ") ||
		!strings.Contains(got.GetDetails()[dead], "connection refused") || got.GetCorrelationId() != "cid-1" || got.GetNextStep() == "" {
		t.Errorf("dead peer: got %v", got)
	}
	if strings.Contains(got.GetDetails()[dead], "desc =") {
		t.Errorf("the reason still has what gRPC wraps around it: %s", got.GetDetails()[dead])
	}

	p := w.peer(t, "n1").answers(func(string, int) error { return noLeader() })
	c := w.client(t, client.Config{Addresses: []string{p.address}, Timeout: 2 * time.Second})
	got = apierror.From(stop(t, t.Context(), c)).Proto(t.Context())
	if got.GetCode() != pb.ErrorCode_ERROR_CODE_NO_LEADER || got.GetDetails()["quorum"] != "2" || got.GetDetails()["gave up after"] == "" || got.GetNextStep() != "start n1 or n3" {
		t.Errorf("no leader: got %v", got)
	}
	if n := p.count("stop"); n < 3 {
		t.Errorf("only %d attempts in two seconds", n)
	}

	cancelled, stopNow := context.WithCancel(t.Context())
	stopNow()
	if err := stop(t, cancelled, c); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v, want context.Canceled", err)
	}
}

// A peer sees the deadline of a call by its own clock.
func TestAPeerThatGivesUpFirstHidesNoReason(t *testing.T) {
	w := newWorld(t)
	const timeout = time.Second
	p := w.peer(t, "n1")
	ends := time.Now().Add(timeout)
	p.answers(func(_ string, n int) error {
		if n == 1 {
			return noLeader()
		}
		<-time.After(time.Until(ends.Add(-10 * time.Millisecond)))
		return apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "context deadline exceeded")
	})
	err := stop(t, t.Context(), w.client(t, client.Config{Addresses: []string{p.address}, Timeout: timeout}))
	if got := apierror.From(err); got.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || got.Detail("gave up after") == "" {
		t.Errorf("got %v", err)
	}
}

func TestWrongIdentityFailsAtOnceAndSaysWhy(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	peer, stranger := w.peer(t, "n1"), other.peer(t, "n1")
	worker := w.serve(t, w.issue(t, identity.Node, "w1", identity.RoleWorker))
	tests := map[string]struct {
		address, want string
	}{
		"another authority": {stranger.address, "certificate was not issued by this cluster's authority"},
		"a worker":          {worker.address, "subject is not allowed on this connection: spiffe://dev/node/w1/worker answered"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			err := stop(t, t.Context(), w.client(t, client.Config{Addresses: []string{tt.address}}))
			if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("it took %s", d)
			}
		})
	}
	c := w.client(t, client.Config{Addresses: []string{stranger.address, peer.address}})
	if err := stop(t, t.Context(), c); err != nil {
		t.Errorf("one strange address keeps the client from the good one: %v", err)
	}
}

func TestFurtherPeersAreLearnedFromStatus(t *testing.T) {
	w := newWorld(t)
	a, b := w.peer(t, "n1"), w.peer(t, "n2")
	a.status = &pb.StatusResponse{PeerId: "n1", Peers: []*pb.PeerStatus{{ApiAddress: a.address}, {ApiAddress: b.address}, {}}}
	b.status = &pb.StatusResponse{PeerId: "n2"}
	c := w.client(t, client.Config{Addresses: []string{a.address}, Timeout: 2 * time.Second})
	if _, err := c.Status(t.Context(), &pb.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	a.server.Stop()
	if err := stop(t, t.Context(), c); err != nil {
		t.Fatalf("the learned peer is not used: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if got, err := c.Status(ctx, &pb.StatusRequest{}); err == nil {
		t.Errorf("a learned peer answered Status: %v", got)
	}
}

func TestLeaderNamedInARefusalIsAsked(t *testing.T) {
	w := newWorld(t)
	leader := w.peer(t, "n2")
	follower := w.peer(t, "n1").answers(func(string, int) error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "not the leader").With("leader_api_address", leader.address)
	})
	c := w.client(t, client.Config{Addresses: []string{follower.address}})
	if err := stop(t, t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if leader.count("stop") != 1 {
		t.Error("the leader was not asked")
	}
}

func TestCorrelationIDOfTheContextIsUsed(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	if _, err := c.ListNodes(correlation.With(t.Context(), "my-id"), &pb.ListNodesRequest{}); err != nil {
		t.Fatal(err)
	}
	if got := p.seen(); got[0] != "my-id" {
		t.Errorf("the peer saw %q", got)
	}
}

func TestNewRefusesAnUnusableConfig(t *testing.T) {
	w := newWorld(t)
	for name, cfg := range map[string]client.Config{
		"no address":  {Identity: w.user},
		"no identity": {Addresses: []string{"127.0.0.1:7400"}},
		"bad address": {Addresses: []string{"a b\x00://"}, Identity: w.user},
	} {
		if c, err := client.New(cfg); err == nil {
			t.Errorf("%s was accepted", name)
			_ = c.Close()
		}
	}
}
