package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

const (
	defaultPageSize = 500
	// shownCandidates bounds how many ids an ambiguity error names.
	shownCandidates = 8
)

// view returns the instance as this node knows it. Parts that never change are shared.
func (s *supervisor) view() *pb.Instance {
	s.mu.Lock()
	inst, st, guest := s.inst, s.status, s.guest
	s.mu.Unlock()
	if guest != nil {
		st = cloneStatus(st)
		u := guest.Usage()
		st.Usage = &pb.ResourceUsage{
			MemoryBytes: u.MemoryBytes, Invocations: u.Invocations,
			CapabilityCalls: u.CapabilityCalls, GuestTime: durationpb.New(u.GuestTime),
		}
	}
	return withStatus(inst, st)
}

// withStatus returns a copy of inst that carries st and shares the rest.
func withStatus(inst *pb.Instance, st *pb.InstanceStatus) *pb.Instance {
	return &pb.Instance{
		Id: inst.GetId(), Name: inst.GetName(), Spec: inst.GetSpec(),
		DesiredRunning: inst.GetDesiredRunning(), RestartEpoch: inst.GetRestartEpoch(), Leaving: inst.GetLeaving(),
		Placement: inst.GetPlacement(), Status: st, CorrelationId: inst.GetCorrelationId(),
		CreatedAt: inst.GetCreatedAt(), CreatedIndex: inst.GetCreatedIndex(), ModifiedIndex: inst.GetModifiedIndex(),
	}
}

// resolve finds the instances that target names: an id, else all of a name, else
// the one whose id begins with it.
func (w *worker) resolve(target string) ([]*supervisor, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.supervisors[target]; ok {
		return []*supervisor{s}, nil
	}
	var named, prefixed []*supervisor
	for id, s := range w.supervisors {
		if s.log.name == target {
			named = append(named, s)
		}
		if strings.HasPrefix(id, target) {
			prefixed = append(prefixed, s)
		}
	}
	byID := func(a, b *supervisor) int { return cmp.Compare(a.id, b.id) }
	slices.SortFunc(named, byID)
	slices.SortFunc(prefixed, byID)
	switch {
	case len(named) > 0:
		return named, nil
	case len(prefixed) > 1:
		return nil, errAmbiguous(target, w.node, prefixed)
	case len(prefixed) == 1:
		return prefixed, nil
	}
	return nil, errNoInstance(target, w.node)
}

// one is resolve for exactly one instance.
func (w *worker) one(target string) (*supervisor, error) {
	found, err := w.resolve(target)
	if err != nil {
		return nil, err
	}
	if len(found) > 1 {
		return nil, errAmbiguous(target, w.node, found)
	}
	return found[0], nil
}

func errAmbiguous(target, node string, found []*supervisor) error {
	var ids []string
	for _, s := range found[:min(len(found), shownCandidates)] {
		ids = append(ids, s.id)
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%q names %d instances on node %s", target, len(found), node).
		With("candidates", strings.Join(ids, " ")).
		Next("name one of them by its id")
}

// status returns what was observed of an instance, nil when it is not known.
func (w *worker) status(id string) *pb.InstanceStatus {
	w.mu.Lock()
	s := w.supervisors[id]
	w.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.have.restartEpoch != s.inst.GetRestartEpoch() {
		return nil // of a run that is no longer wanted
	}
	return s.status
}

// resolveIDs is resolve with the ids alone.
func (w *worker) resolveIDs(target string) ([]string, error) {
	found, err := w.resolve(target)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(found))
	for _, s := range found {
		ids = append(ids, s.id)
	}
	slices.Sort(ids)
	return ids, nil
}

