package remote

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// connectPatience is how long a call waits for a connection when another replica
// could take it.
const connectPatience = time.Second

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
	if call.Once && !hurry(ctx, conn) {
		return nil, unreachable(&call, address, errors.New("there is no connection yet"))
	}
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
		again := status.Code(err) == codes.Unavailable && (!sent || call.Repeatable) && !call.Once && attempt < len(c.delays)
		if !again || !pause.For(ctx, c.delays[attempt]) {
			return nil, broken(ctx, err, &call, address, sent)
		}
	}
}

// Probe reads the clock of the agent at address.
func (c *Client) Probe(ctx context.Context, address string) error {
	conn, err := c.conn(address)
	if err != nil {
		return err
	}
	if known, ok := conn.(*grpc.ClientConn); ok {
		known.ResetConnectBackoff() // it waits by itself for as long as we did
	}
	resp, err := pb.NewNodeAgentServiceClient(conn).ReadClock(ctx, &pb.ReadClockRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return errors.New(status.Convert(err).Message())
	}
	c.clocks.learn(address, resp.GetClock())
	return nil
}

// hurry waits for a connection, but not for long: a node that is gone without a
// word would hold the call up until its deadline, and there is another to ask.
func hurry(ctx context.Context, conn grpc.ClientConnInterface) bool {
	known, ok := conn.(*grpc.ClientConn)
	if !ok || known.GetState() == connectivity.Ready {
		return true
	}
	bounded, cancel := context.WithTimeout(ctx, connectPatience)
	defer cancel()
	known.Connect()
	for state := known.GetState(); state == connectivity.Idle || state == connectivity.Connecting; state = known.GetState() {
		if !known.WaitForStateChange(bounded, state) {
			return false
		}
	}
	return true // ready, or known to fail
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

// broken returns the error for a call that the transport failed.
func broken(ctx context.Context, err error, call *provider.RemoteCall, address string, sent bool) error {
	var out *provider.Error
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		out = provider.Errorf(provider.ErrTimeout, "node %s did not answer before the deadline", call.Node)
		if !sent {
			out = out.OnTheWay() // otherwise the operation may just take long
		}
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
		out = out.With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
	return out
}

func unreachable(call *provider.RemoteCall, address string, err error) *provider.Error {
	return provider.Errorf(provider.ErrCommunication, "node %s at %s could not be reached: %s", call.Node, address, err).
		With("node", call.Node).With("address", address).With("provider", call.Provider).
		NextStep("wasmatrix node list").Because(err).OnTheWay()
}
