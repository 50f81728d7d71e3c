package fsm

import (
	"encoding/hex"
	"strings"
	"time"

	"github.com/hashicorp/go-memdb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// View is the state at one index. It never changes and may be used from any
// goroutine. All records it returns are shared: never modify them.
//
// A method that takes a memdb.WatchSet adds to it what would change its answer;
// nil is allowed. WatchSet.WatchCtx then waits for such a change, also for one
// that Restore makes.
type View struct {
	txn *memdb.Txn
	sum summary
}

// Index returns the Raft index of the last entry that reached the state.
func (v View) Index() uint64 { return v.sum.index }

// Time returns the latest command time, the zero time before the first command.
func (v View) Time() time.Time {
	if v.sum.time == nil {
		return time.Time{}
	}
	return v.sum.time.AsTime()
}

// Hash returns the running hash of the state in hex. It is equal on all peers
// that show the same Index.
func (v View) Hash() string { return hex.EncodeToString(v.sum.hash[:]) }

// Node returns a node.
func (v View) Node(id string) (*pb.Node, bool) {
	return first[*pb.Node](v.txn, tableNodes, indexID, id)
}

// Nodes returns all nodes in the order of their ids.
func (v View) Nodes(ws memdb.WatchSet) []*pb.Node {
	return list[*pb.Node](v.txn, ws, tableNodes, indexID)
}

// Peer returns a control-plane peer.
func (v View) Peer(id string) (*pb.Peer, bool) {
	return first[*pb.Peer](v.txn, tablePeers, indexID, id)
}

// Peers returns all control-plane peers in the order of their ids.
func (v View) Peers(ws memdb.WatchSet) []*pb.Peer {
	return list[*pb.Peer](v.txn, ws, tablePeers, indexID)
}

// Module returns a module.
func (v View) Module(digest string) (*pb.Module, bool) {
	return first[*pb.Module](v.txn, tableModules, indexID, digest)
}

// Modules returns all modules in the order of their digests.
func (v View) Modules(ws memdb.WatchSet) []*pb.Module {
	return list[*pb.Module](v.txn, ws, tableModules, indexID)
}

// Provider returns the first replica of a capability provider. All replicas have
// the same id and spec; ProviderReplicas returns them all.
func (v View) Provider(id string) (*pb.Provider, bool) {
	return first[*pb.Provider](v.txn, tableProviders, indexID, id, replicaPart(0))
}

// ProviderReplicas returns the replicas of a capability provider in order; none
// when there is no such provider.
func (v View) ProviderReplicas(id string) []*pb.Provider { return replicasOf(v.txn, id) }

// Providers returns the replicas of all capability providers in the order of
// their ids and of their numbers.
func (v View) Providers(ws memdb.WatchSet) []*pb.Provider {
	return list[*pb.Provider](v.txn, ws, tableProviders, indexID)
}

// ProvidersByNode returns the replicas of providers that belong to a node, stopped
// and LOST ones too, in the order of their ids. No two are of one provider.
func (v View) ProvidersByNode(ws memdb.WatchSet, nodeID string) []*pb.Provider {
	return list[*pb.Provider](v.txn, ws, tableProviders, indexNode, nodeID)
}

// UnplacedProviders returns the replicas of providers that need a node, in the
// order of their ids and of their numbers.
func (v View) UnplacedProviders(ws memdb.WatchSet) []*pb.Provider {
	return list[*pb.Provider](v.txn, ws, tableProviders, indexUnplaced)
}

// Assignment returns what an instance may do with a provider.
func (v View) Assignment(instanceID, providerID string) (*pb.CapabilityAssignment, bool) {
	return first[*pb.CapabilityAssignment](v.txn, tableAssignments, indexID, instanceID, providerID)
}

// AssignmentsByInstance returns an instance's assignments in the order of their providers.
func (v View) AssignmentsByInstance(ws memdb.WatchSet, instanceID string) []*pb.CapabilityAssignment {
	return assignmentsOf(v.txn, ws, instanceID)
}

// AssignmentsByProvider returns the assignments that use a provider, in the
// order of their instances.
func (v View) AssignmentsByProvider(ws memdb.WatchSet, providerID string) []*pb.CapabilityAssignment {
	return list[*pb.CapabilityAssignment](v.txn, ws, tableAssignments, indexProvider, providerID)
}

// Events returns the kept events after a sequence number, oldest first, at most
// limit of them; 0 means all.
func (v View) Events(afterSequence uint64, limit int) []*pb.Event {
	if afterSequence >= v.sum.lastEvent {
		return nil
	}
	it, err := v.txn.LowerBound(tableEvents, indexID, afterSequence+1)
	must(err)
	return collect[*pb.Event](it, limit)
}

// EventBounds returns the sequence numbers of the oldest and the newest kept
// event. Without events it returns (0, 0).
func (v View) EventBounds() (oldest, newest uint64) {
	if v.sum.eventCount == 0 {
		return 0, 0
	}
	return v.sum.lastEvent - v.sum.eventCount + 1, v.sum.lastEvent
}

// Instance returns an instance.
func (v View) Instance(id string) (*pb.Instance, bool) {
	return first[*pb.Instance](v.txn, tableInstances, indexID, id)
}

// Instances returns all instances in the order of their ids.
func (v View) Instances(ws memdb.WatchSet) []*pb.Instance {
	return list[*pb.Instance](v.txn, ws, tableInstances, indexID)
}

// InstancesAfter returns the instances whose ids come after afterID, in the
// order of their ids, at most limit of them; 0 means all. It is for answers in pages.
func (v View) InstancesAfter(afterID string, limit int) []*pb.Instance {
	// The key of an id ends with the terminator; one more byte is just after it.
	it, err := v.txn.LowerBound(tableInstances, indexID, afterID, "")
	must(err)
	return collect[*pb.Instance](it, limit)
}

// InstancesByName returns the instances of a workload in the order of their ids.
func (v View) InstancesByName(ws memdb.WatchSet, name string) []*pb.Instance {
	return list[*pb.Instance](v.txn, ws, tableInstances, indexName, name)
}

// InstancesByNode returns the instances placed on a node in the order of their
// ids. Ended ones are among them; LOST ones are not, they belong to no node.
func (v View) InstancesByNode(ws memdb.WatchSet, nodeID string) []*pb.Instance {
	return list[*pb.Instance](v.txn, ws, tableInstances, indexNode, nodeID)
}

// InstancesByPrefix returns the instances whose ids begin with prefix, in the
// order of their ids, at most limit of them; 0 means all.
func (v View) InstancesByPrefix(prefix string, limit int) []*pb.Instance {
	it, err := v.txn.Get(tableInstances, indexPrefix, prefix)
	must(err)
	return collect[*pb.Instance](it, limit)
}

// UnplacedInstances returns the instances that are to be placed, in the order of
// their ids: those for which Unplaced holds, and those for which Leaving does
// because their node drains.
func (v View) UnplacedInstances(ws memdb.WatchSet) []*pb.Instance {
	out := list[*pb.Instance](v.txn, ws, tableInstances, indexUnplaced)
	for _, node := range v.Nodes(ws) {
		if !node.GetDraining() {
			continue
		}
		for _, in := range v.InstancesByNode(ws, node.GetId()) {
			if Leaving(in, node) {
				out = append(out, in)
			}
		}
	}
	sortByID(out)
	return out
}

// InstanceCount returns how many instances take room on a node. Its cost does
// not depend on their number.
func (v View) InstanceCount(nodeID string) int {
	l, _ := first[*load](v.txn, tableLoads, indexID, nodeID)
	if l == nil {
		return 0
	}
	return l.instances
}

// Resolve finds what a user names: the instance with that id, else all instances
// of the workload with that name, ended ones too, else the one instance whose id
// begins with it. It returns INSTANCE_NOT_FOUND when there is none and
// INVALID_REQUEST when a prefix is ambiguous.
func (v View) Resolve(target string) ([]*pb.Instance, *pb.Error) {
	if target == "" {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the target is empty").
			next("name an instance, a workload or the beginning of an id").err
	}
	if in, ok := v.Instance(target); ok {
		return []*pb.Instance{in}, nil
	}
	if named := v.InstancesByName(nil, target); len(named) > 0 {
		return named, nil
	}
	found := v.InstancesByPrefix(target, maxNamed+1)
	switch len(found) {
	case 0:
		return nil, instanceNotFound(target).err
	case 1:
		return found, nil
	}
	matches := strings.Join(idsOf(found[:min(len(found), maxNamed)]), ", ")
	if len(found) > maxNamed {
		matches += " and more"
	}
	return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%q is the beginning of several instance ids", target).
		with("target", target).
		with("matches", matches).
		next("give more of the id, or the workload's name").err
}

// Answered reports whether the answer to a request is remembered.
func (v View) Answered(requestID string) bool {
	if requestID == "" {
		return false
	}
	_, ok := first[*pb.DedupRecord](v.txn, tableDedup, indexID, requestID)
	return ok
}

// Session returns a client session.
func (v View) Session(id string) (*pb.ClientSession, bool) {
	return first[*pb.ClientSession](v.txn, tableSessions, indexID, id)
}

// SessionCounts returns how many client sessions there are and how many answers
// they keep.
func (v View) SessionCounts() (sessions, answers int) {
	return v.sum.sessionCount, v.sum.sessionAnswers
}
