package dispatch

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// kind orders the changes of a message: what something else needs comes first.
type kind int

const (
	kindNode kind = iota
	kindProvider
	kindAssignment
	kindRemote
	kindInstance
)

// key identifies one thing a node knows; second is set for assignments only. The
// first of a provider names the replica as fsm.ReplicaName does.
type key struct {
	kind          kind
	first, second string
}

// item is one thing a node knows: a record of the registry, of which the node
// gets the part that same compares and put sends.
type item interface {
	// same reports whether a node that got other needs nothing new.
	same(other item) bool
	put() *pb.AssignmentChange
}

// onDisconnectStop is the value of WorkloadSpec.on_disconnect that ends an
// instance with the lease of its node.
const onDisconnectStop = "stop"

// set is all that a node must know.
type set map[key]item

// collect computes what the session's node must know.
func collect(r *reader, self holder) set {
	out := set{}
	for _, in := range r.instancesOn(self.node) {
		// What ended before this agent process began is not its business.
		if in.GetPlacement().GetNodeEpoch() == self.epoch {
			out.addInstance(r, self, in)
		}
	}
	for _, p := range r.providersOn(self.node) {
		out[replicaKey(p)] = hostedProvider{p}
		for _, a := range r.assignmentsTo(p.GetId()) {
			out.addCaller(r, self, a)
		}
	}
	return out
}

// addInstance adds an instance of the node with all that it may use: every replica
// of a provider, so that its agent can turn to another one.
func (s set) addInstance(r *reader, self holder, in *pb.Instance) {
	s[key{kindInstance, in.GetId(), ""}] = localInstance{in}
	for _, a := range r.assignmentsOf(in.GetId()) {
		s.addAssignment(a)
		for _, p := range r.replicas(a.GetProviderId()) {
			if p.GetPlacement().GetNodeId() == self.node {
				continue
			}
			s[replicaKey(p)] = usedProvider{p}
			s.addNode(r, self, p.GetPlacement().GetNodeId())
		}
	}
}

func replicaKey(p *pb.Provider) key {
	return key{kindProvider, fsm.ReplicaName(p.GetId(), p.GetReplica()), ""}
}

// addCaller adds an instance of another node that may call a provider here.
func (s set) addCaller(r *reader, self holder, a *pb.CapabilityAssignment) {
	in, ok := r.caller(a.GetInstanceId())
	if !ok || in.GetPlacement().GetNodeId() == self.node || !mayCall(in) {
		return
	}
	s.addAssignment(a)
	s[key{kindRemote, in.GetId(), ""}] = remoteInstance{in}
	s.addNode(r, self, in.GetPlacement().GetNodeId())
}

func (s set) addAssignment(a *pb.CapabilityAssignment) {
	s[key{kindAssignment, a.GetInstanceId(), a.GetProviderId()}] = assignment{a}
}

func (s set) addNode(r *reader, self holder, nodeID string) {
	if nodeID == "" || nodeID == self.node {
		return
	}
	if node, ok := r.node(nodeID); ok {
		s[key{kindNode, nodeID, ""}] = nodeAddress{node}
	}
}

// mayCall reports whether an instance may have effects. One whose node was lost
// may still run there, cut off, unless it ends with the lease; only a newer
// generation takes its calls away.
func mayCall(in *pb.Instance) bool {
	if in.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_LOST {
		return in.GetDesiredRunning() && in.GetSpec().GetOnDisconnect() != onDisconnectStop
	}
	return fsm.Occupies(in)
}

// difference returns the changes that turn what was sent into what holds now.
// What is taken away comes first, so that a right ends before another begins.
func difference(sent, now set) []*pb.AssignmentChange {
	var removed, added []key
	for k := range sent {
		if _, ok := now[k]; !ok {
			removed = append(removed, k)
		}
	}
	for k, it := range now {
		if had, ok := sent[k]; !ok || !it.same(had) {
			added = append(added, k)
		}
	}
	slices.SortFunc(removed, func(a, b key) int { return compareKeys(b, a) })
	slices.SortFunc(added, compareKeys)
	changes := make([]*pb.AssignmentChange, 0, len(removed)+len(added))
	for _, k := range removed {
		changes = append(changes, k.remove())
	}
	for _, k := range added {
		changes = append(changes, now[k].put())
	}
	return changes
}

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.first, b.first), cmp.Compare(a.second, b.second))
}

func (k key) remove() *pb.AssignmentChange {
	switch k.kind {
	case kindInstance:
		return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveInstance{RemoveInstance: k.first}}
	case kindProvider:
		return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveProvider{RemoveProvider: k.first}}
	case kindRemote:
		return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveRemoteInstance{RemoveRemoteInstance: k.first}}
	case kindNode:
		return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveNode{RemoveNode: k.first}}
	default:
		return &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveAssignment{
			RemoveAssignment: &pb.AssignmentKey{InstanceId: k.first, ProviderId: k.second},
		}}
	}
}

// localInstance is an instance of the node. It is sent with its status as of
// that moment, so that an agent goes on counting crashes and does not run again
// what has ended; a change of the status alone is the agent's own and not sent.
type localInstance struct{ *pb.Instance }

func (i localInstance) same(other item) bool {
	o, ok := other.(localInstance)
	return ok && sameInstance(i.Instance, o.Instance)
}

