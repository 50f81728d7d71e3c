package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// errGap: a difference does not apply to what the agent has.
var errGap = errors.New("gap in the assignment stream")

// assignmentKey identifies a capability assignment.
type assignmentKey struct{ instance, provider string }

// assignments is all that is assigned to this node, as the stream tells it. Its
// records are shared and never modified.
type assignments struct {
	sequence  uint64
	index     uint64
	instances map[string]*pb.Instance
	providers map[string]*pb.Provider // by provider.ReplicaKey
	grants    map[assignmentKey]*pb.CapabilityAssignment
	remotes   map[string]*pb.RemoteInstance
	nodes     map[string]*pb.NodeAddress
}

func newAssignments() *assignments {
	return &assignments{
		instances: map[string]*pb.Instance{},
		providers: map[string]*pb.Provider{},
		grants:    map[assignmentKey]*pb.CapabilityAssignment{},
		remotes:   map[string]*pb.RemoteInstance{},
		nodes:     map[string]*pb.NodeAddress{},
	}
}

// clone returns a copy that can be changed without the original.
func (s *assignments) clone() *assignments {
	return &assignments{
		sequence: s.sequence, index: s.index,
		instances: maps.Clone(s.instances), providers: maps.Clone(s.providers), grants: maps.Clone(s.grants),
		remotes: maps.Clone(s.remotes), nodes: maps.Clone(s.nodes),
	}
}

// apply takes up a full set or a difference. It fails with errGap, and changes
// nothing, when a difference does not follow what came before.
func (s *assignments) apply(msg *pb.WatchAssignmentsResponse) error {
	if msg.GetComplete() {
		*s = *newAssignments()
	} else if msg.GetAppliesTo() != s.sequence {
		return fmt.Errorf("%w: a difference applies to %d, have %d", errGap, msg.GetAppliesTo(), s.sequence)
	}
	for _, c := range msg.GetChanges() {
		s.change(c)
	}
	s.sequence, s.index = msg.GetResultsIn(), msg.GetIndex()
	return nil
}

func (s *assignments) change(c *pb.AssignmentChange) {
	switch c := c.GetChange().(type) {
	case *pb.AssignmentChange_PutInstance:
		s.instances[c.PutInstance.GetId()] = c.PutInstance
	case *pb.AssignmentChange_RemoveInstance:
		delete(s.instances, c.RemoveInstance)
	case *pb.AssignmentChange_PutProvider:
		s.providers[provider.ReplicaKey(c.PutProvider.GetId(), c.PutProvider.GetReplica())] = c.PutProvider
	case *pb.AssignmentChange_RemoveProvider:
		delete(s.providers, c.RemoveProvider)
	case *pb.AssignmentChange_PutAssignment:
		a := c.PutAssignment
		s.grants[assignmentKey{a.GetInstanceId(), a.GetProviderId()}] = a
	case *pb.AssignmentChange_RemoveAssignment:
		k := c.RemoveAssignment
		delete(s.grants, assignmentKey{k.GetInstanceId(), k.GetProviderId()})
	case *pb.AssignmentChange_PutRemoteInstance:
		s.remotes[c.PutRemoteInstance.GetInstanceId()] = c.PutRemoteInstance
	case *pb.AssignmentChange_RemoveRemoteInstance:
		delete(s.remotes, c.RemoveRemoteInstance)
	case *pb.AssignmentChange_PutNode:
		s.nodes[c.PutNode.GetNodeId()] = c.PutNode
	case *pb.AssignmentChange_RemoveNode:
		delete(s.nodes, c.RemoveNode)
	}
}

// full returns the set as one complete message, in a fixed order. status, where
// it knows an instance, replaces what the record says.
func (s *assignments) full(status func(id string) *pb.InstanceStatus) *pb.WatchAssignmentsResponse {
	msg := &pb.WatchAssignmentsResponse{Complete: true, ResultsIn: s.sequence, Index: s.index}
	add := func(c *pb.AssignmentChange) { msg.Changes = append(msg.Changes, c) }
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		add(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutNode{PutNode: s.nodes[id]}})
	}
	for _, id := range slices.Sorted(maps.Keys(s.providers)) {
		add(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutProvider{PutProvider: s.providers[id]}})
	}
	for _, id := range slices.Sorted(maps.Keys(s.remotes)) {
		add(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutRemoteInstance{PutRemoteInstance: s.remotes[id]}})
	}
	keys := slices.SortedFunc(maps.Keys(s.grants), func(a, b assignmentKey) int {
		return slices.Compare([]string{a.instance, a.provider}, []string{b.instance, b.provider})
	})
	for _, k := range keys {
		add(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: s.grants[k]}})
	}
	for _, id := range slices.Sorted(maps.Keys(s.instances)) {
		inst := s.instances[id]
		if st := status(id); st != nil && st.GetGeneration() == inst.GetPlacement().GetGeneration() {
			inst = withStatus(inst, st)
		}
		add(&pb.AssignmentChange{Change: &pb.AssignmentChange_PutInstance{PutInstance: inst}})
	}
	return msg
}

// grantsOf returns the capability assignments of one instance, by provider.
func (s *assignments) grantsOf(id string) []*pb.CapabilityAssignment {
	var out []*pb.CapabilityAssignment
	for k, a := range s.grants {
		if k.instance == id {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b *pb.CapabilityAssignment) int {
		return cmp.Compare(a.GetProviderId(), b.GetProviderId())
	})
	return out
}
