package provider

import (
	"context"
	"errors"

	"github.com/wasmatrix/wasmatrix/permission"
)

// Denial is a call that was refused because of what its instance was granted. A
// refusal because a newer generation runs, or because records are still on their
// way, is none.
type Denial struct {
	// Instance is the id of the instance, Name that of its workload.
	Instance, Name string
	// Provider is the id of the provider; empty when the instance was granted none.
	Provider string
	// Need is what would have had to be granted.
	Need permission.Need
}

// denied marks a refusal because of what the caller was granted.
func (e *Error) denied(instance *InstanceRecord, provider string, need permission.Need) *Error {
	e.denial = &Denial{Instance: instance.ID, Name: instance.Name, Provider: provider, Need: need}
	return e
}

// The sides on which a call is decided.
const (
	sideCaller   = "caller"
	sideProvider = "provider"
)

// noteDenial counts and reports a refusal that was decided here.
func (r *Router) noteDenial(ctx context.Context, side, capability, operation string, err error) {
	e, own := errors.AsType[*Error](err)
	if !own || e.denial == nil {
		return
	}
	r.metrics.denials.WithLabelValues(capability, operation, side).Inc()
	if r.denied != nil {
		r.denied(ctx, *e.denial)
	}
}
