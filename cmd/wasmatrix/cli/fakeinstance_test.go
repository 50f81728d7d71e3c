package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (f *fake) add(id string, state pb.InstanceState) *pb.Instance {
	name, _, _ := strings.Cut(id, "-")
	i := &pb.Instance{
		Id: id, Name: name, Spec: &pb.WorkloadSpec{Name: name, Module: "sha256:" + strings.Repeat("ab", 32), Replicas: 1}, DesiredRunning: true,
		Placement: &pb.Placement{NodeId: "n1", Generation: 1}, CreatedAt: timestamppb.New(epoch()),
		Status: &pb.InstanceStatus{State: state, Generation: 1, Attempt: 1, StartedAt: timestamppb.New(epoch())},
	}
	f.instances = append(f.instances, i)
	return i
}

func (f *fake) find(target string) []*pb.Instance {
	var out []*pb.Instance
	for _, i := range f.instances {
		if i.GetId() == target || i.GetName() == target {
			out = append(out, i)
		}
	}
	return out
}

func copies(in []*pb.Instance) []*pb.Instance {
	out := make([]*pb.Instance, len(in))
	for n, i := range in {
		out[n], _ = proto.Clone(i).(*pb.Instance)
	}
	return out
}

func notFound(target string) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance has the id or name %q", target).Next("wasmatrix instance list")
}

func (f *fake) StartInstance(_ context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	f.mu.Lock()
	var made []*pb.Instance
	for range max(1, int(req.GetSpec().GetReplicas())) {
		f.made++
		i := f.add(fmt.Sprintf("%s-%05d", req.GetSpec().GetName(), f.made), pb.InstanceState_INSTANCE_STATE_PENDING)
		i.Name = req.GetSpec().GetName()
		i.Spec, _ = proto.Clone(req.GetSpec()).(*pb.WorkloadSpec)
		i.Spec.Replicas = 1
		made = append(made, i)
	}
	answer := copies(made)
	becomes := f.becomes
	f.mu.Unlock()
	go func() {
		for _, i := range made {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() { becomes(i) })
		}
	}()
	return &pb.StartInstanceResponse{Instances: answer, Index: 7}, nil
}

func (f *fake) StopInstance(_ context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	f.mu.Lock()
	found := f.find(req.GetTarget())
	answer := copies(found)
	f.mu.Unlock()
	if len(found) == 0 {
		return nil, notFound(req.GetTarget())
	}
	go func() {
		for _, i := range found {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STOPPED, i.GetId(), func() {
				i.DesiredRunning, i.Status.State = false, pb.InstanceState_INSTANCE_STATE_STOPPED
			})
		}
	}()
	return &pb.StopInstanceResponse{Instances: answer}, nil
}

func (f *fake) RestartInstance(_ context.Context, req *pb.RestartInstanceRequest) (*pb.RestartInstanceResponse, error) {
	f.mu.Lock()
	found := f.find(req.GetTarget())
	answer := copies(found)
	f.mu.Unlock()
	go func() {
		for _, i := range found {
			f.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() {
				i.DesiredRunning = true
				i.Status.Attempt++
				f.becomes(i)
			})
		}
	}()
	return &pb.RestartInstanceResponse{Instances: answer}, nil
}

func (f *fake) RemoveInstance(_ context.Context, req *pb.RemoveInstanceRequest) (*pb.RemoveInstanceResponse, error) {
	resp := &pb.RemoveInstanceResponse{InstanceIds: idsOf(f.find(req.GetTarget()))}
	f.change(pb.EventKind_EVENT_KIND_INSTANCE_REMOVED, req.GetTarget(), func() {
		f.instances = slices.DeleteFunc(f.instances, func(i *pb.Instance) bool { return slices.Contains(resp.GetInstanceIds(), i.GetId()) })
	})
	return resp, nil
}

func (f *fake) QueryInstance(_ context.Context, req *pb.QueryInstanceRequest) (*pb.QueryInstanceResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	found := f.find(req.GetTarget())
	if len(found) == 0 {
		return nil, notFound(req.GetTarget())
	}
	resp := &pb.QueryInstanceResponse{Instance: copies(found)[0]}
	for _, g := range f.grants {
		if g.GetInstanceId() == found[0].GetId() {
			resp.Assignments = append(resp.Assignments, g)
		}
	}
	return resp, nil
}

// ListInstances answers in pages of two, so that everyone has to go on.
func (f *fake) ListInstances(_ context.Context, req *pb.ListInstancesRequest) (*pb.ListInstancesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*pb.Instance
	for _, i := range f.instances {
		if (req.GetName() == "" || i.GetName() == req.GetName()) &&
			(req.GetNodeId() == "" || i.GetPlacement().GetNodeId() == req.GetNodeId()) && i.GetId() > req.GetPageToken() {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b *pb.Instance) int { return strings.Compare(a.GetId(), b.GetId()) })
	resp := &pb.ListInstancesResponse{Instances: copies(all[:min(2, len(all))]), Index: 9}
	if len(all) > 2 {
		resp.NextPageToken = all[1].GetId()
	}
	return resp, nil
}

func (f *fake) Explain(_ context.Context, req *pb.ExplainRequest) (*pb.ExplainResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &pb.ExplainResponse{Instance: copies(f.find(req.GetTarget()))[0], Nodes: []*pb.NodeVerdict{
		{NodeId: "n1", Reasons: []string{"no room: 64 MiB of 64 MiB taken"}}, {NodeId: "n2", Eligible: true, Chosen: true, Reasons: []string{"load 0 %"}, Runtime: "microvm", Isolation: "hardware"},
	}}, nil
}

func (f *fake) AssignCapability(_ context.Context, req *pb.AssignCapabilityRequest) (*pb.AssignCapabilityResponse, error) {
	g := req.GetGrant()
	return &pb.AssignCapabilityResponse{Assignments: []*pb.CapabilityAssignment{
		{InstanceId: req.GetTarget(), ProviderId: g.GetProvider(), Permissions: g.GetPermissions(), Bucket: g.GetBucket()},
	}}, nil
}

func (f *fake) RevokeCapability(context.Context, *pb.RevokeCapabilityRequest) (*pb.RevokeCapabilityResponse, error) {
	return &pb.RevokeCapabilityResponse{}, nil
}

func (f *fake) UploadModule(stream grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	for {
		_, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	h := first.GetHeader()
	return stream.SendAndClose(&pb.UploadModuleResponse{Module: &pb.Module{
		Digest: h.GetDigest(), SizeBytes: h.GetSizeBytes(), Name: h.GetName(), Kind: f.kind, Imports: f.imports, CreatedAt: timestamppb.New(epoch()),
	}})
}

func (f *fake) ListModules(context.Context, *pb.ListModulesRequest) (*pb.ListModulesResponse, error) {
	return &pb.ListModulesResponse{Modules: f.modules}, nil
}

func (f *fake) Invoke(_ context.Context, req *pb.InvokeRequest) (*pb.InvokeResponse, error) {
	return &pb.InvokeResponse{Payload: append([]byte("hello, "), req.GetPayload()...), InstanceId: req.GetTarget() + "-00001", NodeId: "n2"}, nil
}

func (f *fake) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	logs := f.logs
	f.mu.Unlock()
	for _, e := range logs {
		if err := stream.Send(&pb.FollowLogsResponse{Entry: e}); err != nil {
			return err
		}
	}
	if req.GetFollow() {
		<-stream.Context().Done()
	}
	return nil
}
