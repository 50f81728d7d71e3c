package fsm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// maxIDBytes bounds every id and name.
	maxIDBytes = 256
	// maxMessageBytes bounds a status or event message: the registry holds
	// facts, not output.
	maxMessageBytes = 1024
	// maxNamed bounds how many records a refusal names.
	maxNamed = 10
)

// tx is one command at work. Its put and remove methods keep the tables, the
// counts and the running hash together; transitions change records through
// nothing else.
type tx struct {
	txn   *memdb.Txn
	sum   *summary
	chain *chain
	cmd   *pb.Command
	index uint64
	now   *timestamppb.Timestamp
}

// refusal is why a command is not done.
type refusal struct{ err *pb.Error }

func refuse(code pb.ErrorCode, format string, args ...any) *refusal {
	return &refusal{err: &pb.Error{Code: code, Message: fmt.Sprintf(format, args...)}}
}

func (r *refusal) with(key, value string) *refusal {
	if r.err.Details == nil {
		r.err.Details = map[string]string{}
	}
	r.err.Details[key] = value
	return r
}

func (r *refusal) next(format string, args ...any) *refusal {
	r.err.NextStep = fmt.Sprintf(format, args...)
	return r
}

// result is the answer to the command at hand.
func (t *tx) result(ids []string, r *refusal) *pb.CommandResult {
	if r == nil {
		return &pb.CommandResult{Index: t.index, Ids: ids}
	}
	r.err.Timestamp = clone(t.now)
	r.err.CorrelationId = t.cmd.GetCorrelationId()
	return &pb.CommandResult{Index: t.index, Error: r.err}
}

// transition is the one switch from a payload to what it does.
func (t *tx) transition() *pb.CommandResult {
	switch p := t.cmd.GetPayload().(type) {
	case *pb.Command_RegisterNode:
		return t.registerNode(p.RegisterNode)
	case *pb.Command_ExpireNode:
		return t.expireNode(p.ExpireNode)
	case *pb.Command_DrainNode:
		return t.result(t.drainNode(p.DrainNode))
	case *pb.Command_PutPeer:
		return t.result(t.putPeer(p.PutPeer))
	case *pb.Command_RemovePeer:
		return t.result(t.removePeer(p.RemovePeer))
	case *pb.Command_PutModule:
		return t.result(t.putModule(p.PutModule))
	case *pb.Command_CreateInstances:
		return t.result(t.createInstances(p.CreateInstances))
	case *pb.Command_StopInstances:
		return t.result(t.stopInstances(p.StopInstances))
	case *pb.Command_RestartInstances:
		return t.result(t.restartInstances(p.RestartInstances))
	case *pb.Command_RemoveInstances:
		return t.result(t.removeInstances(p.RemoveInstances))
	case *pb.Command_Place:
		return t.result(t.place(p.Place), nil)
	case *pb.Command_ReportStatus:
		return t.result(t.reportStatus(p.ReportStatus))
	case *pb.Command_AssignCapability:
		return t.result(t.assignCapability(p.AssignCapability))
	case *pb.Command_RevokeCapability:
		return t.result(t.revokeCapability(p.RevokeCapability))
	case *pb.Command_RecordSubscription:
		return t.result(t.recordSubscription(p.RecordSubscription))
	case *pb.Command_RegisterProvider:
		return t.result(t.registerProvider(p.RegisterProvider))
	case *pb.Command_SetProviderRunning:
		return t.result(t.setProviderRunning(p.SetProviderRunning))
	case *pb.Command_UpdateProvider:
		return t.result(t.updateProvider(p.UpdateProvider))
	case *pb.Command_DeregisterProvider:
		return t.result(t.deregisterProvider(p.DeregisterProvider))
	case *pb.Command_OpenSession:
		return t.result(t.openClientSession(p.OpenSession))
	case *pb.Command_InitCluster:
		return t.result(t.initCluster(p.InitCluster))
	default:
		return t.result(nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"the command has no payload that this version knows"))
	}
}

// cause returns the correlation id for a fact about a record that was itself
// caused by the call own. What agents and the leader's duties find out is told
// under that call; what a user asks for, under the user's present call.
func (t *tx) cause(own string) string {
	switch t.cmd.GetPayload().(type) {
	case *pb.Command_RegisterNode, *pb.Command_ExpireNode, *pb.Command_Place, *pb.Command_ReportStatus:
		if own != "" {
			return own
		}
	}
	return t.cmd.GetCorrelationId()
}

func (t *tx) insert(table string, rec any) { must(t.txn.Insert(table, rec)) }

func (t *tx) delete(table string, rec any) { must(t.txn.Delete(table, rec)) }

func (t *tx) node(id string) (*pb.Node, bool) {
	return first[*pb.Node](t.txn, tableNodes, indexID, id)
}

func (t *tx) putNode(n *pb.Node) {
	n.ModifiedIndex = t.index
	t.chain.put(hashNode, n)
	t.insert(tableNodes, n)
}

func (t *tx) instance(id string) (*pb.Instance, bool) {
	return first[*pb.Instance](t.txn, tableInstances, indexID, id)
}

