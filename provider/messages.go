package provider

import "context"

// Subscription is one subject that an instance is subscribed to at a messaging
// provider, and that a permission of its covers.
type Subscription struct {
	// Instance is the instance's id, Name its workload's name, Node the id of the
	// node that it is placed on.
	Instance, Name, Node string
	// Generation is that of the instance's placement, Created the Raft index at
	// which the instance was accepted; 0 when not known.
	Generation, Created uint64
	// Provider is the messaging provider's id, Subject the subject, which may hold
	// wildcards.
	Provider, Subject string
}

// Messages is what a messaging provider gets from its node: who is subscribed,
// and the ways to record a subscription and to deliver a message. It is safe for
// concurrent use.
type Messages interface {
	// Subscriptions returns the allowed subscriptions at a provider, sorted by
	// Name, Subject and Instance.
	Subscriptions(provider string) []Subscription
	// Changed returns a channel that is closed when Subscriptions may answer
	// otherwise than before.
	Changed() <-chan struct{}
	// Record adds or ends the subscription of a call's instance. When it returns
	// without an error the change is committed and visible in Subscriptions;
	// existed says whether there was such a subscription before.
	Record(ctx context.Context, call Call, provider, subject string, subscribed bool) (existed bool, err error)
	// Deliver hands an encoded Message to an instance, wherever it runs, and
	// returns the encoded MessageResult. message is only valid during the call.
	Deliver(ctx context.Context, to Subscription, message []byte) (result []byte, err error)
}

// Follower is an optional ability of a Provider: a user listens in.
type Follower interface {
	// Follow passes every message on subject to sink until ctx ends, sink fails or
	// the provider closes. sink gets an encoded Message, and how many were dropped
	// before it because the listener was slow; the first time, when the
	// subscription stands, it gets nil and 0.
	Follow(ctx context.Context, subject string, sink func(message []byte, dropped uint64) error) error
}
