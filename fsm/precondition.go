package fsm

import (
	"strconv"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// unmet refuses the command when what it expects of a record is not so.
func (t *tx) unmet(p *pb.Precondition) *refusal {
	what, id, found := t.expected(p)
	want := p.GetModifiedIndex()
	switch {
	case what == "":
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the precondition names no record")
	case what == workloadRecord && want != 0:
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "a workload has no index that could be expected").
			with(what, id)
	case found == want:
		return nil
	case want == 0:
		return conflict(what, id, found).
			next("%s %s exists; change it, or choose another name", what, id)
	case found == 0:
		return conflict(what, id, found).
			with("expected_index", strconv.FormatUint(want, 10)).
			next("%s %s is gone; look at the present state, then decide", what, id)
	default:
		return conflict(what, id, found).
			with("expected_index", strconv.FormatUint(want, 10)).
			next("%s %s was changed meanwhile; read it again, then decide", what, id)
	}
}

func conflict(what, id string, found uint64) *refusal {
	r := refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the precondition does not hold: %s %s is at index %d", what, id, found).
		with(what, id).
		with("found_index", strconv.FormatUint(found, 10))
	if found == 0 {
		r.err.Message = "the precondition does not hold: there is no " + what + " " + id
	}
	return r.with("precondition", "failed")
}

const workloadRecord = "workload"

// expected returns what a precondition is about, and the index of the record's
// last change, 0 when there is none.
func (t *tx) expected(p *pb.Precondition) (what, id string, found uint64) {
	switch r := p.GetRecord().(type) {
	case *pb.Precondition_InstanceId:
		in, _ := t.instance(r.InstanceId)
		return "instance", r.InstanceId, in.GetModifiedIndex()
	case *pb.Precondition_Workload:
		in, _ := first[*pb.Instance](t.txn, tableInstances, indexName, r.Workload)
		return workloadRecord, r.Workload, in.GetModifiedIndex()
	case *pb.Precondition_ProviderId:
		p, _ := t.provider(r.ProviderId)
		return "provider", r.ProviderId, p.GetModifiedIndex()
	case *pb.Precondition_NodeId:
		n, _ := t.node(r.NodeId)
		return "node", r.NodeId, n.GetModifiedIndex()
	case *pb.Precondition_Assignment:
		key := r.Assignment
		a, _ := t.assignment(key.GetInstanceId(), key.GetProviderId())
		return "assignment", key.GetInstanceId() + "/" + key.GetProviderId(), a.GetModifiedIndex()
	default:
		return "", "", 0
	}
}
