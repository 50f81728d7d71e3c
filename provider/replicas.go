package provider

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/wasmatrix/wasmatrix/permission"
)

// ReplicaKey names one replica of a provider among all: the id for replica 0,
// and "id/N" for the others.
func ReplicaKey(id string, replica uint32) string {
	if replica == 0 {
		return id
	}
	return id + "/" + strconv.FormatUint(uint64(replica), 10)
}

// parseReplicaKey is the inverse of ReplicaKey.
func parseReplicaKey(key string) (id string, replica uint32) {
	id, n, found := strings.Cut(key, "/")
	if !found {
		return id, 0
	}
	number, err := strconv.ParseUint(n, 10, 32)
	if err != nil {
		return key, 0 // the key of nothing
	}
	return id, uint32(number)
}

// PutProvider adds or replaces a replica of a provider.
func (d *Directory) PutProvider(rec ProviderRecord) {
	d.change(func() { d.putProvider(&rec) })
}

// putProvider never changes a slice that a reader may hold.
func (d *Directory) putProvider(rec *ProviderRecord) {
	list := d.providers[rec.ID]
	i, found := slices.BinarySearchFunc(list, rec.Replica, byReplica)
	next := slices.Clone(list)
	if found {
		next[i] = rec
	} else {
		next = slices.Insert(next, i, rec)
	}
	d.providers[rec.ID] = next
}

// RemoveProvider removes a replica of a provider, by its ReplicaKey.
func (d *Directory) RemoveProvider(key string) {
	id, replica := parseReplicaKey(key)
	d.change(func() {
		list := d.providers[id]
		i, found := slices.BinarySearchFunc(list, replica, byReplica)
		switch {
		case !found:
		case len(list) == 1:
			delete(d.providers, id)
		default:
			d.providers[id] = slices.Delete(slices.Clone(list), i, i+1)
		}
	})
}

func byReplica(rec *ProviderRecord, replica uint32) int { return cmp.Compare(rec.Replica, replica) }

// Provider returns what is known of a provider: of its replica on this node, or
// else of its first one.
func (d *Directory) Provider(id string) (ProviderRecord, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	rec := d.nearest(d.providers[id])
	if rec == nil {
		return ProviderRecord{}, false
	}
	return *rec, true
}

// Replicas returns what is known of all replicas of a provider, in their order.
func (d *Directory) Replicas(provider string) []ProviderRecord {
	d.mu.RLock()
	list := d.providers[provider]
	d.mu.RUnlock()
	out := make([]ProviderRecord, len(list))
	for i, rec := range list {
		out[i] = *rec
	}
	return out
}

// nearest returns the replica on this node, or else the first one.
func (d *Directory) nearest(replicas []*ProviderRecord) *ProviderRecord {
	for _, rec := range replicas {
		if rec.Node == d.self {
			return rec
		}
	}
	if len(replicas) == 0 {
		return nil
	}
	return replicas[0]
}

// noteSubscriptions keeps the index of assignments with subscriptions.
func (d *Directory) noteSubscriptions(a *Assignment) {
	at := d.subscribed[a.Provider]
	switch {
	case len(a.Subscriptions) > 0:
		if at == nil {
			at = map[string]*Assignment{}
			d.subscribed[a.Provider] = at
		}
		at[a.Instance] = a
	case len(at) > 0:
		delete(at, a.Instance)
		if len(at) == 0 {
			delete(d.subscribed, a.Provider)
		}
	}
}

// Subscriptions returns the subscriptions of known instances at a provider that
// a permission covers, sorted by Name, Subject and Instance.
func (d *Directory) Subscriptions(provider string) []Subscription {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var out []Subscription
	for id, a := range d.subscribed[provider] {
		inst := d.instances[id]
		if inst == nil {
			continue
		}
		for _, subject := range a.Subscriptions {
			need := permission.Need{Capability: permission.Messaging, Action: permission.Subscribe, Resource: subject}
			if _, ok := a.Permissions.Allows(need); !ok {
				continue
			}
			out = append(out, Subscription{
				Instance: id, Name: inst.Name, Node: inst.Node, Generation: inst.Generation, Created: inst.Created,
				Provider: provider, Subject: subject,
			})
		}
	}
	slices.SortFunc(out, func(a, b Subscription) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Instance, b.Instance))
	})
	return out
}
