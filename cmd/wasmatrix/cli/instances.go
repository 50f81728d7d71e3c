package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const pageSize = 1000

func stateOf(i *pb.Instance) string {
	return shortName(i.GetStatus().GetState().String(), "INSTANCE_STATE_")
}

// listInstances returns all pages as one answer.
func listInstances(ctx context.Context, c *client.Client, req *pb.ListInstancesRequest) (*pb.ListInstancesResponse, error) {
	out := &pb.ListInstancesResponse{}
	req.PageSize = pageSize
	for {
		page, err := c.ListInstances(ctx, req)
		if err != nil {
			return nil, err
		}
		out.Instances = append(out.Instances, page.GetInstances()...)
		out.Index = page.GetIndex()
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return out, nil
		}
	}
}

// resolve returns the instances that target names: an id, a workload's name, or
// the beginning of an id.
func resolve(ctx context.Context, c *client.Client, target string) ([]*pb.Instance, error) {
	byName, err := listInstances(ctx, c, &pb.ListInstancesRequest{Name: target})
	if err != nil {
		return nil, err
	}
	if len(byName.GetInstances()) > 0 {
		return byName.GetInstances(), nil
	}
	one, err := c.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: target})
	if err != nil {
		return nil, err
	}
	return []*pb.Instance{one.GetInstance()}, nil
}

func (a *app) instanceTable(instances []*pb.Instance) func(io.Writer) {
	return func(w io.Writer) {
		if len(instances) == 0 {
			fmt.Fprintln(w, "no instances")
			return
		}
		t := table{head: []string{"ID", "STATE", "NODE", "RUNTIME", "CRASHES", "AGE", "MESSAGE"}, paint: a.painter()}
		for _, i := range instances {
			t.row(i.GetId(), stateOf(i), orDash(i.GetPlacement().GetNodeId()), runtimeText(i.GetStatus()),
				fmt.Sprint(i.GetStatus().GetCrashCount()), a.age(i.GetCreatedAt()), oneLine(i.GetStatus().GetMessage()))
		}
		t.write(w)
	}
}

func idsOf(instances []*pb.Instance) []string {
	out := make([]string, len(instances))
	for i, inst := range instances {
		out[i] = inst.GetId()
	}
	return out
}

// over reports whether an instance will not change its state by itself.
func over(i *pb.Instance) bool {
	switch i.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_COMPLETED:
		return i.GetSpec().GetRestart().GetPolicy() != "always" || !i.GetDesiredRunning()
	case pb.InstanceState_INSTANCE_STATE_STOPPED:
		return !i.GetDesiredRunning()
	case pb.InstanceState_INSTANCE_STATE_FAILED:
		return true
	case pb.InstanceState_INSTANCE_STATE_LOST:
		return !i.GetDesiredRunning() || i.GetSpec().GetRestart().GetPolicy() == "never"
	default:
		return false
	}
}

// workloadFailed is the failure of a workload, which is not one of wasmatrix.
func workloadFailed(name string, failed []*pb.Instance) error {
	e := verdict("%s failed", name)
	if len(failed) == 1 {
		e = verdict("%s failed: %s", failed[0].GetId(), why(failed[0]))
	}
	for _, i := range failed {
		e = e.With(i.GetId(), fmt.Sprintf("%s on %s after %s, %s", stateOf(i), orDash(i.GetPlacement().GetNodeId()),
			plural(int(i.GetStatus().GetAttempt()), "attempt"), why(i)))
	}
	return fail(exitFailed, e.Next("wasmatrix logs %s", name))
}

// why tells in one line why an instance ended.
func why(i *pb.Instance) string {
	st := i.GetStatus()
	if m := oneLine(st.GetMessage()); m != "" {
		return m
	}
	if st.GetReason() == pb.ExitReason_EXIT_REASON_EXIT_CODE {
		return fmt.Sprintf("exit code %d", st.GetExitCode())
	}
	return strings.ToLower(strings.ReplaceAll(shortName(st.GetReason().String(), "EXIT_REASON_"), "_", " "))
}

// notPlaceable explains why no node takes an instance.
func notPlaceable(ctx context.Context, c *client.Client, i *pb.Instance) error {
	e := verdict("no node can take %s: %s", i.GetId(), oneLine(i.GetStatus().GetMessage())).
		Next("it stays pending and starts when a node can take it; wasmatrix explain %s, or wasmatrix instance rm %s --force", i.GetId(), i.GetId())
	if explained, err := c.Explain(ctx, &pb.ExplainRequest{Target: i.GetId()}); err == nil {
		for _, n := range explained.GetNodes() {
			e = e.With(n.GetNodeId(), strings.Join(n.GetReasons(), "; "))
		}
	}
	return fail(exitNotPlaceable, e)
}

func oneLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
