package provider

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/wasmatrix/wasmatrix/permission"
)

// maxFences is how many fences are kept at least for instances that are not
// known any more; at most twice as many. One costs about 100 bytes.
const maxFences = 1 << 16

// Directory is what this node knows of instances, providers, assignments and
// nodes: its replicated view, fed by the agent's session. It is safe for
// concurrent use; a read takes well under a microsecond and sees each change
// as a whole.
//
// It also keeps the generation fence: the highest generation that it ever saw of
// an instance. Records and calls of a lower one are refused, whatever stream
// they come from.
type Directory struct {
	self string

	mu          sync.RWMutex
	instances   map[string]*InstanceRecord
	providers   map[string][]*ProviderRecord      // by id, in the order of the replicas
	assignments map[string][]*Assignment          // by instance, in the order of the providers' ids
	subscribed  map[string]map[string]*Assignment // those with subscriptions, by provider and instance
	nodes       map[string]string
	fences      map[string]Mark // of instances that are not known any more
	oldFences   map[string]Mark // the same; dropped when fences is full
	changed     chan struct{}   // closed at the next change; nil while nobody waits

	// turns counts the changes to instances. It is written under mu.
	turns atomic.Uint64
	// version counts all changes. It is written under mu.
	version atomic.Uint64
}

// NewDirectory returns an empty directory of the node self.
func NewDirectory(self string) *Directory {
	d := &Directory{self: self, fences: map[string]Mark{}}
	d.clear()
	return d
}

func (d *Directory) clear() {
	d.instances = map[string]*InstanceRecord{}
	d.providers = map[string][]*ProviderRecord{}
	d.assignments = map[string][]*Assignment{}
	d.subscribed = map[string]map[string]*Assignment{}
	d.nodes = map[string]string{}
}

// Self returns the id of the node whose directory this is.
func (d *Directory) Self() string { return d.self }

// Changed returns a channel that is closed at the next change.
func (d *Directory) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed == nil {
		d.changed = make(chan struct{})
	}
	return d.changed
}

// change runs f as one change that readers see as a whole.
func (d *Directory) change(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
	d.version.Add(1)
	if d.changed != nil {
		close(d.changed)
		d.changed = nil
	}
}

// Replace puts r in the place of everything known. A record of an instance with
// a generation below the fence is stale: it is refused and what was known of
// that instance stays. The ids of such instances are returned. r belongs to the
// directory afterwards.
func (d *Directory) Replace(r Records) (stale []string) {
	d.change(func() {
		before := d.instances
		for _, rec := range r.Instances {
			if rec.mark().Before(d.fence(rec.ID)) {
				stale = append(stale, rec.ID)
			}
		}
		d.clear()
		d.turns.Add(1)
		for _, id := range stale {
			if known, ok := before[id]; ok {
				d.instances[id] = known
			}
		}
		for _, rec := range r.Instances {
			d.putInstance(rec)
		}
		for id, rec := range before {
			if _, still := d.instances[id]; !still {
				d.retire(rec)
			}
		}
		for i := range r.Providers {
			d.putProvider(&r.Providers[i])
		}
		for i := range r.Assignments {
			d.putAssignment(r.Assignments[i])
		}
		for _, n := range r.Nodes {
			d.nodes[n.ID] = n.AgentAddress
		}
	})
	return stale
}

// PutInstance adds or replaces an instance of this or another node. It reports
// false, and changes nothing, when the generation is below the fence.
func (d *Directory) PutInstance(rec InstanceRecord) (accepted bool) {
	d.change(func() { accepted = d.putInstance(rec) })
	return accepted
}

func (d *Directory) putInstance(rec InstanceRecord) bool {
	if rec.mark().Before(d.fence(rec.ID)) {
		return false
	}
	if had, ok := d.instances[rec.ID]; !ok || *had != rec {
		d.turns.Add(1)
	}
	d.instances[rec.ID] = &rec
	return true
}

// RemoveInstance removes an instance of this node. It leaves alone an instance
// that is known to run elsewhere meanwhile. The fence stays.
func (d *Directory) RemoveInstance(id string) {
	d.removeInstance(id, true)
}

// RemoveRemoteInstance removes an instance of another node. It leaves alone an
// instance that is known to run on this node meanwhile. The fence stays.
func (d *Directory) RemoveRemoteInstance(id string) {
	d.removeInstance(id, false)
}

func (d *Directory) removeInstance(id string, local bool) {
	d.change(func() {
		if rec, ok := d.instances[id]; ok && (rec.Node == d.self) == local {
			delete(d.instances, id)
			d.turns.Add(1)
			d.retire(rec)
		}
	})
}

// retire keeps the fence of an instance that is not known any more.
func (d *Directory) retire(rec *InstanceRecord) {
	if len(d.fences) >= maxFences {
		d.oldFences, d.fences = d.fences, make(map[string]Mark, maxFences)
	}
	d.fences[rec.ID] = rec.mark()
}

