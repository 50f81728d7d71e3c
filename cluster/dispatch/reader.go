package dispatch

import (
	"slices"

	"github.com/hashicorp/go-memdb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// directories wake sessions by single nodes, by providers with all their replicas,
// and by what a node hosts. go-memdb could tell the last, but for a node that hosts nothing it
// would fire with every change of any provider.
type directories struct {
	nodes     *directory[*pb.Node]
	providers *directory[service]
	hosts     *directory[host]
}

// service is a provider with all its replicas.
type service struct {
	id       string
	replicas []*pb.Provider
}

// host is a node with the providers that belong to it.
type host struct {
	node      string
	providers []*pb.Provider
}

func newDirectories() *directories {
	return &directories{
		nodes: newDirectory((*pb.Node).GetId, func(a, b *pb.Node) bool {
			return sameAddress(a, b) && a.GetEpoch() == b.GetEpoch() && a.GetState() == b.GetState()
		}),
		providers: newDirectory(func(s service) string { return s.id }, func(a, b service) bool {
			return sameUsedAll(a.replicas, b.replicas)
		}),
		hosts: newDirectory(func(h host) string { return h.node }, func(a, b host) bool {
			return sameHostedAll(a.providers, b.providers)
		}),
	}
}

// syncProviders takes up all replicas, those of one provider after each other.
func (d *directories) syncProviders(providers []*pb.Provider) {
	byNode := map[string][]*pb.Provider{}
	var services []service
	for i, p := range providers {
		if i == 0 || providers[i-1].GetId() != p.GetId() {
			services = append(services, service{id: p.GetId()})
		}
		last := &services[len(services)-1]
		last.replicas = append(last.replicas, p)
		if nodeID := p.GetPlacement().GetNodeId(); nodeID != "" {
			byNode[nodeID] = append(byNode[nodeID], p)
		}
	}
	hosts := make([]host, 0, len(byNode))
	for nodeID, hosted := range byNode {
		hosts = append(hosts, host{nodeID, hosted})
	}
	d.providers.sync(services)
	d.hosts.sync(hosts)
}

// reader reads the registry for one session and remembers what it read, with
// what would change the answers. refresh moves it to a later view and looks only
// at answers that did change; so a session with thousands of callers is not read
// anew because one of them reported its status.
type reader struct {
	view fsm.View
	dirs *directories
	// round counts the collections; what one did not read is forgotten.
	round     uint64
	lists     map[listKey]watched
	nodes     map[string]*point[*pb.Node]
	providers map[string]*point[[]*pb.Provider]
	hosts     map[string]*point[[]*pb.Provider]
}

type listKind int

const (
	listInstancesOn listKind = iota
	listAssignmentsOf
	listAssignmentsTo
	listWorkload
)

type listKey struct {
	kind listKind
	id   string
}

// watched is a remembered list.
type watched interface {
	// refresh reads the list again if it fired and reports whether the difference
	// matters to the session.
	refresh(view fsm.View) bool
	channels() memdb.WatchSet
	usedIn(round uint64) bool
}

type list[R any] struct {
	read    func(view fsm.View, ws memdb.WatchSet) []R
	same    func(a, b R) bool
	records []R
	ws      memdb.WatchSet
	round   uint64
}

func (l *list[R]) load(view fsm.View) []R {
	l.ws = memdb.NewWatchSet()
	l.records = l.read(view, l.ws)
	return l.records
}

func (l *list[R]) refresh(view fsm.View) bool {
	if !fired(l.ws) {
		return false
	}
	before := l.records
	return !slices.EqualFunc(before, l.load(view), l.same)
}

func (l *list[R]) channels() memdb.WatchSet { return l.ws }

func (l *list[R]) usedIn(round uint64) bool { return l.round == round }

// point is a remembered answer that is cheap to read anew with each view, so only
// its changes are watched; known is false when there is none.
type point[R any] struct {
	record R
	known  bool
	round  uint64
}

func newReader(dirs *directories) *reader {
	return &reader{
		dirs: dirs, lists: map[listKey]watched{},
		nodes: map[string]*point[*pb.Node]{}, providers: map[string]*point[[]*pb.Provider]{},
		hosts: map[string]*point[[]*pb.Provider]{},
	}
}

// refresh moves the reader to view and reports whether a collection would come
// to something else than the last.
func (r *reader) refresh(view fsm.View) bool {
	r.view = view
	changed := r.round == 0
	for _, l := range r.lists {
		changed = l.refresh(view) || changed
	}
	changed = refreshPoints(r.nodes, view.Node, sameAddress) || changed
	changed = refreshPoints(r.providers, replicasIn(view), sameUsedAll) || changed
	return refreshPoints(r.hosts, hostedIn(view), sameHostedAll) || changed
}

// hostedIn returns a read of the providers that belong to a node.
func hostedIn(view fsm.View) func(nodeID string) ([]*pb.Provider, bool) {
	return func(nodeID string) ([]*pb.Provider, bool) { return view.ProvidersByNode(nil, nodeID), true }
}

// replicasIn returns a read of the replicas of a provider.
func replicasIn(view fsm.View) func(providerID string) ([]*pb.Provider, bool) {
	return func(providerID string) ([]*pb.Provider, bool) {
		replicas := view.ProviderReplicas(providerID)
		return replicas, len(replicas) > 0
	}
}

func refreshPoints[R any](points map[string]*point[R], read func(string) (R, bool), same func(a, b R) bool) bool {
	changed := false
	for id, p := range points {
		record, known := read(id)
		changed = changed || known != p.known || known && !same(record, p.record)
		p.record, p.known = record, known
	}
	return changed
}

// collected forgets what the collection just made did not read.
func (r *reader) collected() {
	for k, l := range r.lists {
		if !l.usedIn(r.round) {
			delete(r.lists, k)
		}
	}
	forget(r.nodes, r.round)
	forget(r.providers, r.round)
	forget(r.hosts, r.round)
}

func forget[R any](points map[string]*point[R], round uint64) {
	for id, p := range points {
		if p.round != round {
			delete(points, id)
		}
	}
}

// watch makes ws fire when anything that was read changes after the reader's view.
func (r *reader) watch(ws memdb.WatchSet) {
	for _, l := range r.lists {
		for channel := range l.channels() {
			ws.Add(channel)
		}
	}
	for id, p := range r.nodes {
		r.dirs.nodes.watch(ws, id, p.record, p.known)
	}
	for id, p := range r.providers {
		r.dirs.providers.watch(ws, id, service{id, p.record}, p.known)
	}
	for id, p := range r.hosts {
		r.dirs.hosts.watch(ws, id, host{id, p.record}, len(p.record) > 0)
	}
}

func (r *reader) instancesOn(nodeID string) []*pb.Instance {
	return remembered(r, listKey{listInstancesOn, nodeID}, sameInstanceOf,
		func(v fsm.View, ws memdb.WatchSet) []*pb.Instance { return v.InstancesByNode(ws, nodeID) })
}

func (r *reader) providersOn(nodeID string) []*pb.Provider {
	hosted, _ := rememberedPoint(r.hosts, nodeID, r.round, hostedIn(r.view))
	return hosted
}

func (r *reader) assignmentsOf(instanceID string) []*pb.CapabilityAssignment {
	return remembered(r, listKey{listAssignmentsOf, instanceID}, sameAssignment,
		func(v fsm.View, ws memdb.WatchSet) []*pb.CapabilityAssignment {
			return v.AssignmentsByInstance(ws, instanceID)
		})
}

func (r *reader) assignmentsTo(providerID string) []*pb.CapabilityAssignment {
	return remembered(r, listKey{listAssignmentsTo, providerID}, sameAssignment,
		func(v fsm.View, ws memdb.WatchSet) []*pb.CapabilityAssignment {
			return v.AssignmentsByProvider(ws, providerID)
		})
}

// caller returns an instance that may be anywhere. It is watched with all
// replicas of its workload, which is what the registry has an index for.
func (r *reader) caller(instanceID string) (*pb.Instance, bool) {
	in, ok := r.view.Instance(instanceID)
	if ok {
		name := in.GetName()
		remembered(r, listKey{listWorkload, name}, sameCaller,
			func(v fsm.View, ws memdb.WatchSet) []*pb.Instance { return v.InstancesByName(ws, name) })
	}
	return in, ok
}

func sameInstanceOf(a, b *pb.Instance) bool { return a.GetId() == b.GetId() && sameInstance(a, b) }

func sameHostedAll(a, b []*pb.Provider) bool {
	return slices.EqualFunc(a, b, func(a, b *pb.Provider) bool { return a.GetId() == b.GetId() && sameHosted(a, b) })
}

func sameUsedAll(a, b []*pb.Provider) bool { return slices.EqualFunc(a, b, sameUsed) }

func (r *reader) node(id string) (*pb.Node, bool) {
	return rememberedPoint(r.nodes, id, r.round, r.view.Node)
}

func (r *reader) replicas(providerID string) []*pb.Provider {
	replicas, _ := rememberedPoint(r.providers, providerID, r.round, replicasIn(r.view))
	return replicas
}

// remembered returns a list, reading it only when the session has not before;
// refresh has brought those it has up to date.
func remembered[R any](r *reader, k listKey, same func(a, b R) bool, read func(fsm.View, memdb.WatchSet) []R) []R {
	if known, ok := r.lists[k].(*list[R]); ok {
		known.round = r.round
		return known.records
	}
	l := &list[R]{read: read, same: same, round: r.round}
	r.lists[k] = l
	return l.load(r.view)
}

func rememberedPoint[R any](points map[string]*point[R], id string, round uint64, read func(string) (R, bool)) (R, bool) {
	p, ok := points[id]
	if !ok {
		p = &point[R]{}
		p.record, p.known = read(id)
		points[id] = p
	}
	p.round = round
	return p.record, p.known
}

func fired(ws memdb.WatchSet) bool {
	for channel := range ws {
		select {
		case <-channel:
			return true
		default:
		}
	}
	return false
}
