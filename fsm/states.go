package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// The restart policies a RestartPolicy may name.
const (
	PolicyNever     = "never"
	PolicyAlways    = "always"
	PolicyOnFailure = "on-failure"
)

// Policy returns the restart policy of a spec: PolicyNever, PolicyAlways or, by
// default, PolicyOnFailure.
func Policy(spec *pb.WorkloadSpec) string {
	switch p := spec.GetRestart().GetPolicy(); p {
	case PolicyNever, PolicyAlways:
		return p
	default:
		return PolicyOnFailure
	}
}

// Final reports whether an agent does nothing more about an instance that it
// reported in state s: COMPLETED, STOPPED or FAILED. LOST is not among them
// because the restart policy decides there; Ended looks at the whole record.
func Final(s pb.InstanceState) bool {
	switch s {
	case pb.InstanceState_INSTANCE_STATE_COMPLETED,
		pb.InstanceState_INSTANCE_STATE_STOPPED,
		pb.InstanceState_INSTANCE_STATE_FAILED:
		return true
	default:
		return false
	}
}

// Ended reports whether an instance does not run and will not run again unless
// a user restarts it. A STOPPED instance that is desired to run, and a COMPLETED
// one under policy "always", are between two starts and have not ended.
func Ended(in *pb.Instance) bool {
	switch in.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_FAILED:
		return true
	case pb.InstanceState_INSTANCE_STATE_STOPPED:
		return !in.GetDesiredRunning()
	case pb.InstanceState_INSTANCE_STATE_COMPLETED:
		return !in.GetDesiredRunning() || Policy(in.GetSpec()) != PolicyAlways
	case pb.InstanceState_INSTANCE_STATE_LOST:
		return !in.GetDesiredRunning() || Policy(in.GetSpec()) == PolicyNever
	default:
		return false
	}
}

// Placed reports whether an instance belongs to the node its placement names.
// It is false while the instance is PENDING and once it is LOST.
func Placed(in *pb.Instance) bool {
	if in.GetPlacement().GetNodeId() == "" {
		return false
	}
	switch in.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_PENDING, pb.InstanceState_INSTANCE_STATE_LOST:
		return false
	default:
		return true
	}
}

// Occupies reports whether an instance takes room on its node: it is placed
// there and has not ended.
func Occupies(in *pb.Instance) bool { return Placed(in) && !Ended(in) }

// Unplaced reports whether the scheduler must find a node for an instance that
// has none: it is desired to run, and PENDING or LOST with a restart policy
// other than "never".
func Unplaced(in *pb.Instance) bool {
	if !in.GetDesiredRunning() {
		return false
	}
	switch in.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_PENDING:
		return true
	case pb.InstanceState_INSTANCE_STATE_LOST:
		return Policy(in.GetSpec()) != PolicyNever
	default:
		return false
	}
}

// Leaving reports whether an instance is to be moved because its node, given as
// node, drains, whether or not it was asked to leave already. An instance with
// policy "never" stays until it ends.
func Leaving(in *pb.Instance, node *pb.Node) bool {
	return node.GetDraining() && Occupies(in) && in.GetDesiredRunning() &&
		in.GetPlacement().GetNodeId() == node.GetId() && Policy(in.GetSpec()) != PolicyNever
}

// Ready reports whether a node's lease lives.
func Ready(n *pb.Node) bool { return n.GetState() == pb.NodeState_NODE_STATE_READY }

// Schedulable reports whether a node takes new placements.
func Schedulable(n *pb.Node) bool { return Ready(n) && !n.GetDraining() }

// ProviderPlaced reports whether a replica of a provider belongs to a node. Once
// placed it stays with its node while it is stopped. While the node is lost it
// stays if its data may be there; what keeps no state on its node (KeepsState) and
// is not pinned to it is unplaced then, and so is what gets a pin to another node.
func ProviderPlaced(p *pb.Provider) bool { return p.GetPlacement().GetNodeId() != "" }

// ProviderUnplaced reports whether the scheduler must find a node for a replica of
// a provider.
func ProviderUnplaced(p *pb.Provider) bool { return p.GetDesiredRunning() && !ProviderPlaced(p) }

// reportable reports whether an agent may report s for an instance; the other
// states belong to the control plane.
func reportable(s pb.InstanceState) bool {
	switch s {
	case pb.InstanceState_INSTANCE_STATE_PREPARING,
		pb.InstanceState_INSTANCE_STATE_STARTING,
		pb.InstanceState_INSTANCE_STATE_RUNNING,
		pb.InstanceState_INSTANCE_STATE_STOPPING,
		pb.InstanceState_INSTANCE_STATE_CRASHED:
		return true
	default:
		return Final(s)
	}
}

// rank orders the states of one attempt. It is the state's number, but for
// CRASHED: an instance that waits for its next start can still be stopped, so
// CRASHED comes before every final state.
func rank(s pb.InstanceState) int32 {
	if s == pb.InstanceState_INSTANCE_STATE_CRASHED {
		return int32(pb.InstanceState_INSTANCE_STATE_STOPPING) + 1
	}
	return int32(s)
}

// supersedes reports whether a report is not older than what is known of the
// same generation.
func supersedes(report, known *pb.InstanceStatus) bool {
	if report.GetAttempt() != known.GetAttempt() {
		return report.GetAttempt() > known.GetAttempt()
	}
	return rank(report.GetState()) >= rank(known.GetState())
}

// providerSupersedes reports whether an agent's report of state next is
// acceptable over known, both of one generation. A driver that fails is opened
// again, so STARTING, RUNNING and FAILED follow each other freely; a drain is
// never undone and STOPPED is final, because each start has its own generation.
func providerSupersedes(next, known pb.ProviderState) bool {
	switch next {
	case pb.ProviderState_PROVIDER_STATE_STARTING,
		pb.ProviderState_PROVIDER_STATE_RUNNING,
		pb.ProviderState_PROVIDER_STATE_DRAINING,
		pb.ProviderState_PROVIDER_STATE_STOPPED,
		pb.ProviderState_PROVIDER_STATE_FAILED:
	default:
		return false
	}
	switch known {
	case pb.ProviderState_PROVIDER_STATE_STOPPED, pb.ProviderState_PROVIDER_STATE_LOST:
		return next == known
	case pb.ProviderState_PROVIDER_STATE_DRAINING:
		return next >= known
	default:
		return true
	}
}