// fence returns the newest placement ever seen of an instance. No known record
// is before it, so a known record's is it.
func (d *Directory) fence(id string) Mark {
	if rec, ok := d.instances[id]; ok {
		return rec.mark()
	}
	if m, ok := d.fences[id]; ok && !m.Before(d.oldFences[id]) {
		return m
	}
	return d.oldFences[id]
}

// PutAssignment adds or replaces an assignment.
func (d *Directory) PutAssignment(a Assignment) {
	d.change(func() { d.putAssignment(a) })
}

// putAssignment never changes a slice that a reader may hold.
func (d *Directory) putAssignment(a Assignment) {
	list := d.assignments[a.Instance]
	i, found := slices.BinarySearchFunc(list, a.Provider, byProvider)
	next := slices.Clone(list)
	if found {
		next[i] = &a
	} else {
		next = slices.Insert(next, i, &a)
	}
	d.assignments[a.Instance] = next
	d.noteSubscriptions(&a)
}

// RemoveAssignment removes an assignment.
func (d *Directory) RemoveAssignment(instance, provider string) {
	d.change(func() {
		list := d.assignments[instance]
		i, found := slices.BinarySearchFunc(list, provider, byProvider)
		if found {
			d.noteSubscriptions(&Assignment{Instance: instance, Provider: provider})
		}
		switch {
		case !found:
		case len(list) == 1:
			delete(d.assignments, instance)
		default:
			d.assignments[instance] = slices.Delete(slices.Clone(list), i, i+1)
		}
	})
}

func byProvider(a *Assignment, id string) int { return strings.Compare(a.Provider, id) }

// PutNode adds or replaces a node's address.
func (d *Directory) PutNode(rec NodeRecord) {
	d.change(func() { d.nodes[rec.ID] = rec.AgentAddress })
}

// RemoveNode removes a node's address.
func (d *Directory) RemoveNode(id string) {
	d.change(func() { delete(d.nodes, id) })
}

// Instance returns what is known of an instance.
func (d *Directory) Instance(id string) (InstanceRecord, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	rec, ok := d.instances[id]
	if !ok {
		return InstanceRecord{}, false
	}
	return *rec, true
}

// Assignments returns the assignments of an instance, in the order of the
// providers' ids.
func (d *Directory) Assignments(instance string) []Assignment {
	d.mu.RLock()
	list := d.assignments[instance]
	d.mu.RUnlock()
	out := make([]Assignment, len(list))
	for i, a := range list {
		out[i] = *a
	}
	return out
}

// NodeAddress returns the address of a node's agent.
func (d *Directory) NodeAddress(id string) (string, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	address, ok := d.nodes[id]
	return address, ok
}

// Facts returns what is known about a call of an instance to a provider, as one
// consistent view. With an empty provider the only one that the instance was
// granted for the capability is taken; Facts.Candidates says how many there are.
func (d *Directory) Facts(instance, capability, provider string) Facts {
	d.mu.RLock()
	defer d.mu.RUnlock()
	f := Facts{Fence: d.fence(instance).Generation, Instance: d.instances[instance], Turn: d.turns.Load()}
	list := d.assignments[instance]
	if provider == "" {
		for _, a := range list {
			if d.serves(a, capability) {
				f.Candidates++
				f.Assignment = a
			}
		}
		if f.Candidates != 1 {
			f.Assignment = nil
			return f
		}
		provider = f.Assignment.Provider
	} else if i, found := slices.BinarySearchFunc(list, provider, byProvider); found {
		f.Assignment = list[i]
	}
	f.Replicas = d.providers[provider]
	f.Provider = d.nearest(f.Replicas)
	if f.Provider != nil {
		f.Address = d.nodes[f.Provider.Node]
	}
	return f
}

// serves reports whether an assignment is for a capability: by the type of its
// provider, or by its permissions when the provider is gone.
func (d *Directory) serves(a *Assignment, capability string) bool {
	if replicas := d.providers[a.Provider]; len(replicas) > 0 {
		return replicas[0].Type == typeOf(capability)
	}
	return a.Permissions.MayEver(permission.Need{Capability: capability})
}

// granted returns the ids of the providers that an instance was granted for a capability.
func (d *Directory) granted(instance, capability string) []string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var ids []string
	for _, a := range d.assignments[instance] {
		if d.serves(a, capability) {
			ids = append(ids, a.Provider)
		}
	}
	return ids
}

// typeOf returns the provider type that serves a capability.
func typeOf(capability string) string {
	if capability == permission.Provider {
		return "external"
	}
	return capability
}

// capabilityOf returns the capability that a type of provider serves.
func capabilityOf(typ string) string {
	if typ == "external" {
		return permission.Provider
	}
	return typ
}
