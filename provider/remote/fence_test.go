package remote_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// until is a tenure that ends at a moment.
type until time.Duration

func (u until) Ends() (time.Duration, bool) { return time.Duration(u), clock()() < time.Duration(u) }

// A request that hangs in the network, or in a process that stands still, and
// arrives after the caller's tenure, has no effect there.
func TestACallThatIsHeldUpBeyondItsCallersTenureHasNoEffect(t *testing.T) {
	p := newPair(t)
	server := remote.NewServer(p.b.router)
	hold, refused := make(chan struct{}), make(chan error, 1)
	p.b.server.Stop()
	p.b.server = p.serve(t, p.listen("b:1"), p.issue(t, identity.Node, "b", identity.RoleWorker), &agentServer{
		invoke: func(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
			if string(req.GetPayload()) != string(setRequest(t, "orders/late", "x")) {
				return server.InvokeCapability(ctx, req)
			}
			<-hold
			resp, err := server.InvokeCapability(context.WithoutCancel(ctx), req)
			refused <- err
			return resp, err
		},
		read: server.ReadClock,
	})
	ends := clock()() + 2*time.Second
	tied := p.a.router.Port("i", 3, 5).Within(until(ends))
	if _, err := tied.Call(t.Context(), "kv", "set", setRequest(t, "orders/early", "x")); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := tied.Call(context.Background(), "kv", "set", setRequest(t, "orders/late", "x"))
		done <- err
	}()
	<-time.After(ends - clock()())
	close(hold)
	if err := <-refused; apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT {
		t.Errorf("the late call was served: %v", err)
	}
	if err := <-done; err == nil {
		t.Error("the late call succeeded")
	}
	if _, err := tied.Call(t.Context(), "kv", "set", setRequest(t, "orders/after", "x")); !errors.Is(err, provider.ErrConflict) {
		t.Errorf("a call after the end: %v", err)
	}
	for key, want := range map[string]bool{"orders/early": true, "orders/late": false, "orders/after": false} {
		if _, err := p.get(t, key); (err == nil) != want {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// A serving agent that was started anew has another clock; the caller learns it
// and its instance notices nothing.
func TestANewProcessAtTheSameAddressIsANewClock(t *testing.T) {
	p := newPair(t)
	if err := p.set(t, "orders/1", "one"); err != nil {
		t.Fatal(err)
	}
	p.b.server.Stop()
	p.b.server = p.serve(t, p.listen("b:1"), p.issue(t, identity.Node, "b", identity.RoleWorker), served(remote.NewServer(p.b.router)))
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := p.set(t, "orders/1", "two")
		if err == nil {
			break
		}
		if !errors.Is(err, provider.ErrCommunication) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if got, err := p.get(t, "orders/1"); err != nil || got != "two" {
		t.Errorf("%q, %v", got, err)
	}
}
