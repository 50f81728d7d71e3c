package control

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxLogSources bounds the streams from agents that one FollowLogs opens.
const maxLogSources = 1024

// FollowLogs implements pb.ControlPlaneServiceServer. It is served by any peer,
// straight from the agents; the registry never holds output.
func (h *handlers) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	ctx := stream.Context()
	view, err := h.settle(ctx, func(view fsm.View) prospect {
		if _, refusal := resolveLogs(view, req.GetTargets()); refusal != nil {
			return never
		}
		return ready
	})
	if err != nil {
		return err
	}
	targets, err := resolveLogs(view, req.GetTargets())
	if err != nil {
		return err
	}
	send := func(e *pb.LogEntry) error { return stream.Send(&pb.FollowLogsResponse{Entry: e}) }
	if req.GetFollow() {
		return h.followLogs(ctx, targets, req, send)
	}
	sources, err := targets.sources(view, nil)
	if err != nil {
		return err
	}
	return h.printLogs(ctx, view, sources, req, send)
}

// logTargets is whose output is asked for: instances by id, and workloads by
// name with whatever instances they will have.
type logTargets struct {
	ids, names map[string]bool
}

func resolveLogs(view fsm.View, targets []string) (logTargets, error) {
	t := logTargets{ids: map[string]bool{}, names: map[string]bool{}}
	for _, target := range targets {
		found, refusal := view.Resolve(target)
		if refusal != nil {
			return logTargets{}, apierror.FromProto(refusal)
		}
		if found[0].GetName() == target && found[0].GetId() != target {
			t.names[target] = true
		} else {
			t.ids[found[0].GetId()] = true
		}
	}
	return t, nil
}

// logSource is the output of one instance on one node. The agent keeps it over
// restarts and generations.
type logSource struct{ instance, node string }

// sources returns where the output of the targets is now, in the order of the
// instances' ids, and adds to ws what would change that.
func (t logTargets) sources(view fsm.View, ws memdb.WatchSet) ([]logSource, error) {
	found := map[logSource]bool{}
	add := func(inst *pb.Instance) {
		if node := inst.GetPlacement().GetNodeId(); node != "" {
			found[logSource{instance: inst.GetId(), node: node}] = true
		}
	}
	for name := range t.names {
		for _, inst := range view.InstancesByName(ws, name) {
			add(inst)
		}
	}
	for id := range t.ids {
		// The workload's list is watched for the instance, also for its return.
		view.InstancesByName(ws, workloadOf(id))
		if inst, ok := view.Instance(id); ok {
			add(inst)
		}
	}
	if len(found) > maxLogSources {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
			"the targets have %d instances, and the output of at most %d can be read at once", len(found), maxLogSources).
			Next("name single instances")
	}
	sources := make([]logSource, 0, len(found))
	for s := range found {
		sources = append(sources, s)
	}
	slices.SortFunc(sources, func(a, b logSource) int {
		return cmp.Or(cmp.Compare(a.instance, b.instance), cmp.Compare(a.node, b.node))
	})
	return sources, nil
}

// gone reports whether nothing of the targets is left and nothing can come.
func (t logTargets) gone(view fsm.View) bool {
	if len(t.names) > 0 {
		return false
	}
	for id := range t.ids {
		if _, ok := view.Instance(id); ok {
			return false
		}
	}
	return true
}

// readLogs hands the output of a source to take until the agent ends the stream
// or take fails. opts says which lines; its targets are not looked at.
func (h *handlers) readLogs(ctx context.Context, view fsm.View, s logSource, opts *pb.FollowLogsRequest, take func(*pb.LogEntry) error) error {
	agent, _, err := h.agentOf(view, s.node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := agent.FollowLogs(ctx, &pb.FollowLogsRequest{
		Targets: []string{s.instance}, Follow: opts.GetFollow(), Tail: opts.GetTail(), Since: opts.GetSince(),
	})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := take(resp.GetEntry()); err != nil {
			return err
		}
	}
}

// unreadable is the line that stands for output that cannot be had.
func unreadable(s logSource, err error) *pb.LogEntry {
	return &pb.LogEntry{
		Time:       timestamppb.New(time.Now()),
		InstanceId: s.instance,
		NodeId:     s.node,
		Stream:     pb.LogStream_LOG_STREAM_SYSTEM,
		Level:      pb.LogLevel_LOG_LEVEL_WARN,
		Message:    "output on node " + s.node + " cannot be read: " + apierror.From(err).Error(),
	}
}

// holdsNothing reports whether an agent said that it has no output of the
// instance: it has not begun, or it was removed.
func holdsNothing(err error) bool {
	return apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND
}
