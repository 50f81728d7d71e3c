package fsm

import (
	"slices"
	"strconv"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// MaxSubscriptions is the most subscriptions of one assignment.
	MaxSubscriptions = 64
	// maxSubjectBytes bounds one subject.
	maxSubjectBytes = 255
)

// recordSubscription adds or ends a subscription of an instance at a messaging
// provider, as asked by a node that hosts the provider. The answer names the
// subject when that changed anything; repeating it changes nothing.
func (t *tx) recordSubscription(c *pb.RecordSubscriptionRequest) ([]string, *refusal) {
	node, r := t.liveNode(c.GetNodeId(), c.GetEpoch())
	if r != nil {
		return nil, r
	}
	if r := checkSubject(c.GetSubject()); r != nil {
		return nil, r
	}
	if r := t.hostsMessaging(node, c.GetProviderId()); r != nil {
		return nil, r
	}
	if r := t.subscriber(c); r != nil {
		return nil, r
	}
	old, ok := t.assignment(c.GetInstanceId(), c.GetProviderId())
	if !ok {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
			"instance %q was not granted provider %q", c.GetInstanceId(), c.GetProviderId()).
			with("instance", c.GetInstanceId()).
			with("provider", c.GetProviderId()).
			next("wasmatrix grant %s %s msg:subscribe:%s", c.GetInstanceId(), c.GetProviderId(), c.GetSubject())
	}
	at, subscribed := slices.BinarySearch(old.GetSubscriptions(), c.GetSubject())
	if subscribed == c.GetSubscribed() {
		return nil, nil
	}
	a := shallow(old)
	kind := pb.EventKind_EVENT_KIND_SUBSCRIPTION_REMOVED
	if c.GetSubscribed() {
		if r := checkSubscriptions(c.GetProviderId(), len(old.GetSubscriptions())+1); r != nil {
			return nil, r.with("instance", c.GetInstanceId())
		}
		kind = pb.EventKind_EVENT_KIND_SUBSCRIPTION_ADDED
		a.Subscriptions = slices.Insert(slices.Clone(old.GetSubscriptions()), at, c.GetSubject())
	} else {
		a.Subscriptions = slices.Delete(slices.Clone(old.GetSubscriptions()), at, at+1)
	}
	t.putAssignment(a)
	t.capabilityEvent(kind, a.GetInstanceId(), a.GetProviderId(), c.GetSubject())
	return []string{c.GetSubject()}, nil
}

// hostsMessaging refuses a node that does not run the messaging provider in its
// present epoch.
func (t *tx) hostsMessaging(node *pb.Node, providerID string) *refusal {
	replicas := t.replicas(providerID)
	if len(replicas) == 0 {
		return providerNotFound(providerID)
	}
	if kind := replicas[0].GetSpec().GetType(); kind != typeMessaging {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"provider %q is of type %s, and only providers of type messaging have subscriptions", providerID, kind).
			with("provider", providerID).
			with("type", kind)
	}
	for _, p := range replicas {
		if held(node, p.GetPlacement(), p.GetPlacement().GetGeneration()) {
			return nil
		}
	}
	return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "node %q does not run provider %q", node.GetId(), providerID).
		with("node", node.GetId()).
		with("provider", providerID).
		next("call the provider again; it may run elsewhere by now")
}

// subscriber refuses an instance that has ended, and a generation of it that is
// not the present one.
func (t *tx) subscriber(c *pb.RecordSubscriptionRequest) *refusal {
	in, ok := t.instance(c.GetInstanceId())
	if !ok {
		return instanceNotFound(c.GetInstanceId())
	}
	if now := in.GetPlacement().GetGeneration(); now != c.GetGeneration() || Ended(in) {
		return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT,
			"generation %d of instance %q is not the present one", c.GetGeneration(), in.GetId()).
			with("instance", in.GetId()).
			with("generation", strconv.FormatUint(now, 10)).
			with("state", in.GetStatus().GetState().String()).
			next("wasmatrix instance get %s", in.GetId())
	}
	return nil
}

func checkSubscriptions(providerID string, n int) *refusal {
	if n <= MaxSubscriptions {
		return nil
	}
	return refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
		"an instance has at most %d subscriptions at one provider", MaxSubscriptions).
		with("provider", providerID).
		with("limit", strconv.Itoa(MaxSubscriptions)).
		next("unsubscribe from some, or use wildcards")
}

// checkSubject keeps what is stored a word without spaces; the grammar of
// subjects is judged by whoever proposes one.
func checkSubject(subject string) *refusal {
	bad := subject == "" || len(subject) > maxSubjectBytes
	for i := range len(subject) {
		bad = bad || subject[i] <= ' ' || subject[i] == 0x7f
	}
	if !bad {
		return nil
	}
	return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
		"the subject is empty, longer than %d bytes or holds a space", maxSubjectBytes).
		with("subject", strconv.QuoteToASCII(line(subject)))
}

// triggered returns what each instance of a workload is subscribed to from the
// beginning, by provider. Every subscribe trigger of the spec must have its target
// among the granted messaging providers.
func (t *tx) triggered(c *pb.CreateInstancesCommand, grants []*pb.CapabilityGrant) (map[string][]string, *refusal) {
	granted := make(map[string]bool, len(grants))
	for _, g := range grants {
		granted[g.GetProvider()] = true
	}
	targets := make(map[string]string, len(c.GetTriggers()))
	for _, target := range c.GetTriggers() {
		targets[target.GetSubject()] = target.GetProviderId()
	}
	out := map[string][]string{}
	for _, trigger := range c.GetSpec().GetTriggers() {
		way, ok := trigger.GetTrigger().(*pb.Trigger_Subscribe)
		if !ok {
			continue
		}
		if r := checkSubject(way.Subscribe); r != nil {
			return nil, r
		}
		id := targets[way.Subscribe]
		p, ok := t.provider(id)
		if !ok || !granted[id] || p.GetSpec().GetType() != typeMessaging {
			return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
				"the trigger on subject %q has no granted messaging provider", way.Subscribe).
				with("subject", way.Subscribe).
				with("provider", id).
				next("grant a messaging provider the permission msg:subscribe:%s", way.Subscribe)
		}
		subjects := ordered(append(out[id], way.Subscribe))
		if r := checkSubscriptions(id, len(subjects)); r != nil {
			return nil, r
		}
		out[id] = subjects
	}
	return out, nil
}
