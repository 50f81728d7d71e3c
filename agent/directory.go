package agent

import (
	"errors"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// The functions of this file translate records of the assignment stream into
// those of the directory that decides on capability calls.

func instanceRecord(inst *pb.Instance) provider.InstanceRecord {
	return provider.InstanceRecord{
		ID: inst.GetId(), Name: inst.GetName(),
		Node: inst.GetPlacement().GetNodeId(), NodeEpoch: inst.GetPlacement().GetNodeEpoch(),
		Generation: inst.GetPlacement().GetGeneration(), Created: inst.GetCreatedIndex(),
	}
}

func remoteRecord(inst *pb.RemoteInstance) provider.InstanceRecord {
	return provider.InstanceRecord{
		ID: inst.GetInstanceId(), Name: inst.GetName(),
		Node: inst.GetPlacement().GetNodeId(), NodeEpoch: inst.GetPlacement().GetNodeEpoch(),
		Generation: inst.GetPlacement().GetGeneration(), Created: inst.GetCreatedIndex(),
	}
}

func providerRecord(p *pb.Provider) provider.ProviderRecord {
	return provider.ProviderRecord{
		ID: p.GetId(), Replica: p.GetReplica(), Type: p.GetSpec().GetType(),
		Node: p.GetPlacement().GetNodeId(), Generation: p.GetPlacement().GetGeneration(),
		Running: p.GetDesiredRunning() && p.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_RUNNING,
		State:   providerStateLabel(p.GetStatus().GetState()),
	}
}

// grantRecord translates an assignment. A permission that this version cannot
// read grants nothing; the others stand, and the error names those left out.
func grantRecord(a *pb.CapabilityAssignment) (provider.Assignment, error) {
	out := provider.Assignment{
		Instance: a.GetInstanceId(), Provider: a.GetProviderId(), Bucket: a.GetBucket(), Subscriptions: a.GetSubscriptions(),
	}
	set, err := permission.ParseSet(a.GetPermissions())
	if err == nil {
		out.Permissions = set
		return out, nil
	}
	var readable []string
	var problems []error
	for _, text := range a.GetPermissions() {
		if _, err := permission.Parse(text); err != nil {
			problems = append(problems, err)
			continue
		}
		readable = append(readable, text)
	}
	set, err = permission.ParseSet(readable)
	out.Permissions = set
	return out, errors.Join(append(problems, err)...)
}

// directoryRecords translates the whole set.
func (s *assignments) directoryRecords() (provider.Records, error) {
	var r provider.Records
	var problems []error
	for _, inst := range s.instances {
		r.Instances = append(r.Instances, instanceRecord(inst))
	}
	for _, inst := range s.remotes {
		r.Instances = append(r.Instances, remoteRecord(inst))
	}
	for _, p := range s.providers {
		r.Providers = append(r.Providers, providerRecord(p))
	}
	for _, a := range s.grants {
		rec, err := grantRecord(a)
		problems = append(problems, err)
		r.Assignments = append(r.Assignments, rec)
	}
	for _, n := range s.nodes {
		r.Nodes = append(r.Nodes, provider.NodeRecord{ID: n.GetNodeId(), AgentAddress: n.GetAgentAddress()})
	}
	return r, errors.Join(problems...)
}

// feed passes one change of the stream on to the directory.
func feed(d *provider.Directory, c *pb.AssignmentChange) error {
	switch c := c.GetChange().(type) {
	case *pb.AssignmentChange_PutInstance:
		d.PutInstance(instanceRecord(c.PutInstance))
	case *pb.AssignmentChange_RemoveInstance:
		d.RemoveInstance(c.RemoveInstance)
	case *pb.AssignmentChange_PutProvider:
		d.PutProvider(providerRecord(c.PutProvider))
	case *pb.AssignmentChange_RemoveProvider:
		d.RemoveProvider(c.RemoveProvider)
	case *pb.AssignmentChange_PutAssignment:
		rec, err := grantRecord(c.PutAssignment)
		d.PutAssignment(rec)
		return err
	case *pb.AssignmentChange_RemoveAssignment:
		d.RemoveAssignment(c.RemoveAssignment.GetInstanceId(), c.RemoveAssignment.GetProviderId())
	case *pb.AssignmentChange_PutRemoteInstance:
		d.PutInstance(remoteRecord(c.PutRemoteInstance))
	case *pb.AssignmentChange_RemoveRemoteInstance:
		d.RemoveRemoteInstance(c.RemoveRemoteInstance)
	case *pb.AssignmentChange_PutNode:
		d.PutNode(provider.NodeRecord{ID: c.PutNode.GetNodeId(), AgentAddress: c.PutNode.GetAgentAddress()})
	case *pb.AssignmentChange_RemoveNode:
		d.RemoveNode(c.RemoveNode)
	}
	return nil
}
