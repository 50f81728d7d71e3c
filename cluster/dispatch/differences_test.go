package dispatch

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// compared strips what a difference does not carry: the status of instances and
// of hosted providers, and bookkeeping of the registry.
func compared(k agentSet) map[string]*pb.AssignmentChange {
	out := map[string]*pb.AssignmentChange{}
	for name, c := range k {
		c, _ := proto.Clone(c).(*pb.AssignmentChange)
		if in := c.GetPutInstance(); in != nil {
			in.Status, in.ModifiedIndex = nil, 0
		}
		if p := c.GetPutProvider(); p != nil {
			p.ModifiedIndex = 0
			if len(p.GetSpec().GetConfig()) > 0 {
				p.Status = nil
			}
		}
		if a := c.GetPutAssignment(); a != nil {
			a.ModifiedIndex, a.CorrelationId = 0, ""
		}
		out[name] = c
	}
	return out
}

// Under random changes of the registry the full set and all differences after it
// equal the full set computed afresh, and the session is awake whenever there is
// something to send.
func TestDifferencesAddUpToTheFullSet(t *testing.T) {
	nodes := []string{"n1", "n2", "n3"}
	providers := []string{"p1", "p2", busID}
	rapid.Check(t, func(rt *rapid.T) {
		r := newRegistry(t)
		for _, id := range nodes {
			r.addNode(t, id)
		}
		dirs := newDirectories()
		sync := func() {
			view := r.state.View()
			dirs.nodes.sync(view.Nodes(nil))
			dirs.syncProviders(view.Providers(nil))
		}
		sync()
		s := newSession(holder{"n1", 1}, dirs)
		known, seq := agentSet{}, uint64(0)
		var ids []string
		ws := memdb.NewWatchSet()
		for step := range rapid.IntRange(1, 40).Draw(rt, "steps") {
			ids = randomChange(rt, t, r, ids, nodes, providers, step)
			if rapid.Bool().Draw(rt, "followers keep up") {
				sync()
			}
			if rapid.IntRange(0, 2).Draw(rt, "agent is slow") == 0 {
				continue
			}
			view := r.state.View()
			if rapid.Bool().Draw(rt, "something changes meanwhile") {
				ids = randomChange(rt, t, r, ids, nodes, providers, 100+step)
				sync()
			}
			messages := s.next(view)
			if rapid.Bool().Draw(rt, "followers catch up before it sleeps") {
				sync()
			}
			slept := ws
			ws = memdb.NewWatchSet()
			s.watch(ws)
			sync()
			if seq > 0 && len(messages) > 0 && !fired(slept) {
				rt.Fatalf("step %d: the session would have slept through %v", step, messages)
			}
			for _, m := range messages {
				if err := known.apply(m, &seq); err != nil {
					rt.Fatal(err)
				}
			}
			fresh, freshSeq := agentSet{}, uint64(0)
			for _, m := range newSession(holder{"n1", 1}, dirs).next(view) {
				if err := fresh.apply(m, &freshSeq); err != nil {
					rt.Fatal(err)
				}
			}
			if diff := cmp.Diff(compared(fresh), compared(known), protocmp.Transform()); diff != "" {
				rt.Fatalf("step %d: the agent knows (-fresh +known)\n%s", step, diff)
			}
		}
	})
}

