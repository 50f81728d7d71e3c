package agent

import (
	"context"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// courier is what the messaging providers of this node get from it. It
// implements provider.Messages.
type courier struct {
	node      string
	directory *provider.Directory
	// record commits that a subscription begins or ends, wherever that is done.
	record func(ctx context.Context, call provider.Call, id, subject string, subscribed bool) (existed bool, err error)
	// local hands a message to an instance of this node.
	local func(ctx context.Context, instance string, message []byte) ([]byte, error)
	conn  Dial
}

// Subscriptions returns the allowed subscriptions at a provider.
func (m *courier) Subscriptions(id string) []provider.Subscription {
	return m.directory.Subscriptions(id)
}

// Changed returns a channel that is closed at the next change of the directory.
func (m *courier) Changed() <-chan struct{} { return m.directory.Changed() }

// Record commits that a subscription begins or ends, and waits until this node
// knows. Its errors wrap the sentinels of package provider.
func (m *courier) Record(ctx context.Context, call provider.Call, id, subject string, subscribed bool) (bool, error) {
	existed, err := m.record(ctx, call, id, subject, subscribed)
	if err != nil {
		return false, remote.FromAPI(err)
	}
	for {
		changed := m.directory.Changed() // before looking, so that no change is missed
		if m.knows(call.Instance, id, subject) == subscribed {
			return existed, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false, provider.FromContext(ctx)
		}
	}
}

func (m *courier) knows(instance, id, subject string) bool {
	return slices.ContainsFunc(m.directory.Subscriptions(id), func(s provider.Subscription) bool {
		return s.Instance == instance && s.Subject == subject
	})
}

// Deliver hands an encoded Message to an instance and returns the encoded
// MessageResult. Its errors wrap the sentinels of package provider: an instance
// that did not take the message is ErrInstanceNotFound, ErrConflict, ErrExhausted,
// ErrDenied, ErrInvalid or ErrUnavailable.
func (m *courier) Deliver(ctx context.Context, to provider.Subscription, message []byte) ([]byte, error) {
	ctx, _ = correlation.Ensure(ctx)
	if to.Node == m.node {
		answer, err := m.local(ctx, to.Instance, message)
		if err != nil {
			return nil, remote.FromAPI(err)
		}
		return answer, nil
	}
	address, ok := m.directory.NodeAddress(to.Node)
	if !ok {
		return nil, provider.Errorf(provider.ErrUnavailable, "the address of node %s is not known here", to.Node).With("node", to.Node)
	}
	conn, err := m.conn(address)
	if err != nil {
		return nil, remote.FromAPI(err)
	}
	req := &pb.DeliverMessageRequest{InstanceId: to.Instance, Message: &pb.Message{}}
	if err := proto.Unmarshal(message, req.GetMessage()); err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "a message that is to be delivered is damaged: %s", err)
	}
	// The agent there knows how long the instance may take, and bounds it.
	ctx, cancel := context.WithTimeout(ctx, maxDelivery)
	defer cancel()
	resp, err := pb.NewNodeAgentServiceClient(conn).DeliverMessage(ctx, req)
	if err != nil {
		return nil, remote.FromAPI(err)
	}
	answer, err := proto.Marshal(resp.GetResult())
	if err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "the result of a message cannot be encoded: %s", err)
	}
	return answer, nil
}

// recordSubscription commits that a subscription begins or ends, at the leader or,
// without a control plane, in the journal.
func (a *Agent) recordSubscription(ctx context.Context, call provider.Call, id, subject string, subscribed bool) (bool, error) {
	if a.standalone != nil {
		return a.standalone.subscribe(call, id, subject, subscribed)
	}
	return a.session.recordSubscription(ctx, call, id, subject, subscribed)
}