// list returns one page of the node's instances in the order of their ids.
func (w *worker) list(req *pb.ListInstancesRequest) *pb.ListInstancesResponse {
	size := int(req.GetPageSize())
	if size == 0 {
		size = defaultPageSize
	}
	resp := &pb.ListInstancesResponse{}
	if req.GetNodeId() != "" && req.GetNodeId() != w.node {
		return resp
	}
	for _, s := range w.all() {
		if s.id <= req.GetPageToken() || req.GetName() != "" && req.GetName() != s.log.name {
			continue
		}
		inst := s.view()
		if len(req.GetStates()) > 0 && !slices.Contains(req.GetStates(), inst.GetStatus().GetState()) {
			continue
		}
		if len(resp.Instances) == size {
			resp.NextPageToken = resp.Instances[size-1].GetId()
			break
		}
		resp.Instances = append(resp.Instances, inst)
	}
	return resp
}

// states counts the instances by state, for the metrics.
func (w *worker) states() map[pb.InstanceState]int {
	counts := map[pb.InstanceState]int{}
	for _, s := range w.all() {
		s.mu.Lock()
		counts[s.status.GetState()]++
		s.mu.Unlock()
	}
	return counts
}

// invoke calls a handler of an instance of this node; its errors are *apierror.Error.
func (w *worker) invoke(ctx context.Context, id string, handler runtime.Handler, payload []byte) ([]byte, error) {
	w.mu.Lock()
	s, ok := w.supervisors[id]
	w.mu.Unlock()
	if !ok {
		return nil, errNoInstance(id, w.node)
	}
	ctx, correlationID := correlation.Ensure(ctx)
	s.mu.Lock()
	guest, a, st := s.guest, s.attempt, s.status
	s.mu.Unlock()
	if guest == nil || a == nil {
		return nil, w.errNotRunning(id, st)
	}
	leave := a.calls.enter(correlationID)
	defer leave()
	began := time.Now()
	answer, err := guest.Invoke(ctx, handler, payload)
	if err != nil {
		err = w.invokeError(ctx, id, s, handler, err)
	}
	w.metrics.invoked(handler, err, time.Since(began))
	return answer, err
}

func (w *worker) errNotRunning(id string, st *pb.InstanceStatus) *apierror.Error {
	state := stateLabel(st.GetState())
	e := apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "instance %s is not running: it is %s", id, state).
		With("instance", id).With("node", w.node).With("state", st.GetState().String())
	if st.GetMessage() != "" {
		e = e.With("status", st.GetMessage())
	}
	if t := st.GetNextRetryAt(); t != nil {
		e = e.With("next_retry_at", t.AsTime().Format(time.RFC3339Nano))
	}
	return e.Next("wasmatrix instance get %s", id)
}

// invokeError maps what an executor says to the shape of the API. A guest that
// crashed during the call is INTERNAL_ERROR with the detail exit_reason: the call
// may have had effects, so that no client repeats it by itself.
func (w *worker) invokeError(ctx context.Context, id string, s *supervisor, handler runtime.Handler, err error) error {
	code, next := pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, fmt.Sprintf("wasmatrix logs %s", id)
	reason := ""
	switch {
	case errors.Is(err, runtime.ErrNotRunning):
		s.mu.Lock()
		st := s.status
		s.mu.Unlock()
		if st.GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING {
			return w.errNotRunning(id, st)
		}
		code = pb.ErrorCode_ERROR_CODE_CONFLICT
	case errors.Is(err, runtime.ErrBusy):
		code, next = pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "raise limits.concurrency or replicas of the workload"
	case errors.Is(err, runtime.ErrTimeLimit):
		code, next = pb.ErrorCode_ERROR_CODE_TIMEOUT, "raise limits.timeout of the workload or the deadline of the call"
		reason = "TIME_LIMIT"
	case errors.Is(err, runtime.ErrNoHandler):
		code, next = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, fmt.Sprintf("export %s from the module", handler)
	case errors.Is(err, runtime.ErrCrashed):
		reason = "CRASHED"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(ctx.Err(), context.DeadlineExceeded):
		code = pb.ErrorCode_ERROR_CODE_TIMEOUT
	case errors.Is(err, context.Canceled):
		code = pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE
	}
	e := apierror.New(code, "calling instance %s: %s", id, oneLine(err.Error())).With("instance", id).With("node", w.node).Next("%s", next)
	if reason != "" {
		e = e.With("exit_reason", reason)
	}
	return e
}