// randomChange does one thing to the registry that may be refused.
func randomChange(rt *rapid.T, t *testing.T, r *registry, ids, nodes, providers []string, step int) []string {
	node := rapid.SampledFrom(nodes).Draw(rt, "node")
	provider := rapid.SampledFrom(providers).Draw(rt, "provider")
	id := ""
	if len(ids) > 0 {
		id = rapid.SampledFrom(ids).Draw(rt, "instance")
	}
	op := rapid.IntRange(0, 16).Draw(rt, "op")
	var cmd *pb.Command
	switch {
	case op == 0 || id == "":
		id = fmt.Sprintf("w%d-%d", step%3, step)
		cmd = &pb.Command{Payload: &pb.Command_CreateInstances{CreateInstances: &pb.CreateInstancesCommand{
			Spec: &pb.WorkloadSpec{Name: fmt.Sprintf("w%d", step%3), Module: digest, Replicas: 1}, InstanceIds: []string{id},
		}}}
		if _, err := r.apply(cmd); err != nil {
			return ids
		}
		return append(ids, id)
	case op == 1:
		r.place(t, id, node)
		return ids
	case op == 2:
		cmd = &pb.Command{Payload: &pb.Command_StopInstances{StopInstances: &pb.StopInstancesCommand{InstanceIds: []string{id}}}}
	case op == 3:
		cmd = &pb.Command{Payload: &pb.Command_RestartInstances{RestartInstances: &pb.RestartInstancesCommand{InstanceIds: []string{id}}}}
	case op == 4:
		cmd = &pb.Command{Payload: &pb.Command_RemoveInstances{RemoveInstances: &pb.RemoveInstancesCommand{InstanceIds: []string{id}, Force: true}}}
		if _, err := r.apply(cmd); err == nil {
			ids = slices.DeleteFunc(slices.Clone(ids), func(s string) bool { return s == id })
		}
		return ids
	case op == 5 || op == 6:
		in, _ := r.state.View().Instance(id)
		state := rapid.SampledFrom([]pb.InstanceState{
			pb.InstanceState_INSTANCE_STATE_RUNNING, pb.InstanceState_INSTANCE_STATE_STOPPED,
			pb.InstanceState_INSTANCE_STATE_FAILED, pb.InstanceState_INSTANCE_STATE_CRASHED,
		}).Draw(rt, "state")
		if on := in.GetPlacement().GetNodeId(); on != "" {
			cmd = &pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: r.instanceReport(on, id, state)}}
		}
	case op == 7:
		cmd = &pb.Command{Payload: &pb.Command_AssignCapability{AssignCapability: &pb.AssignCapabilityCommand{
			InstanceIds: []string{id}, Grant: &pb.CapabilityGrant{Provider: provider, Permissions: []string{rapid.SampledFrom([]string{"kv:read", "kv:write"}).Draw(rt, "permission")}},
		}}}
	case op == 8:
		cmd = &pb.Command{Payload: &pb.Command_RevokeCapability{RevokeCapability: &pb.RevokeCapabilityCommand{InstanceIds: []string{id}, ProviderId: provider}}}
	case op >= 14 && provider == busID:
		cmd = randomBusChange(rt, r, id, node)
	case op == 9 && provider == busID:
		return ids
	case op == 9:
		if _, known := r.state.View().Provider(provider); known {
			cmd = &pb.Command{Payload: &pb.Command_UpdateProvider{UpdateProvider: &pb.UpdateProviderCommand{Spec: &pb.ProviderSpec{
				Id: provider, Type: "kv", Config: map[string]string{"step": fmt.Sprint(step)}, Placement: &pb.PlacementRules{Node: node},
			}}}}
		} else {
			cmd = &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{
				Spec: &pb.ProviderSpec{Id: provider, Type: "kv", Config: map[string]string{"step": "0"}},
			}}}
		}
	case op == 10:
		if p, known := r.state.View().Provider(provider); known {
			cmd = &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
				ProviderId: provider, SeenGeneration: p.GetPlacement().GetGeneration(), NodeId: node, NodeEpoch: r.node(node).GetEpoch(),
			}}}}}
		}
	case op == 11:
		if p, known := r.state.View().Provider(provider); known && p.GetPlacement().GetNodeId() != "" {
			state := rapid.SampledFrom([]pb.ProviderState{pb.ProviderState_PROVIDER_STATE_RUNNING, pb.ProviderState_PROVIDER_STATE_STOPPED}).Draw(rt, "provider state")
			cmd = &pb.Command{Payload: &pb.Command_ReportStatus{ReportStatus: r.providerReport(p.GetPlacement().GetNodeId(), provider, state)}}
		}
	case op == 12 && step%2 == 0:
		cmd = &pb.Command{Payload: &pb.Command_DeregisterProvider{DeregisterProvider: &pb.DeregisterProviderCommand{ProviderId: provider}}}
	case op == 12:
		cmd = &pb.Command{Payload: &pb.Command_SetProviderRunning{SetProviderRunning: &pb.SetProviderRunningCommand{ProviderId: provider, Running: rapid.Bool().Draw(rt, "running")}}}
	case node != "n1" && step%2 == 0:
		info := nodeInfo(node)
		info.AgentAddress = fmt.Sprintf("%s-%d:7400", node, step)
		cmd = &pb.Command{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{Info: info, Epoch: r.node(node).GetEpoch()}}}
	case node != "n1":
		if r.node(node).GetState() == pb.NodeState_NODE_STATE_READY {
			cmd = &pb.Command{Payload: &pb.Command_ExpireNode{ExpireNode: &pb.ExpireNodeCommand{NodeId: node, Epoch: r.node(node).GetEpoch()}}}
		} else {
			cmd = &pb.Command{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{Info: nodeInfo(node)}}}
		}
	}
	if cmd != nil {
		_, _ = r.apply(cmd) // a refusal changes nothing, which is a step too
	}
	return ids
}

