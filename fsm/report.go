package fsm

import (
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// reportStatus records what an agent observed. The batch is refused as a whole
// when it is not of the node's live epoch. Each entry is applied only if it is
// about the generation that is placed there and is not older than what is
// known; others are late or repeated and are skipped. The answer names those
// that had an effect.
func (t *tx) reportStatus(c *pb.ReportStatusRequest) ([]string, *refusal) {
	node, r := t.liveNode(c.GetNodeId(), c.GetEpoch())
	if r != nil {
		return nil, r
	}
	var done []string
	for _, r := range c.GetInstances() {
		if t.reportInstance(node, r) {
			done = append(done, r.GetInstanceId())
		}
	}
	for _, r := range c.GetProviders() {
		if t.reportProvider(node, r) {
			done = append(done, ReplicaName(r.GetProviderId(), r.GetReplica()))
		}
	}
	t.recordDenials(node, c.GetDenials())
	return done, nil
}

// liveNode returns the node of an agent's message, which must be of the node's live
// epoch.
func (t *tx) liveNode(nodeID string, epoch uint64) (*pb.Node, *refusal) {
	node, ok := t.node(nodeID)
	if !ok {
		return nil, nodeNotFound(nodeID)
	}
	if node.GetEpoch() != epoch || !Ready(node) {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "epoch %d of node %q is not alive", epoch, nodeID).
			with("node", nodeID).
			with("epoch", strconv.FormatUint(node.GetEpoch(), 10)).
			with("state", node.GetState().String()).
			next("register the node again")
	}
	return node, nil
}

// held reports whether a node holds a placement in its present epoch at the
// generation that a report is about. What was LOST, or ended under an agent
// process before, was placed in an epoch that is dead.
func held(node *pb.Node, p *pb.Placement, generation uint64) bool {
	return p.GetNodeId() == node.GetId() && p.GetNodeEpoch() == node.GetEpoch() &&
		p.GetGeneration() == generation
}

func (t *tx) reportInstance(node *pb.Node, r *pb.InstanceReport) bool {
	report := r.GetStatus()
	in, ok := t.instance(r.GetInstanceId())
	if !ok || !held(node, in.GetPlacement(), report.GetGeneration()) {
		return false
	}
	known := in.GetStatus()
	if !reportable(report.GetState()) || !supersedes(report, known) {
		return false
	}
	if Final(report.GetState()) && r.GetRestartEpoch() < in.GetRestartEpoch() {
		// The agent has yet to see that a new start was asked for. Were this taken for
		// the end, the instance could be placed elsewhere while the agent starts it.
		return false
	}
	next := observed(known, report)
	left := in.GetLeaving() && in.GetDesiredRunning() && r.GetLeft() &&
		next.GetState() == pb.InstanceState_INSTANCE_STATE_STOPPED
	if !left && sameStatus(known, next) {
		return false
	}
	out := shallow(in)
	out.Status = next
	if left {
		t.unplace(in, out)
	} else {
		out.Leaving = in.GetLeaving() && !Ended(out)
		t.putInstance(in, out)
	}
	t.reportEvents(out, known)
	return true
}

// unplace makes an instance that has left its node wait for its next placement.
// The node stays known as where it comes from; the epoch does not, so that no
// late report of the generation that has ended counts any more.
func (t *tx) unplace(old, out *pb.Instance) {
	pending := shallow(out)
	pending.Leaving = false
	pending.Placement = &pb.Placement{
		NodeId: out.GetPlacement().GetNodeId(), Generation: out.GetPlacement().GetGeneration(),
	}
	pending.Status = pendingAgain(out.GetStatus())
	t.putInstance(old, pending)
}

// observed is the status after a report. Usage is never stored; what counts or
// was once known is never taken back.
func observed(known, report *pb.InstanceStatus) *pb.InstanceStatus {
	return &pb.InstanceStatus{
		State:       report.GetState(),
		Generation:  report.GetGeneration(),
		Attempt:     report.GetAttempt(),
		Reason:      report.GetReason(),
		Message:     line(report.GetMessage()),
		ExitCode:    report.GetExitCode(),
		Retries:     report.GetRetries(),
		CrashCount:  max(known.GetCrashCount(), report.GetCrashCount()),
		NextRetryAt: pick(report.GetNextRetryAt(), nil),
		StartedAt:   pick(report.GetStartedAt(), known.GetStartedAt()),
		FinishedAt:  pick(report.GetFinishedAt(), known.GetFinishedAt()),
		Runtime:     report.GetRuntime(),
		Isolation:   report.GetIsolation(),
	}
}

