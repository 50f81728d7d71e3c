package remote

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// Client calls providers of other nodes. It implements provider.Remote and is
// safe for concurrent use. It owns no connections.
type Client struct {
	conn   func(address string) (grpc.ClientConnInterface, error)
	clocks *clocks
	delays []time.Duration
}

// NewClient returns a Client. conn returns a shared connection to an agent,
// which stays its own; it must not block on the network. clock is the node's, the
// one that RemoteCall.NotAfter is measured with.
func NewClient(conn func(address string) (grpc.ClientConnInterface, error), clock provider.Clock) *Client {
	return &Client{
		conn: conn, clocks: newClocks(clock),
		delays: []time.Duration{20 * time.Millisecond, 100 * time.Millisecond},
	}
}

// Invoke makes one call of the agent at address, with ctx's deadline and
// correlation id. A call that certainly never left this node, or whose operation
// may be carried out twice, is tried again at most twice. Its errors are those
// of the serving side; ErrCommunication when it could not be reached or the
// connection broke, ErrTimeout after the deadline, both with the detail
// "outcome": "unknown" when the call may have been carried out.
func (c *Client) Invoke(ctx context.Context, address string, call provider.RemoteCall) ([]byte, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, provider.DefaultCallTime)
		defer cancel()
	}
	conn, err := c.conn(address)
	if err != nil {
		return nil, unreachable(&call, address, err)
	}
	agent := pb.NewNodeAgentServiceClient(conn)
	caller := &pb.InstanceCaller{InstanceId: call.Instance, Generation: call.Generation, NodeEpoch: call.NodeEpoch}
	req := &pb.InvokeCapabilityRequest{
		Caller:     &pb.InvokeCapabilityRequest_Instance{Instance: caller},
		ProviderId: call.Provider,
		Capability: call.Capability,
		Operation:  call.Operation,
		Payload:    call.Payload,
	}
	ctx = withCorrelation(ctx)
	for attempt := 0; ; attempt++ {
		var server peer.Peer // is set once the call has a connection to go out on
		err := c.clocks.limit(ctx, agent, address, caller, call.NotAfter)
		if err == nil {
			var resp *pb.InvokeCapabilityResponse
			resp, err = agent.InvokeCapability(ctx, req, grpc.Peer(&server))
			if err == nil {
				c.clocks.learn(address, resp.GetClock())
				return resp.GetPayload(), nil
			}
		}
		sent := server.Addr != nil
		if answered(err) {
			failure := FromAPI(err)
			if otherClock(failure) && attempt < len(c.delays) {
				c.clocks.forget(address)
				continue // that agent's process began anew and has not carried it out
			}
			return nil, failure
		}
		again := status.Code(err) == codes.Unavailable && (!sent || call.Repeatable) && attempt < len(c.delays)
		if !again || !wait(ctx, c.delays[attempt]) {
			return nil, broken(ctx, err, &call, address, sent)
		}
	}
}

// otherClock reports whether a call was refused because its limit is of a clock
// that the serving agent does not have.
func otherClock(err error) bool {
	e, ok := errors.AsType[*provider.Error](err)
	return ok && e.Details[detailClock] == clockUnknown
}

// withCorrelation makes the correlation id travel, also over a connection that
// does not see to it itself.
func withCorrelation(ctx context.Context) context.Context {
	id := correlation.ID(ctx)
	if md, ok := metadata.FromOutgoingContext(ctx); id == "" || ok && len(md.Get(correlation.Header)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, correlation.Header, id)
}

// answered reports whether the serving side made the error, not the transport.
func answered(err error) bool {
	st, _ := status.FromError(err)
	for _, d := range st.Details() {
		if _, ok := d.(*pb.Error); ok {
			return true
		}
	}
	return false
}

// wait waits for d; it reports false when ctx ends first.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// broken returns the error for a call that the transport failed.
func broken(ctx context.Context, err error, call *provider.RemoteCall, address string, sent bool) error {
	var out *provider.Error
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		out = provider.Errorf(provider.ErrTimeout, "node %s did not answer before the deadline", call.Node)
	case codes.Unavailable, codes.Canceled:
		out = unreachable(call, address, errors.New(status.Convert(err).Message()))
		if ended := provider.FromContext(ctx); ended != nil && errors.As(ended, &out) {
			break // the caller has gone; the rest is a consequence
		}
	default:
		return FromAPI(err)
	}
	out = out.With("node", call.Node).With("address", address).With("provider", call.Provider).Because(err)
	if sent && !call.Repeatable {
		out = out.With("outcome", "unknown")
	}
	return out
}

func unreachable(call *provider.RemoteCall, address string, err error) *provider.Error {
	return provider.Errorf(provider.ErrCommunication, "node %s at %s could not be reached: %s", call.Node, address, err).
		With("node", call.Node).With("address", address).With("provider", call.Provider).
		NextStep("wasmatrix node list").Because(err)
}
