package provider

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Port is one instance's way to its providers. It is safe for concurrent use
// and needs no closing: when the instance is gone from the directory or has a
// newer generation, its calls are refused.
type Port struct {
	router *Router
	caller Caller
	tenure Tenure
	// known are the facts of the last call of each kind: most are for the same
	// provider as the one before, and the directory has learnt nothing meanwhile.
	known []atomic.Pointer[knownFacts]
	// ended is set when the instance makes no calls any more.
	ended atomic.Bool

	mu sync.Mutex
	// flying counts the calls to other nodes that are under way; landed is closed
	// when there are none any more, and nil while nobody waits for that.
	flying int
	landed chan struct{}
	// doubt is until when a call without an answer may yet have its effect.
	doubt time.Duration
}

// Within makes the port's calls have no effect once tenure has ended, wherever the
// provider is, and returns p. It must be called before the first call.
func (p *Port) Within(tenure Tenure) *Port {
	p.tenure = tenure
	return p
}

// End makes every call fail, those that wait for a provider of this node too. It
// is for when the instance has ended.
func (p *Port) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended.Store(true)
}

// knownFacts are Facts and what they answer to.
type knownFacts struct {
	Facts

	version  uint64 // the directory's
	provider string // as the call named it
}

// facts returns what Directory.Facts does, without asking again while the directory
// has not changed.
func (p *Port) facts(kind *servedKind, provider string) *Facts {
	d := p.router.directory
	version := d.version.Load() // before looking: what changes meanwhile makes them old
	k := p.known[kind.at].Load()
	if k == nil || k.version != version || k.provider != provider {
		k = &knownFacts{Facts: d.Facts(p.caller.Instance, kind.Type(), provider), version: version, provider: provider}
		p.known[kind.at].Store(k)
	}
	return &k.Facts
}

// alive refuses a call once the instance has ended or its tenure has.
func (p *Port) alive() error {
	if p.ended.Load() {
		return Errorf(ErrConflict, "instance %s has ended", p.caller.Instance).With("instance", p.caller.Instance)
	}
	if p.tenure != nil {
		if at, held := p.tenure.Ends(); !held || p.router.clock() >= at {
			return tenureEnded(p.caller.Instance)
		}
	}
	return nil
}

// Settle waits, after End, until no call can have an effect any more, or until
// ctx ends. That is at once unless a call to another node got no answer; then it
// is when the time of that call is up.
func (p *Port) Settle(ctx context.Context) error {
	p.mu.Lock()
	landed := p.landed
	if p.flying > 0 && landed == nil {
		landed = make(chan struct{})
		p.landed = landed
	}
	p.mu.Unlock()
	if landed != nil {
		select {
		case <-landed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.mu.Lock()
	left := p.doubt - p.router.clock()
	p.mu.Unlock()
	if left <= 0 {
		return nil
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// takeOff counts a call to another node, unless the instance has ended.
func (p *Port) takeOff() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended.Load() {
		return p.alive()
	}
	p.flying++
	return nil
}

// land takes up how a call to another node ended.
func (p *Port) land(notAfter time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e, own := errors.AsType[*Error](err); own && e.Details[DetailOutcome] == OutcomeUnknown {
		p.doubt = max(p.doubt, notAfter)
	}
	p.flying--
	if p.flying == 0 && p.landed != nil {
		close(p.landed)
		p.landed = nil
	}
}

// callAway calls the replicas of other nodes, one after the other while a call that
// failed may go to another. here is how the one of this node failed, if there is one.
func (p *Port) callAway(ctx context.Context, f *Facts, kind Kind, call Call, here error) ([]byte, error) {
	away := RemoteCall{
		Provider: f.Provider.ID, Capability: kind.Type(), Operation: call.Operation, Payload: call.Payload,
		Instance: p.caller.Instance, Generation: p.caller.Generation, NodeEpoch: p.caller.NodeEpoch,
		Repeatable: repeatable(kind, call.Operation),
	}
	list := p.router.candidates(ctx, f)
	if len(list) == 0 {
		if here == nil {
			here = reachable(f.Provider, f.Address)
		}
		if here == nil {
			here = unavailable(f.Provider.ID, "none of its replicas does")
		}
		return nil, here
	}
	for i := range list {
		away.Node, away.Once = list[i].node, i < len(list)-1
		answer, err := p.callRemote(ctx, &list[i], away)
		if err == nil || i == len(list)-1 || !elsewhere(err, away.Repeatable) {
			return answer, err
		}
		if ended := FromContext(ctx); ended != nil {
			return nil, err
		}
	}
	return nil, here
}

// callRemote calls a replica of another node. The call carries until when it may
// have its effect: neither a slow network nor a process that stands still can
// carry it beyond the end of the caller's tenure, or beyond its own deadline.
func (p *Port) callRemote(ctx context.Context, to *candidate, call RemoteCall) ([]byte, error) {
	now := p.router.clock()
	call.NotAfter = now + DefaultCallTime
	if deadline, ok := ctx.Deadline(); ok {
		call.NotAfter = now + time.Until(deadline)
	}
	if p.tenure != nil {
		at, held := p.tenure.Ends()
		if !held || now >= at {
			return nil, tenureEnded(call.Instance)
		}
		call.NotAfter = min(call.NotAfter, at)
	}
	finish, err := p.router.paths.begin(ctx, to, call.Provider)
	if err != nil {
		return nil, err
	}
	if err := p.takeOff(); err != nil {
		finish(err)
		return nil, err
	}
	return p.fly(ctx, to.address, call, call.NotAfter-now, finish)
}

// fly makes a call and waits for its answer for as long as the caller does. The
// call goes on without its caller: an instance that is ended in the middle of one
// has settled when the answer is here, instead of when its time is up.
func (p *Port) fly(ctx context.Context, address string, call RemoteCall, left time.Duration, finish func(error)) ([]byte, error) {
	type outcome struct {
		answer []byte
		err    error
	}
	call.Payload = slices.Clone(call.Payload) // it is the caller's, who may be gone
	landed := make(chan outcome, 1)
	p.router.crew.Run(func() {
		detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), left)
		defer cancel()
		var o outcome
		o.answer, o.err = p.router.remote.Invoke(detached, address, call)
		finish(o.err)
		p.land(call.NotAfter, o.err)
		landed <- o
	})
	select {
	case o := <-landed:
		return o.answer, o.err
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		o := <-landed // its time is up as well, and it knows more
		return o.answer, o.err
	}
	gone := Errorf(ErrCommunication, "the call was cancelled by its caller").Because(ctx.Err()).
		With("node", call.Node).With("address", address).With("provider", call.Provider)
	if !call.Repeatable {
		gone = gone.With(DetailOutcome, OutcomeUnknown)
	}
	return nil, gone
}
