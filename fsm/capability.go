package fsm

import (
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-memdb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxPermissions bounds the permissions of one assignment.
const maxPermissions = 1024

// mergeGrants returns a workload's grants ready to be assigned: one a provider,
// in the order of the spec, permissions sorted and distinct, the bucket never
// empty.
func (t *tx) mergeGrants(spec *pb.WorkloadSpec) ([]*pb.CapabilityGrant, *refusal) {
	at := map[string]int{}
	var out []*pb.CapabilityGrant
	for _, g := range spec.GetCapabilities() {
		if _, ok := t.provider(g.GetProvider()); !ok {
			return nil, providerNotFound(g.GetProvider())
		}
		i, twice := at[g.GetProvider()]
		if !twice {
			at[g.GetProvider()] = len(out)
			out = append(out, &pb.CapabilityGrant{
				Provider:    g.GetProvider(),
				Permissions: ordered(g.GetPermissions()),
				Bucket:      g.GetBucket(),
			})
			continue
		}
		have := out[i]
		if have.Bucket != "" && g.GetBucket() != "" && have.Bucket != g.GetBucket() {
			return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
				"provider %q is granted with two buckets", g.GetProvider()).
				with("provider", g.GetProvider()).
				with("buckets", have.Bucket+", "+g.GetBucket())
		}
		if have.Bucket == "" {
			have.Bucket = g.GetBucket()
		}
		have.Permissions = ordered(append(have.Permissions, g.GetPermissions()...))
	}
	for _, g := range out {
		if r := checkPermissions(g.GetProvider(), g.GetPermissions()); r != nil {
			return nil, r
		}
		if g.Bucket == "" {
			g.Bucket = spec.GetName()
		}
	}
	return out, nil
}

func checkPermissions(providerID string, permissions []string) *refusal {
	if slices.Contains(permissions, "") {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "a permission is empty").
			with("provider", providerID)
	}
	if len(permissions) > maxPermissions {
		return refuse(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
			"an assignment holds at most %d permissions, not %d", maxPermissions, len(permissions)).
			with("provider", providerID).
			with("limit", strconv.Itoa(maxPermissions))
	}
	return nil
}

// assignCapability adds permissions to what instances have of a provider, or
// makes the assignment. A bucket in the grant replaces the present one.
func (t *tx) assignCapability(c *pb.AssignCapabilityCommand) ([]string, *refusal) {
	grant := c.GetGrant()
	if _, ok := t.provider(grant.GetProvider()); !ok {
		return nil, providerNotFound(grant.GetProvider())
	}
	ins, r := t.instances(c.GetInstanceIds())
	if r != nil {
		return nil, r
	}
	next := make([]*pb.CapabilityAssignment, 0, len(ins))
	for _, in := range ins {
		a := t.granted(in, grant)
		if r := checkPermissions(a.GetProviderId(), a.GetPermissions()); r != nil {
			return nil, r.with("instance", in.GetId())
		}
		next = append(next, a)
	}
	for _, a := range next {
		old, had := t.assignment(a.GetInstanceId(), a.GetProviderId())
		if had && old.GetBucket() == a.GetBucket() && slices.Equal(old.GetPermissions(), a.GetPermissions()) {
			continue
		}
		t.putAssignment(a)
		t.capabilityEvent(pb.EventKind_EVENT_KIND_CAPABILITY_ASSIGNED,
			a.GetInstanceId(), a.GetProviderId(), strings.Join(ordered(grant.GetPermissions()), " "))
	}
	return idsOf(ins), nil
}

// granted is an instance's assignment after a grant.
func (t *tx) granted(in *pb.Instance, grant *pb.CapabilityGrant) *pb.CapabilityAssignment {
	a := &pb.CapabilityAssignment{
		InstanceId:    in.GetId(),
		ProviderId:    grant.GetProvider(),
		Bucket:        in.GetName(),
		CorrelationId: t.cmd.GetCorrelationId(),
	}
	old, had := t.assignment(a.GetInstanceId(), a.GetProviderId())
	if had {
		a.Bucket = old.GetBucket()
		a.Subscriptions = old.GetSubscriptions()
	}
	if grant.GetBucket() != "" {
		a.Bucket = grant.GetBucket()
	}
	a.Permissions = ordered(slices.Concat(old.GetPermissions(), grant.GetPermissions()))
	return a
}

// revokeCapability takes permissions away, or with none named the whole
// assignment; an assignment without permissions is removed, with its subscriptions. It is refused when
// it would take nothing from any of the instances, because a revocation that
// was mistyped must not look as if it had worked.
func (t *tx) revokeCapability(c *pb.RevokeCapabilityCommand) ([]string, *refusal) {
	if _, ok := t.provider(c.GetProviderId()); !ok {
		return nil, providerNotFound(c.GetProviderId())
	}
	ins, r := t.instances(c.GetInstanceIds())
	if r != nil {
		return nil, r
	}
	var hit, granted []string
	var next []*pb.CapabilityAssignment
	for _, in := range ins {
		old, ok := t.assignment(in.GetId(), c.GetProviderId())
		if !ok {
			continue
		}
		granted = append(granted, old.GetPermissions()...)
		kept := without(old.GetPermissions(), c.GetPermissions())
		if len(c.GetPermissions()) > 0 && len(kept) == len(old.GetPermissions()) {
			continue
		}
		a := shallow(old)
		a.Permissions = kept
		next = append(next, a)
		hit = append(hit, in.GetId())
	}
	if len(hit) == 0 {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"none of the instances was granted that with provider %q", c.GetProviderId()).
			with("provider", c.GetProviderId()).
			with("instances", named(idsOf(ins))).
			with("granted", named(ordered(granted))).
			next("wasmatrix instance get %s", ins[0].GetId())
	}
	message := strings.Join(ordered(c.GetPermissions()), " ")
	for _, a := range next {
		if len(a.GetPermissions()) == 0 {
			t.deleteAssignment(a)
		} else {
			t.putAssignment(a)
		}
		t.capabilityEvent(pb.EventKind_EVENT_KIND_CAPABILITY_REVOKED, a.GetInstanceId(), a.GetProviderId(), message)
	}
	return hit, nil
}

// without returns what is left of permissions; with nothing named to take, nothing.
func without(permissions, taken []string) []string {
	if len(taken) == 0 {
		return nil
	}
	set := make(map[string]bool, len(taken))
	for _, p := range taken {
		set[p] = true
	}
	var kept []string
	for _, p := range permissions {
		if !set[p] {
			kept = append(kept, p)
		}
	}
	return kept
}

// assignmentsOf returns an instance's assignments in the order of their providers.
func assignmentsOf(txn *memdb.Txn, ws memdb.WatchSet, instanceID string) []*pb.CapabilityAssignment {
	return list[*pb.CapabilityAssignment](txn, ws, tableAssignments, indexPrefix, instanceID+terminator)
}