func sameInstance(a, b *pb.Instance) bool {
	return a == b || a.GetDesiredRunning() == b.GetDesiredRunning() && a.GetRestartEpoch() == b.GetRestartEpoch() &&
		a.GetLeaving() == b.GetLeaving() &&
		samePlacement(a.GetPlacement(), b.GetPlacement()) && sameMessage(a.GetSpec(), b.GetSpec())
}

func (i localInstance) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutInstance{PutInstance: i.Instance}}
}

// hostedProvider is a replica of a provider on the node, with its configuration.
// Its state is the agent's own and not compared.
type hostedProvider struct{ *pb.Provider }

func (p hostedProvider) same(other item) bool {
	o, ok := other.(hostedProvider)
	return ok && sameHosted(p.Provider, o.Provider)
}

func sameHosted(a, b *pb.Provider) bool {
	return a == b || a.GetReplica() == b.GetReplica() && a.GetDesiredRunning() == b.GetDesiredRunning() &&
		a.GetSpecVersion() == b.GetSpecVersion() && sameMessage(a.GetStopGrace(), b.GetStopGrace()) &&
		samePlacement(a.GetPlacement(), b.GetPlacement()) && sameMessage(a.GetSpec(), b.GetSpec())
}

func (p hostedProvider) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutProvider{PutProvider: p.Provider}}
}

// usedProvider is a replica of a provider on another node. Its configuration,
// which may hold credentials, stays with the node that hosts it; its state is sent,
// so that a call to one that does not serve is refused at once.
type usedProvider struct{ *pb.Provider }

func (p usedProvider) same(other item) bool {
	o, ok := other.(usedProvider)
	return ok && sameUsed(p.Provider, o.Provider)
}

func sameUsed(a, b *pb.Provider) bool {
	return a == b || a.GetReplica() == b.GetReplica() &&
		a.GetDesiredRunning() == b.GetDesiredRunning() && a.GetStatus().GetState() == b.GetStatus().GetState() &&
		a.GetSpec().GetType() == b.GetSpec().GetType() && a.GetSpec().GetDriver() == b.GetSpec().GetDriver() &&
		samePlacement(a.GetPlacement(), b.GetPlacement())
}

func (p usedProvider) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutProvider{PutProvider: &pb.Provider{
		Id:             p.GetId(),
		Replica:        p.GetReplica(),
		Spec:           &pb.ProviderSpec{Id: p.GetId(), Type: p.GetSpec().GetType(), Driver: p.GetSpec().GetDriver()},
		DesiredRunning: p.GetDesiredRunning(),
		Placement:      p.GetPlacement(),
		Status:         &pb.ProviderStatus{State: p.GetStatus().GetState(), Generation: p.GetStatus().GetGeneration()},
	}}}
}

// assignment lets an instance use a provider, and says what it is subscribed to
// there.
type assignment struct{ *pb.CapabilityAssignment }

func (a assignment) same(other item) bool {
	o, ok := other.(assignment)
	return ok && sameAssignment(a.CapabilityAssignment, o.CapabilityAssignment)
}

func sameAssignment(a, b *pb.CapabilityAssignment) bool {
	return a == b || a.GetInstanceId() == b.GetInstanceId() && a.GetProviderId() == b.GetProviderId() &&
		a.GetBucket() == b.GetBucket() && slices.Equal(a.GetPermissions(), b.GetPermissions()) &&
		slices.Equal(a.GetSubscriptions(), b.GetSubscriptions())
}

func (a assignment) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: a.CapabilityAssignment}}
}

// remoteInstance is an instance on another node that may call a provider here.
type remoteInstance struct{ *pb.Instance }

func (i remoteInstance) same(other item) bool {
	o, ok := other.(remoteInstance)
	return ok && sameCaller(i.Instance, o.Instance)
}

func sameCaller(a, b *pb.Instance) bool {
	return a == b || a.GetId() == b.GetId() && mayCall(a) == mayCall(b) && samePlacement(a.GetPlacement(), b.GetPlacement())
}

func (i remoteInstance) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutRemoteInstance{PutRemoteInstance: &pb.RemoteInstance{
		InstanceId: i.GetId(), Name: i.GetName(), Placement: i.GetPlacement(), CreatedIndex: i.GetCreatedIndex(),
	}}}
}

// nodeAddress is where another node's agent listens.
type nodeAddress struct{ *pb.Node }

func (n nodeAddress) same(other item) bool {
	o, ok := other.(nodeAddress)
	return ok && sameAddress(n.Node, o.Node)
}

func sameAddress(a, b *pb.Node) bool {
	return a == b || a.GetInfo().GetAgentAddress() == b.GetInfo().GetAgentAddress()
}

func (n nodeAddress) put() *pb.AssignmentChange {
	return &pb.AssignmentChange{Change: &pb.AssignmentChange_PutNode{PutNode: &pb.NodeAddress{
		NodeId: n.GetId(), AgentAddress: n.GetInfo().GetAgentAddress(),
	}}}
}

func samePlacement(a, b *pb.Placement) bool {
	return a == b || a.GetNodeId() == b.GetNodeId() && a.GetNodeEpoch() == b.GetNodeEpoch() &&
		a.GetGeneration() == b.GetGeneration()
}

// sameMessage compares specs. Most often they are one and the same record.
func sameMessage[M interface {
	comparable
	proto.Message
}](a, b M) bool {
	return a == b || proto.Equal(a, b)
}
