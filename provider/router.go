package provider

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/internal/crew"
	"github.com/wasmatrix/wasmatrix/permission"
)

// DefaultSettleWithin is how long the serving side waits for records under way
// before it refuses a call that they might allow.
const DefaultSettleWithin = 500 * time.Millisecond

// DefaultCallTime bounds a call to another node whose context has no deadline.
const DefaultCallTime = 30 * time.Second

// The detail of an error whose call may have been carried out all the same.
const (
	DetailOutcome  = "outcome"
	OutcomeUnknown = "unknown"
)

// maxSettling bounds the calls that wait for records at the same time; others
// are refused at once, so that forged calls cannot pile up.
const maxSettling = 256

// RemoteCall is one call to a provider of another node.
type RemoteCall struct {
	// Provider, Capability, Operation and Payload say what is called.
	Provider, Capability, Operation string
	Payload                         []byte
	// Node is the id of the provider's node, for messages.
	Node string
	// Instance, Generation and NodeEpoch say who calls.
	Instance              string
	Generation, NodeEpoch uint64
	// Repeatable is true when the operation may be carried out twice.
	Repeatable bool
	// Once is true when another replica can take the call, so that this one need not
	// be tried for long.
	Once bool
	// NotAfter is the last moment, on this node's clock, at which the call may
	// have its effect there; a call that is held up longer is refused.
	NotAfter time.Duration
}

// Remote calls providers of other nodes.
type Remote interface {
	// Invoke calls the agent at address. Its errors are those of the serving
	// side, ErrCommunication when it could not be reached or the connection
	// broke, and ErrTimeout after ctx's deadline. Where nobody answered although
	// there was time they are marked with Error.OnTheWay.
	Invoke(ctx context.Context, address string, call RemoteCall) ([]byte, error)
	// Probe asks the agent at address whether it is there, until ctx ends.
	Probe(ctx context.Context, address string) error
}

// RouterConfig is what a Router is made of. Directory, Host, Kinds and Remote are
// required.
type RouterConfig struct {
	// Directory is what this node knows.
	Directory *Directory
	// Host runs this node's providers.
	Host *Host
	// Kinds are the capabilities that guests may call.
	Kinds []Kind
	// Remote reaches other nodes' providers.
	Remote Remote
	// Registerer takes the metrics; nil for none.
	Registerer prometheus.Registerer
	// Clock is what calls are limited with; nil means the process's monotonic one.
	Clock Clock
	// SettleWithin bounds how long the serving side waits for records under way;
	// 0 means DefaultSettleWithin, negative not at all.
	SettleWithin time.Duration
	// Denied, if not nil, is told of every denial that is decided on this node. It
	// must not block; ctx is the call's.
	Denied func(ctx context.Context, d Denial)
}

// Router carries capability calls to the providers that serve them.
type Router struct {
	directory *Directory
	host      *Host
	kinds     map[string]*servedKind
	remote    Remote
	paths     *paths
	crew      *crew.Crew
	denied    func(context.Context, Denial)
	metrics   *metrics
	clock     Clock
	began     time.Time
	settle    time.Duration
	settling  chan struct{} // one token for each call that may wait
}

// servedKind is a Kind and its place among a Router's.
type servedKind struct {
	Kind

	at int
}

// NewRouter returns a Router. It fails when the metrics cannot be registered.
func NewRouter(cfg RouterConfig) (*Router, error) {
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	r := &Router{
		directory: cfg.Directory,
		host:      cfg.Host,
		kinds:     make(map[string]*servedKind, len(cfg.Kinds)),
		remote:    cfg.Remote,
		paths:     newPaths(cfg.Remote),
		crew:      crew.New(),
		denied:    cfg.Denied,
		metrics:   m,
		clock:     cfg.Clock,
		began:     time.Now(),
		settle:    cfg.SettleWithin,
		settling:  make(chan struct{}, maxSettling),
	}
	for i, kind := range cfg.Kinds {
		r.kinds[kind.Type()] = &servedKind{Kind: kind, at: i}
	}
	if r.clock == nil {
		r.clock = monotonic()
	}
	if r.settle == 0 {
		r.settle = DefaultSettleWithin
	}
	return r, nil
}

// Port returns the view that one instance on this node has of its providers.
// nodeEpoch is that of the instance's placement.
func (r *Router) Port(instance string, generation, nodeEpoch uint64) *Port {
	return &Port{
		router: r, known: make([]atomic.Pointer[knownFacts], len(r.kinds)),
		caller: Caller{Instance: instance, Generation: generation, NodeEpoch: nodeEpoch, Node: r.directory.Self()},
	}
}

// Call makes one capability call: capability is "kv", operation the imported
// function's name, payload the encoded request, valid only during the call. The
// answer belongs to the caller. Its errors wrap the sentinels of this package.
func (p *Port) Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	start := time.Since(p.router.began) // costs half of what the time of day does
	counters := p.router.metrics.of(capability, operation)
	answer, err := p.call(ctx, capability, operation, payload, counters != nil)
	if counters == nil { // it was learnt just now, or never will be
		counters = p.router.metrics.of(capability, operation)
	}
	if err != nil {
		p.router.noteDenial(ctx, sideCaller, capability, operation, err)
		err = p.router.complete(ctx, err)
	}
	p.router.metrics.observe(counters, time.Since(p.router.began)-start, err)
	return answer, err
}