// pick returns reported unless it is missing or no valid time.
func pick(reported, otherwise *timestamppb.Timestamp) *timestamppb.Timestamp {
	if reported == nil || !reported.IsValid() {
		return otherwise
	}
	return reported
}

// sameStatus reports whether two statuses made by this package say the same.
func sameStatus(a, b *pb.InstanceStatus) bool {
	return a.GetState() == b.GetState() && a.GetGeneration() == b.GetGeneration() &&
		a.GetAttempt() == b.GetAttempt() && a.GetReason() == b.GetReason() &&
		a.GetMessage() == b.GetMessage() && a.GetExitCode() == b.GetExitCode() &&
		a.GetRuntime() == b.GetRuntime() && a.GetIsolation() == b.GetIsolation() &&
		a.GetCrashCount() == b.GetCrashCount() && a.GetRetries() == b.GetRetries() && sameTime(a.GetNextRetryAt(), b.GetNextRetryAt()) &&
		sameTime(a.GetStartedAt(), b.GetStartedAt()) && sameTime(a.GetFinishedAt(), b.GetFinishedAt())
}

func sameTime(a, b *timestamppb.Timestamp) bool {
	return (a == nil) == (b == nil) && !before(a, b) && !before(b, a)
}

// reportEvents turns the difference that a report made into facts. An agent that
// was cut off may report only how things stand by now; crashes it counted in
// the meantime are told as such.
func (t *tx) reportEvents(in *pb.Instance, known *pb.InstanceStatus) {
	now := in.GetStatus()
	crashes := now.GetCrashCount() - known.GetCrashCount()
	fresh := now.GetState() != known.GetState() || now.GetAttempt() != known.GetAttempt()
	message := now.GetMessage()
	kind := pb.EventKind_EVENT_KIND_UNSPECIFIED
	switch now.GetState() {
	case pb.InstanceState_INSTANCE_STATE_RUNNING:
		kind = pb.EventKind_EVENT_KIND_INSTANCE_STARTED
		if now.GetAttempt() > 1 {
			kind = pb.EventKind_EVENT_KIND_INSTANCE_RESTARTED
		}
	case pb.InstanceState_INSTANCE_STATE_CRASHED:
		kind = pb.EventKind_EVENT_KIND_INSTANCE_CRASHED
		if crashes > 0 {
			crashes-- // this one is told below
		}
	case pb.InstanceState_INSTANCE_STATE_FAILED:
		kind = pb.EventKind_EVENT_KIND_INSTANCE_FAILED
	case pb.InstanceState_INSTANCE_STATE_COMPLETED:
		kind = pb.EventKind_EVENT_KIND_INSTANCE_COMPLETED
	case pb.InstanceState_INSTANCE_STATE_STOPPED:
		kind = pb.EventKind_EVENT_KIND_INSTANCE_STOPPED
	default:
	}
	if crashes > 0 && kind != pb.EventKind_EVENT_KIND_INSTANCE_FAILED {
		t.instanceEvent(pb.EventKind_EVENT_KIND_INSTANCE_CRASHED, in,
			"crashed "+times(crashes)+" since the report before")
	}
	if fresh && kind != pb.EventKind_EVENT_KIND_UNSPECIFIED {
		if message == "" && now.GetReason() != pb.ExitReason_EXIT_REASON_UNSPECIFIED {
			message = now.GetReason().String()
		}
		t.instanceEvent(kind, in, message)
	}
}

func (t *tx) reportProvider(node *pb.Node, r *pb.ProviderReport) bool {
	report := r.GetStatus()
	p, ok := t.replica(r.GetProviderId(), r.GetReplica())
	if !ok || !held(node, p.GetPlacement(), report.GetGeneration()) {
		return false
	}
	known, message := p.GetStatus(), line(report.GetMessage())
	if !providerSupersedes(report.GetState(), known.GetState()) {
		return false
	}
	out := t.withStatus(p, report.GetState(), message)
	out.Status.CallsInFlight = report.GetCallsInFlight()
	out.Status.SpecVersion = min(report.GetSpecVersion(), p.GetSpecVersion())
	if proto.Equal(out.GetStatus(), known) {
		return false
	}
	t.putProvider(out)
	if report.GetState() == known.GetState() {
		return true
	}
	switch report.GetState() {
	case pb.ProviderState_PROVIDER_STATE_RUNNING:
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_STARTED, out, message)
	case pb.ProviderState_PROVIDER_STATE_STOPPED:
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_STOPPED, out, message)
	case pb.ProviderState_PROVIDER_STATE_FAILED:
		t.providerEvent(pb.EventKind_EVENT_KIND_PROVIDER_FAILED, out, message)
	default:
	}
	return true
}