// putInstance writes in over old, which is nil for a new instance.
func (t *tx) putInstance(old, in *pb.Instance) {
	in.ModifiedIndex = t.index
	t.chain.putInstance(old, in)
	t.insert(tableInstances, in)
	t.moveLoad(old, in)
}

func (t *tx) deleteInstance(in *pb.Instance) {
	t.chain.remove(hashInstance, in.GetId())
	t.delete(tableInstances, in)
	t.moveLoad(in, nil)
}

// moveLoad keeps the counts of instances per node.
func (t *tx) moveLoad(old, in *pb.Instance) {
	from, to := loadNode(old), loadNode(in)
	if from == to {
		return
	}
	addLoad(t.txn, from, -1)
	addLoad(t.txn, to, 1)
}

func loadNode(in *pb.Instance) string {
	if !Occupies(in) {
		return ""
	}
	return in.GetPlacement().GetNodeId()
}

func addLoad(txn *memdb.Txn, node string, by int) {
	if node == "" {
		return
	}
	count := by
	if old, ok := first[*load](txn, tableLoads, indexID, node); ok {
		count += old.instances
	}
	must(txn.Insert(tableLoads, &load{node: node, instances: count}))
}

// provider returns the first replica of a provider; all have one id and spec.
func (t *tx) provider(id string) (*pb.Provider, bool) { return t.replica(id, 0) }

func (t *tx) replica(id string, replica uint32) (*pb.Provider, bool) {
	return first[*pb.Provider](t.txn, tableProviders, indexID, id, replicaPart(replica))
}

// replicas returns all replicas of a provider in order.
func (t *tx) replicas(id string) []*pb.Provider { return replicasOf(t.txn, id) }

func (t *tx) putProvider(p *pb.Provider) {
	p.ModifiedIndex = t.index
	t.chain.put(hashProvider, p)
	t.insert(tableProviders, p)
}

func (t *tx) deleteProvider(p *pb.Provider) {
	t.chain.remove(hashProvider, ReplicaName(p.GetId(), p.GetReplica()))
	t.delete(tableProviders, p)
}

func (t *tx) assignment(instanceID, providerID string) (*pb.CapabilityAssignment, bool) {
	return first[*pb.CapabilityAssignment](t.txn, tableAssignments, indexID, instanceID, providerID)
}

func (t *tx) putAssignment(a *pb.CapabilityAssignment) {
	a.ModifiedIndex = t.index
	t.chain.put(hashAssignment, a)
	t.insert(tableAssignments, a)
}

func (t *tx) deleteAssignment(a *pb.CapabilityAssignment) {
	t.chain.remove(hashAssignment, assignmentKey(a.GetInstanceId(), a.GetProviderId()))
	t.delete(tableAssignments, a)
}

// instances returns the named instances, each once, in the order of the
// command. All must exist.
func (t *tx) instances(ids []string) ([]*pb.Instance, *refusal) {
	if len(ids) == 0 {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the command names no instance")
	}
	seen := make(map[string]bool, len(ids))
	out := make([]*pb.Instance, 0, len(ids))
	for _, id := range ids {
		if seen[id] {
			continue
		}
		seen[id] = true
		in, ok := t.instance(id)
		if !ok {
			return nil, instanceNotFound(id)
		}
		out = append(out, in)
	}
	return out, nil
}

func instanceNotFound(target string) *refusal {
	return refuse(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance has the id or name %q", target).
		with("target", target).
		next("wasmatrix instance list")
}

func providerNotFound(id string) *refusal {
	return refuse(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", id).
		with("provider", id).
		next("wasmatrix provider list")
}

func nodeNotFound(id string) *refusal {
	return refuse(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "no node has the id %q", id).
		with("node", id).
		next("wasmatrix node list")
}

// checkID refuses an id that is empty, too long, or holds anything but visible
// ASCII. The API's own rules are narrower; this one keeps the table keys sound
// whoever proposed the command.
func checkID(what, id string) *refusal {
	if id == "" {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s is empty", what)
	}
	if len(id) > maxIDBytes {
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"%s is longer than %d bytes", what, maxIDBytes)
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
				"%s holds a character other than visible ASCII", what).with("id", strconv.Quote(id))
		}
	}
	return nil
}

// line bounds a message from elsewhere, cut between two characters.
func line(s string) string {
	if len(s) <= maxMessageBytes {
		return s
	}
	end := maxMessageBytes
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}

// named lists ids for a detail of a refusal: the first few, and how many more.
func named(ids []string) string {
	if len(ids) <= maxNamed {
		return strings.Join(ids, ", ")
	}
	return strings.Join(ids[:maxNamed], ", ") + " and " + strconv.Itoa(len(ids)-maxNamed) + " more"
}

// ordered returns the distinct strings of in, sorted, in a slice of its own.
func ordered(in []string) []string {
	out := slices.Clone(in)
	slices.Sort(out)
	return slices.Compact(out)
}

func clone[M proto.Message](m M) M {
	out, _ := proto.Clone(m).(M)
	return out
}
