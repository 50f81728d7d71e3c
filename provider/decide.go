package provider

import (
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	"github.com/wasmatrix/wasmatrix/permission"
)

// Caller is who makes a call, as far as it was authenticated: either an
// instance on a node, or a user.
type Caller struct {
	// Instance is the calling instance's id as the caller names it; empty for a user.
	Instance string
	// Generation is that of its placement, as the caller names it.
	Generation uint64
	// NodeEpoch is that of its node, as the caller names it; 0 means not told.
	NodeEpoch uint64
	// NotAfter is the last moment, on this node's clock, at which the call may
	// have its effect; 0 means no limit.
	NotAfter time.Duration
	// Node is the node that the call came from, as authenticated.
	Node string
	// User is the name of an authenticated user who may do everything; empty for
	// an instance.
	User string
	// Bucket is the bucket that a user works on.
	Bucket string
}

// Facts is what one directory knows about a call, all of one moment. Nil means
// not known.
type Facts struct {
	// Instance is where the calling instance runs.
	Instance *InstanceRecord
	// Fence is the highest generation ever seen of it.
	Fence uint64
	// Turn counts the changes to instances up to this moment.
	Turn uint64
	// Provider is the replica of the called provider that is on this node, or else
	// the first one.
	Provider *ProviderRecord
	// Replicas are all replicas of it, in their order; they are shared.
	Replicas []*ProviderRecord
	// Assignment lets the one use the other.
	Assignment *Assignment
	// Address is that of the agent of Provider's node; empty when not known.
	Address string
	// Candidates is the number of providers to choose from, when the call names none.
	Candidates int
}

// Grant is a call that was allowed.
type Grant struct {
	// Name is the calling workload's or user's name.
	Name string
	// Bucket is the bucket to work on.
	Bucket string
	// Permission is the one that allowed it; the zero Permission for a user.
	Permission permission.Permission
}

// Decide is the one decision on a capability call, made with the same function
// on the calling and on the serving side, each from its own directory's facts.
// For an instance it checks, in this order: the instance is known; it is placed
// on the caller's node, at exactly the generation it names; the provider exists
// and serves the capability; it is assigned to the instance; a permission covers
// the need. A user has passed authentication as an administrator, so only the
// provider is checked.
//
// It is pure. Its errors are *Error of ErrInstanceNotFound, ErrDenied,
// ErrNotFound or ErrInvalid.
func Decide(f *Facts, c *Caller, provider string, need permission.Need) (Grant, error) {
	if c.User != "" && c.Instance == "" {
		if err := checkProvider(f, provider, need); err != nil {
			return Grant{}, err
		}
		return Grant{Name: c.User, Bucket: c.Bucket}, nil
	}
	if err := checkInstance(f, c); err != nil {
		return Grant{}, err
	}
	if err := checkProvider(f, provider, need); err != nil {
		return Grant{}, err
	}
	a := f.Assignment
	if a == nil || a.Instance != c.Instance || a.Provider != provider {
		return Grant{}, refuseUnassigned(f, provider, need)
	}
	by, ok := a.Permissions.Allows(need)
	if !ok {
		return Grant{}, refuseUncovered(f, a, need)
	}
	return Grant{Name: f.Instance.Name, Bucket: a.Bucket, Permission: by}, nil
}

func checkInstance(f *Facts, c *Caller) error {
	rec := f.Instance
	switch {
	case rec != nil && (plant.On(plant.ServesAnyGeneration) || plant.On(plant.FencingOffByOne) && c.Generation+1 == f.Fence):
		return nil
	case c.Instance == "" || c.Node == "":
		return Errorf(ErrDenied, "the call names neither an instance nor a user")
	case c.Generation < f.Fence:
		return Superseded(c.Instance, Mark{Generation: c.Generation}, Mark{Generation: f.Fence})
	case rec == nil || rec.ID != c.Instance:
		return Errorf(ErrInstanceNotFound, "instance %s is not known here", c.Instance).
			With("instance", c.Instance).NextStep("wasmatrix instance get %s", c.Instance).mayHeal()
	case c.Generation > rec.Generation:
		return Errorf(ErrDenied, "generation %d of instance %s is not known here; the newest is %d", c.Generation, c.Instance, rec.Generation).
			With("instance", c.Instance).With("generation", strconv.FormatUint(c.Generation, 10)).
			With("current_generation", strconv.FormatUint(rec.Generation, 10)).mayHeal()
	case rec.Node != c.Node:
		return Errorf(ErrDenied, "instance %s is not placed on node %s", c.Instance, c.Node).
			With("instance", c.Instance).With("node", c.Node)
	case c.NodeEpoch != 0 && c.NodeEpoch < rec.NodeEpoch:
		return Errorf(ErrDenied, "instance %s was placed on a later epoch of node %s", c.Instance, c.Node).
			With("instance", c.Instance).With("node", c.Node).
			With("epoch", strconv.FormatUint(c.NodeEpoch, 10)).With("current_epoch", strconv.FormatUint(rec.NodeEpoch, 10))
	default:
		return nil
	}
}

func checkProvider(f *Facts, provider string, need permission.Need) error {
	switch {
	case f.Provider == nil || f.Provider.ID != provider:
		return Errorf(ErrNotFound, "provider %s is not known here", provider).
			With("provider", provider).NextStep("wasmatrix provider list").mayHeal()
	case f.Provider.Type != typeOf(need.Capability):
		return Errorf(ErrInvalid, "provider %s is of type %s and does not serve %s", provider, f.Provider.Type, need.Capability).
			With("provider", provider).With("type", f.Provider.Type).NextStep("wasmatrix provider list")
	default:
		return nil
	}
}

func refuseUnassigned(f *Facts, provider string, need permission.Need) error {
	return Errorf(ErrDenied, "%s was not granted provider %s", f.Instance.Name, provider).
		With("instance", f.Instance.ID).With("provider", provider).With("need", need.String()).
		NextStep("%s", grantStep(f.Instance.Name, permission.Set{}, need, provider)).mayHeal().denied(f.Instance, provider, need)
}

func refuseUncovered(f *Facts, a *Assignment, need permission.Need) error {
	return Errorf(ErrDenied, "%s may not use provider %s for this: %s", f.Instance.Name, a.Provider, a.Permissions.Explain(need)).
		With("instance", f.Instance.ID).With("provider", a.Provider).With("need", need.String()).
		NextStep("%s", grantStep(f.Instance.Name, a.Permissions, need, a.Provider)).mayHeal().denied(f.Instance, a.Provider, need)
}

// grantStep is the command that lifts a refusal, and the flag that would have
// avoided it.
func grantStep(name string, have permission.Set, need permission.Need, provider string) string {
	var grants, allows []string
	for _, p := range have.Missing(need) {
		grants = append(grants, shellQuote(p))
		allows = append(allows, "--allow "+shellQuote(p))
	}
	step := "wasmatrix grant " + name + " " + strings.Join(grants, " ")
	if provider != "" {
		step += " --provider " + provider
	}
	return step + ", or run it with " + strings.Join(allows, " ")
}

// shellQuote quotes what a shell would take for something else.
func shellQuote(s string) string {
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(":/._-@,+%=", c) >= 0 {
			continue
		}
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	return s
}