// busID is the provider that has replicas and subscriptions.
const busID = "bus"

// randomBusChange does something to the messaging provider.
func randomBusChange(rt *rapid.T, r *registry, instanceID, node string) *pb.Command {
	spec := &pb.ProviderSpec{
		Id: busID, Type: "messaging", Driver: "nats", Config: map[string]string{"url": "x"},
		Replicas: rapid.Uint32Range(1, 3).Draw(rt, "replicas"),
	}
	replicas := r.state.View().ProviderReplicas(busID)
	if len(replicas) == 0 {
		return &pb.Command{Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{Spec: spec}}}
	}
	p := rapid.SampledFrom(replicas).Draw(rt, "replica")
	switch rapid.IntRange(0, 6).Draw(rt, "bus op") {
	case 0:
		return &pb.Command{Payload: &pb.Command_UpdateProvider{UpdateProvider: &pb.UpdateProviderCommand{Spec: spec}}}
	case 1, 2:
		return &pb.Command{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
			ProviderId: busID, Replica: p.GetReplica(), SeenGeneration: p.GetPlacement().GetGeneration(),
			NodeId: node, NodeEpoch: r.node(node).GetEpoch(),
		}}}}}
	case 3:
		return &pb.Command{Payload: &pb.Command_AssignCapability{AssignCapability: &pb.AssignCapabilityCommand{
			InstanceIds: []string{instanceID}, Grant: &pb.CapabilityGrant{Provider: busID, Permissions: []string{"msg:subscribe"}},
		}}}
	default:
		subject := rapid.SampledFrom([]string{"a", "b", "c.*"}).Draw(rt, "subject")
		return &pb.Command{Payload: &pb.Command_RecordSubscription{RecordSubscription: r.subscription(
			p.GetPlacement().GetNodeId(), instanceID, busID, subject, rapid.Bool().Draw(rt, "subscribed"))}}
	}
}

// What was lost with its node may go on there, cut off, unless it ends with the lease.
func TestWhoMayCallOnceTheirNodeWasLost(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*pb.Instance)
		want bool
	}{
		"it goes on":                    {func(*pb.Instance) {}, true},
		"also where it is not to go on": {func(in *pb.Instance) { in.Spec.Restart = &pb.RestartPolicy{Policy: "never"} }, true},
		"it ended with the lease":       {func(in *pb.Instance) { in.Spec.OnDisconnect = onDisconnectStop }, false},
		"it was asked to stop":          {func(in *pb.Instance) { in.DesiredRunning = false }, false},
		"it runs and is tied to the lease": {func(in *pb.Instance) {
			in.Spec.OnDisconnect = onDisconnectStop
			in.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING
		}, true},
		"it leaves and runs": {func(in *pb.Instance) { in.Leaving = true; in.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING }, true},
		"it has left":        {func(in *pb.Instance) { in.Status.State = pb.InstanceState_INSTANCE_STATE_PENDING }, false},
	} {
		in := &pb.Instance{
			Id: "w-1", Spec: &pb.WorkloadSpec{}, DesiredRunning: true,
			Placement: &pb.Placement{NodeId: "n1", NodeEpoch: 1, Generation: 1},
			Status:    &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_LOST, Generation: 1},
		}
		c.edit(in)
		if got := mayCall(in); got != c.want {
			t.Errorf("%s: may call %t, want %t", name, got, c.want)
		}
	}
}
