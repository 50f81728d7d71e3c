package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/runtime"
)

const (
	// deliverySlack is how much longer than the instance's time limit a delivery may take.
	deliverySlack = 5 * time.Second
	// maxDelivery bounds a delivery to another node, whatever the instance's limit.
	maxDelivery = time.Hour
	// turnPatience is how long a message waits for one of the instance's slots before
	// the instance counts as busy. Another replica may be free.
	turnPatience = time.Second
)

// turns lets as many messages into an instance at once as it handles at once, so
// that each has the instance's whole time limit once it is in.
type turns struct {
	mu   sync.Mutex
	gone map[string]*turn // by instance
}

// turn is the slots of one instance; users counts those that hold or want one.
type turn struct {
	slots chan struct{}
	users int
}

// enter waits for a slot; leave gives it back.
func (t *turns) enter(ctx context.Context, instance string, limit int) (leave func(), ok bool) {
	t.mu.Lock()
	if t.gone == nil {
		t.gone = map[string]*turn{}
	}
	own := t.gone[instance]
	if own == nil || cap(own.slots) != limit {
		own = &turn{slots: make(chan struct{}, limit)}
		t.gone[instance] = own
	}
	own.users++
	t.mu.Unlock()
	forget := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.users--; own.users == 0 && t.gone[instance] == own {
			delete(t.gone, instance)
		}
	}
	select {
	case own.slots <- struct{}{}:
	default:
		wait := time.NewTimer(turnPatience)
		defer wait.Stop()
		select {
		case own.slots <- struct{}{}:
		case <-wait.C:
			forget()
			return nil, false
		case <-ctx.Done():
			forget()
			return nil, false
		}
	}
	return func() {
		<-own.slots
		forget()
	}, true
}

// deliver hands an encoded Message to an instance of this node and returns the
// encoded MessageResult. Its errors are those of Invoke; a busy instance is
// RESOURCE_EXHAUSTED within turnPatience.
func (a *Agent) deliver(ctx context.Context, instance string, message []byte) ([]byte, error) {
	limit, timeout, ok := a.worker.bounds(instance)
	if !ok {
		return nil, errNoInstance(instance, a.nodeID())
	}
	leave, ok := a.turns.enter(ctx, instance, limit)
	if !ok {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "instance %s is busy", instance).
			With("instance", instance).With("node", a.nodeID()).
			Next("raise limits.concurrency or replicas of the workload")
	}
	defer leave()
	ctx, cancel := context.WithTimeout(ctx, timeout+deliverySlack)
	defer cancel()
	return a.worker.invoke(ctx, instance, runtime.HandlerMessage, message)
}

// bounds returns how many calls an instance handles at once, and how long one may take.
func (w *worker) bounds(id string) (concurrency int, timeout time.Duration, ok bool) {
	w.mu.Lock()
	s, ok := w.supervisors[id]
	w.mu.Unlock()
	if !ok {
		return 0, 0, false
	}
	s.mu.Lock()
	limits := s.inst.GetSpec().GetLimits()
	s.mu.Unlock()
	timeout = limits.GetTimeout().AsDuration()
	if timeout <= 0 {
		timeout = defaultCallTimeout
	}
	return max(int(limits.GetConcurrency()), defaultConcurrency), timeout, true
}

// DeliverMessage hands a message to an instance of this node, for the messaging
// provider that runs on the caller's.
func (s *service) DeliverMessage(ctx context.Context, req *pb.DeliverMessageRequest) (*pb.DeliverMessageResponse, error) {
	caller, _ := identity.Caller(ctx)
	if len(metadata.ValueFromIncomingContext(ctx, identity.ForwardedCallerKey)) > 0 {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "a message is delivered by the agent of the provider's node itself, not through a peer")
	}
	if err := mayDeliver(s.agent.directory, caller.Name, req.GetInstanceId(), req.GetMessage()); err != nil {
		return nil, err
	}
	message, err := proto.Marshal(req.GetMessage())
	if err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the message cannot be encoded: %s", err)
	}
	answer, err := s.agent.deliver(ctx, req.GetInstanceId(), message)
	if err != nil {
		return nil, err
	}
	result := &pb.MessageResult{}
	if err := proto.Unmarshal(answer, result); err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR,
			"instance %s answered with something that is not a MessageResult", req.GetInstanceId()).
			With("instance", req.GetInstanceId()).With("node", s.agent.nodeID()).
			Next("mend what %s returns in the module", runtime.HandlerMessage)
	}
	return &pb.DeliverMessageResponse{Result: result}, nil
}

// mayDeliver refuses a message unless, by all that this node knows, the provider
// that it comes from runs on the caller's node, and the instance is here, is
// subscribed so, and may be. The caller is trusted with nothing but its name.
func mayDeliver(d *provider.Directory, node, instance string, m *pb.Message) error {
	refuse := func(format string, args ...any) *apierror.Error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, format, args...).
			With("instance", instance).With("provider", m.GetProvider()).With("subject", m.GetSubject()).With("caller", node)
	}
	if !slices.ContainsFunc(d.Replicas(m.GetProvider()), func(r provider.ProviderRecord) bool {
		return r.Type == permission.Messaging && r.Node == node
	}) {
		return refuse("messaging provider %s does not run on node %s", m.GetProvider(), node)
	}
	rec, ok := d.Instance(instance)
	if !ok || rec.Node != d.Self() {
		return errNoInstance(instance, d.Self())
	}
	for _, a := range d.Assignments(instance) {
		if a.Provider != m.GetProvider() || !slices.Contains(a.Subscriptions, m.GetSubscription()) {
			continue
		}
		for _, subject := range []string{m.GetSubscription(), m.GetSubject()} {
			need := permission.Need{Capability: permission.Messaging, Action: permission.Subscribe, Resource: subject}
			if _, allowed := a.Permissions.Allows(need); !allowed {
				return refuse("%s may not get messages of %s: %s", rec.Name, subject, a.Permissions.Explain(need))
			}
		}
		if !matchesSubject(m.GetSubscription(), m.GetSubject()) {
			return refuse("subject %s does not match the subscription %s", m.GetSubject(), m.GetSubscription())
		}
		return nil
	}
	return refuse("%s is not subscribed to %s", rec.Name, m.GetSubscription())
}

// matchesSubject reports whether a subject matches a subscription: a permission
// for the one covers the other.
func matchesSubject(pattern, subject string) bool {
	p, err := permission.Parse("msg:publish:" + pattern)
	return err == nil && p.Covers(permission.Need{
		Capability: permission.Messaging, Action: permission.Publish, Resource: subject,
	})
}

// SubscribeMessages streams the messages of a messaging provider of this node to a
// user.
func (s *service) SubscribeMessages(req *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
	err := s.agent.providers.Follow(stream.Context(), req.GetProviderId(), req.GetSubject(), func(message []byte, dropped uint64) error {
		resp := &pb.SubscribeMessagesResponse{Dropped: dropped}
		if message != nil {
			resp.Message = &pb.Message{}
			if err := proto.Unmarshal(message, resp.GetMessage()); err != nil {
				return provider.Errorf(provider.ErrInternal, "a message cannot be read: %s", err)
			}
		}
		return stream.Send(resp)
	})
	if err != nil {
		return s.toAPI(err)
	}
	return nil
}