// call is Call without counting; known says that the operation is in the metrics.
func (p *Port) call(ctx context.Context, capability, operation string, payload []byte, known bool) ([]byte, error) {
	r := p.router
	kind, ok := r.kinds[capability]
	if !ok {
		return nil, Errorf(ErrInvalid, "capability %q is unknown; expected %s", capability, r.known()).
			With("capability", capability)
	}
	demand, err := r.demand(kind, operation, payload, known)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, FromContext(ctx)
	}
	if p.ended.Load() {
		return nil, p.alive()
	}
	target := demand.Provider
	f := p.facts(kind, target)
	if target == "" && f.Candidates != 1 {
		return nil, r.refuseChoice(f, &p.caller, demand.Need)
	}
	if target == "" {
		target = f.Assignment.Provider
	}
	grant, err := Decide(f, &p.caller, target, of(demand.Need, target))
	if err != nil {
		return nil, err
	}
	call := Call{
		Instance: p.caller.Instance, Name: grant.Name, Generation: p.caller.Generation, Created: f.Instance.Created,
		Bucket: grant.Bucket, Operation: operation, Payload: payload, Permissions: f.Assignment.Permissions,
		admission: admission{router: r, seen: f.Turn, node: p.caller.Node, port: p},
	}
	if f.Provider.Node == p.caller.Node {
		answer, err := r.host.Invoke(ctx, target, capability, call)
		if err == nil || len(f.Replicas) < 2 || !elsewhere(err, repeatable(kind.Kind, operation)) {
			return answer, err
		}
		return p.callAway(ctx, f, kind.Kind, call, err)
	}
	return p.callAway(ctx, f, kind.Kind, call, nil)
}

// of completes a need of an external provider: its resource is the provider, which
// a request that names none does not tell.
func of(need permission.Need, provider string) permission.Need {
	if need.Capability == permission.Provider {
		need.Resource = provider
	}
	return need
}

func repeatable(kind Kind, operation string) bool {
	k, able := kind.(Repeatable)
	return able && k.Repeatable(operation)
}

// Now reads the clock that calls are limited by.
func (r *Router) Now() time.Duration { return r.clock() }

// demand asks the kind, and learns an operation that is not known yet for the metrics.
func (r *Router) demand(kind Kind, operation string, payload []byte, known bool) (Demand, error) {
	d, err := kind.Demand(operation, payload)
	if err != nil {
		return Demand{}, err
	}
	if d.Need.Capability != kind.Type() {
		return Demand{}, Errorf(ErrInternal, "capability %s asked for a permission of %q", kind.Type(), d.Need.Capability)
	}
	if !known {
		r.metrics.learn(d.Need.Capability, operation)
	}
	return d, nil
}

// refuseChoice is for a call that names no provider where there is not exactly one.
func (r *Router) refuseChoice(f *Facts, c *Caller, need permission.Need) error {
	if err := checkInstance(f, c); err != nil {
		return err
	}
	if f.Candidates == 0 {
		return Errorf(ErrDenied, "%s was not granted any %s provider", f.Instance.Name, need.Capability).
			With("instance", c.Instance).With("need", need.String()).
			NextStep("%s", grantStep(f.Instance.Name, permission.Set{}, need, "")).denied(f.Instance, "", need)
	}
	ids := strings.Join(r.directory.granted(c.Instance, need.Capability), ", ")
	return Errorf(ErrInvalid, "%s was granted several %s providers; the call must name one of %s", f.Instance.Name, need.Capability, ids).
		With("instance", c.Instance).With("providers", ids).
		NextStep("set the request's provider field to one of %s", ids)
}

// reachable refuses a replica of another node that cannot take a call now.
func reachable(p *ProviderRecord, address string) error {
	switch {
	case p.Node == "":
		return unavailable(p.ID, "it is placed on no node")
	case !p.Running:
		state := p.State
		if state == "" {
			state = "not running"
		}
		return unavailable(p.ID, "it is "+state).With("state", state).With("node", p.Node)
	case address == "":
		return unavailable(p.ID, "the address of node "+p.Node+" is not known here").With("node", p.Node)
	default:
		return nil
	}
}

// complete makes sure that an error wraps one of the sentinels, and that a call
// which failed because its time was up says so.
func (r *Router) complete(ctx context.Context, err error) error {
	if _, own := errors.AsType[*Error](err); own {
		return err
	}
	if ended := FromContext(ctx); ended != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		return ended
	}
	if codeName(err) != "INTERNAL_ERROR" || errors.Is(err, ErrInternal) {
		return err
	}
	return Errorf(ErrInternal, "%s", err).Because(err)
}

func (r *Router) known() string {
	names := make([]string, 0, len(r.kinds))
	for name := range r.kinds {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
