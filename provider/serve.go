package provider

import (
	"context"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
)

// Request is what an authenticated caller asks of a provider of this node.
type Request struct {
	// Provider is the provider's id; never empty.
	Provider string
	// Capability, Operation and Payload say what is asked.
	Capability, Operation string
	Payload               []byte
}

// Serve carries out a call that came from another node or from a user. Every
// condition is checked against this node's own directory; of the request only
// Caller.Node and Caller.User are believed, which the transport authenticated.
//
// The caller's node may know an assignment or a generation a moment earlier
// than this one: for such a call Serve waits for the directory to change, up to
// RouterConfig.SettleWithin. It fails with ErrUnavailable when the provider
// does not run here.
func (r *Router) Serve(ctx context.Context, caller Caller, req Request) ([]byte, error) {
	answer, err := r.serve(ctx, &caller, &req)
	if err != nil {
		r.noteDenial(ctx, sideProvider, req.Capability, req.Operation, err)
		err = r.complete(ctx, err)
	}
	capability, operation := unknown, unknown
	if m := r.metrics.of(req.Capability, req.Operation); m != nil {
		capability, operation = m.capability, m.operation
	}
	r.metrics.served.WithLabelValues(capability, operation, codeName(err)).Inc()
	return answer, err
}

func (r *Router) serve(ctx context.Context, caller *Caller, req *Request) ([]byte, error) {
	kind, ok := r.kinds[req.Capability]
	if !ok {
		return nil, Errorf(ErrInvalid, "capability %q is unknown; expected %s", req.Capability, r.known()).
			With("capability", req.Capability)
	}
	demand, err := r.demand(kind, req.Operation, req.Payload, r.metrics.of(req.Capability, req.Operation) != nil)
	if err != nil {
		return nil, err
	}
	if req.Provider == "" || demand.Provider != "" && demand.Provider != req.Provider {
		return nil, Errorf(ErrInvalid, "the call is for provider %q and its payload for %q", req.Provider, demand.Provider)
	}
	f, grant, err := r.decideHere(ctx, caller, req.Provider, of(demand.Need, req.Provider))
	if err != nil {
		return nil, err
	}
	call := Call{
		Instance: caller.Instance, Name: grant.Name, Generation: caller.Generation,
		Bucket: grant.Bucket, Operation: req.Operation, Payload: req.Payload,
	}
	if caller.Instance != "" {
		call.Created, call.Permissions = f.Instance.Created, f.Assignment.Permissions
		call.admission = admission{router: r, seen: f.Turn, node: caller.Node, notAfter: caller.NotAfter}
	}
	return r.host.Invoke(ctx, req.Provider, req.Capability, call)
}

// decideHere decides on a call to a provider of this node, again at each change
// of the directory while the refusal may heal.
func (r *Router) decideHere(ctx context.Context, caller *Caller, provider string, need permission.Need) (Facts, Grant, error) {
	f, grant, err := r.decideOnce(caller, provider, need)
	if err == nil || !Unsettled(err) || r.settle < 0 {
		return f, grant, err
	}
	select {
	case r.settling <- struct{}{}:
		defer func() { <-r.settling }()
	default:
		return f, Grant{}, err
	}
	limit := time.NewTimer(r.settle)
	defer limit.Stop()
	for {
		changed := r.directory.Changed() // before looking, so that no change is missed
		f, grant, err = r.decideOnce(caller, provider, need)
		if err == nil || !Unsettled(err) {
			return f, grant, err
		}
		select {
		case <-changed:
		case <-limit.C:
			return f, Grant{}, err
		case <-ctx.Done():
			return f, Grant{}, FromContext(ctx)
		}
	}
}

func (r *Router) decideOnce(caller *Caller, provider string, need permission.Need) (Facts, Grant, error) {
	f := r.directory.Facts(caller.Instance, need.Capability, provider)
	grant, err := Decide(&f, caller, provider, need)
	if err != nil {
		return f, Grant{}, err
	}
	if self := r.directory.Self(); f.Provider.Node != self {
		return f, Grant{}, unavailable(provider, "it is not placed on node "+self).With("node", f.Provider.Node).mayHeal()
	}
	return f, grant, nil
}
