package fsm

import (
	"slices"
	"strconv"
	"strings"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// createInstances accepts a workload: one PENDING instance a replica, and the
// capability assignments its spec asks for, subscribed to what its triggers name. A name is refused while an instance
// of that name is desired to run and has not ended; ended ones stay beside the
// new ones until they are removed.
func (t *tx) createInstances(c *pb.CreateInstancesCommand) ([]string, *refusal) {
	if r := t.checkWorkload(c); r != nil {
		return nil, r
	}
	grants, r := t.mergeGrants(c.GetSpec())
	if r != nil {
		return nil, r
	}
	subscriptions, r := t.triggered(c, grants)
	if r != nil {
		return nil, r
	}
	spec := shallow(c.GetSpec())
	spec.Replicas = 1
	for _, id := range c.GetInstanceIds() {
		in := &pb.Instance{
			Id:             id,
			Name:           spec.GetName(),
			Spec:           spec,
			DesiredRunning: true,
			Status:         &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_PENDING},
			CorrelationId:  t.cmd.GetCorrelationId(),
			CreatedAt:      t.now,
			CreatedIndex:   t.index,
		}
		t.putInstance(nil, in)
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_REQUESTED, in, "")
		for _, g := range grants {
			t.putAssignment(&pb.CapabilityAssignment{
				InstanceId:    id,
				ProviderId:    g.GetProvider(),
				Permissions:   g.GetPermissions(),
				Bucket:        g.GetBucket(),
				CorrelationId: t.cmd.GetCorrelationId(),
				Subscriptions: subscriptions[g.GetProvider()],
			})
		}
	}
	return c.GetInstanceIds(), nil
}

func (t *tx) checkWorkload(c *pb.CreateInstancesCommand) *refusal {
	spec, ids := c.GetSpec(), c.GetInstanceIds()
	if r := checkID("the workload's name", spec.GetName()); r != nil {
		return r
	}
	if want := max(1, int(spec.GetReplicas())); len(ids) != want {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"%d replicas need as many instance ids, not %d", want, len(ids))
	}
	if _, ok := first[*pb.Module](t.txn, tableModules, indexID, spec.GetModule()); !ok {
		return refuse(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "no module has the digest %q", spec.GetModule()).
			with("module", spec.GetModule()).
			next("wasmatrix module push FILE.wasm")
	}
	for _, in := range list[*pb.Instance](t.txn, nil, tableInstances, indexName, spec.GetName()) {
		if in.GetDesiredRunning() && !Ended(in) {
			return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the name %q is in use", spec.GetName()).
				with("name", spec.GetName()).
				with("instance", in.GetId()).
				with("state", in.GetStatus().GetState().String()).
				next("wasmatrix instance rm %s --force, or choose another name with --name", spec.GetName())
		}
	}
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		if r := checkID("the instance's id", id); r != nil {
			return r
		}
		if _, taken := t.instance(id); taken || seen[id] {
			return refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the instance id %q is taken", id).
				with("instance", id).
				next("propose the workload again with another id")
		}
		seen[id] = true
	}
	return nil
}

// stopInstances asks instances to stop. One that no agent runs is STOPPED at
// once; one that has ended keeps its final state, which is what happened.
func (t *tx) stopInstances(c *pb.StopInstancesCommand) ([]string, *refusal) {
	ins, r := t.instances(c.GetInstanceIds())
	if r != nil {
		return nil, r
	}
	for _, in := range ins {
		switch {
		case !in.GetDesiredRunning():
		case Unplaced(in):
			off := shallow(in)
			off.DesiredRunning = false
			t.stopOver(in, off, "")
		default:
			off := shallow(in)
			off.DesiredRunning = false
			t.putInstance(in, off)
		}
	}
	return idsOf(ins), nil
}

// restartInstances asks instances to start again. One that runs is started
// again by its agent, which sees restart_epoch grow; one that has ended or is
// LOST is PENDING again and keeps its generation, so that the next placement is
// one higher.
func (t *tx) restartInstances(c *pb.RestartInstancesCommand) ([]string, *refusal) {
	ins, r := t.instances(c.GetInstanceIds())
	if r != nil {
		return nil, r
	}
	for _, in := range ins {
		again := shallow(in)
		again.DesiredRunning = true
		again.RestartEpoch++
		if Ended(in) || !Placed(in) {
			again.Leaving = false
			if g := in.GetPlacement().GetGeneration(); g > 0 {
				again.Placement = &pb.Placement{Generation: g}
			}
			again.Status = pendingAgain(in.GetStatus())
			again.Status.Retries = 0 // whoever asks for a start gives it all its tries
		}
		t.putInstance(in, again)
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_REQUESTED, again, "restart requested")
	}
	return idsOf(ins), nil
}

// pendingAgain is the status of an instance that waits for its next placement.
// The facts about earlier runs stay.
func pendingAgain(known *pb.InstanceStatus) *pb.InstanceStatus {
	return &pb.InstanceStatus{
		State:      pb.InstanceState_INSTANCE_STATE_PENDING,
		Generation: known.GetGeneration(),
		Retries:    known.GetRetries(),
		CrashCount: known.GetCrashCount(),
		StartedAt:  known.GetStartedAt(),
		FinishedAt: known.GetFinishedAt(),
	}
}

// removeInstances forgets instances and their assignments. One that still runs
// needs force; its agent ends it because it leaves the node's set.
func (t *tx) removeInstances(c *pb.RemoveInstancesCommand) ([]string, *refusal) {
	ins, r := t.instances(c.GetInstanceIds())
	if r != nil {
		return nil, r
	}
	var live []string
	for _, in := range ins {
		if !Ended(in) {
			live = append(live, in.GetId())
		}
	}
	if len(live) > 0 && !c.GetForce() {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "%d of the instances have not ended", len(live)).
			with("instances", named(live)).
			next("wasmatrix instance stop %s, or remove with --force", live[0])
	}
	for _, in := range ins {
		t.deleteInstance(in)
		for _, a := range assignmentsOf(t.txn, nil, in.GetId()) {
			t.deleteAssignment(a)
		}
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_REMOVED, in, in.GetStatus().GetState().String())
	}
	return idsOf(ins), nil
}

// stopped records that an instance which was asked to stop is gone.
func (t *tx) stopped(in *pb.Instance, message string) { t.stopOver(in, shallow(in), message) }

// stopOver writes off, a copy of old, as STOPPED.
func (t *tx) stopOver(old, off *pb.Instance, message string) {
	off.Leaving = false
	off.Status = shallow(old.GetStatus())
	off.Status.State = pb.InstanceState_INSTANCE_STATE_STOPPED
	off.Status.Reason = pb.ExitReason_EXIT_REASON_STOPPED
	off.Status.Message = message
	off.Status.NextRetryAt = nil
	if Placed(old) {
		off.Status.FinishedAt = t.now
	}
	t.putInstance(old, off)
	t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_STOPPED, off, message)
}

// lost records that the agent process which ran an instance is gone. The
// placement goes on naming the node, as a fact; Placed is false from here on.
func (t *tx) lost(in *pb.Instance, message string) {
	gone := shallow(in)
	gone.Leaving = false
	gone.Status = shallow(in.GetStatus())
	gone.Status.State = pb.InstanceState_INSTANCE_STATE_LOST
	gone.Status.Reason = pb.ExitReason_EXIT_REASON_NODE_LOST
	gone.Status.Message = message
	gone.Status.NextRetryAt = nil
	gone.Status.FinishedAt = t.now
	t.putInstance(in, gone)
	t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_LOST, gone, message)
}

// assign returns a copy of in that is placed on node in the next generation.
// The facts about earlier runs stay.
func (t *tx) assign(in *pb.Instance, node *pb.Node) *pb.Instance {
	generation := in.GetPlacement().GetGeneration() + 1
	out := shallow(in)
	out.Leaving = false
	out.Placement = &pb.Placement{NodeId: node.GetId(), NodeEpoch: node.GetEpoch(), Generation: generation}
	out.Status = &pb.InstanceStatus{
		State:      pb.InstanceState_INSTANCE_STATE_ASSIGNED,
		Generation: generation,
		Retries:    in.GetStatus().GetRetries(),
		CrashCount: in.GetStatus().GetCrashCount(),
		StartedAt:  in.GetStatus().GetStartedAt(),
		FinishedAt: in.GetStatus().GetFinishedAt(),
	}
	return out
}

func idsOf(ins []*pb.Instance) []string {
	ids := make([]string, 0, len(ins))
	for _, in := range ins {
		ids = append(ids, in.GetId())
	}
	return ids
}

// times says how often something happened, for a message.
func times(n uint32) string {
	if n == 1 {
		return "once"
	}
	return strconv.FormatUint(uint64(n), 10) + " times"
}

func sortByID(ins []*pb.Instance) {
	slices.SortFunc(ins, func(a, b *pb.Instance) int { return strings.Compare(a.GetId(), b.GetId()) })
}
