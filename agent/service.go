package agent

import (
	"context"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// capabilityServer serves capability calls of other nodes and of users;
// *remote.Server is one. It checks everything but the kind of caller.
type capabilityServer interface {
	InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error)
	ReadClock(ctx context.Context, req *pb.ReadClockRequest) (*pb.ReadClockResponse, error)
}

// service is NodeAgentService. It relies on the rules of access.go and on the
// validation of requests by the server's interceptors.
type service struct {
	pb.UnimplementedNodeAgentServiceServer

	agent        *Agent
	capabilities capabilityServer
	ports        func(inst *pb.Instance) port
	toAPI        func(error) *apierror.Error
}

// QueryInstance returns an instance of this node with its resource use.
func (s *service) QueryInstance(_ context.Context, req *pb.QueryInstanceRequest) (*pb.QueryInstanceResponse, error) {
	sup, err := s.agent.worker.one(req.GetTarget())
	if err != nil {
		return nil, err
	}
	grants, index := s.agent.grantsOf(sup.id), s.agent.index()
	return &pb.QueryInstanceResponse{Instance: sup.view(), Assignments: grants, Index: index}, nil
}

// ListInstances returns the instances of this node in the order of their ids.
func (s *service) ListInstances(_ context.Context, req *pb.ListInstancesRequest) (*pb.ListInstancesResponse, error) {
	resp := s.agent.worker.list(req)
	resp.Index = s.agent.index()
	return resp, nil
}

// InvokeInstance calls the invoke handler of an instance of this node.
func (s *service) InvokeInstance(ctx context.Context, req *pb.InvokeInstanceRequest) (*pb.InvokeInstanceResponse, error) {
	payload, err := proto.Marshal(req.GetRequest())
	if err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the request cannot be encoded: %s", err)
	}
	answer, err := s.agent.Invoke(ctx, req.GetInstanceId(), runtime.HandlerInvoke, payload)
	if err != nil {
		return nil, err
	}
	resp := &pb.InvokeResponse{}
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR,
			"instance %s answered with something that is not an InvokeResponse", req.GetInstanceId()).
			With("instance", req.GetInstanceId()).With("node", s.agent.nodeID()).
			Next("mend what %s returns in the module", runtime.HandlerInvoke)
	}
	if refusal := resp.GetError(); refusal != nil {
		return nil, guestRefusal(refusal, req.GetInstanceId())
	}
	resp.InstanceId, resp.NodeId = req.GetInstanceId(), s.agent.nodeID()
	return &pb.InvokeInstanceResponse{Response: resp}, nil
}

// guestRefusal is the error of a call that the guest itself refused. The guest
// chooses code and message; who it was is said by the host.
func guestRefusal(e *pb.Error, instance string) error {
	code := e.GetCode()
	if _, known := pb.ErrorCode_name[int32(code)]; !known || code == pb.ErrorCode_ERROR_CODE_UNSPECIFIED {
		code = pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR
	}
	return apierror.New(code, "%s", bounded(e.GetMessage())).With("refused_by", instance)
}

// maxRefusal bounds the message of a guest's refusal, in bytes: it goes into
// logs and error details, which are no place for data.
const maxRefusal = 1 << 10

// bounded returns text as valid UTF-8 of at most maxRefusal bytes.
func bounded(text string) string {
	text = strings.ToValidUTF8(text[:min(len(text), maxRefusal+utf8.UTFMax)], "\uFFFD")
	if len(text) <= maxRefusal {
		return text
	}
	cut := maxRefusal
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut]
}

// InvokeCapability calls a provider of this node for another node or a user.
func (s *service) InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	return s.capabilities.InvokeCapability(ctx, req)
}

// ReadClock tells other agents the clock that their calls are limited by.
func (s *service) ReadClock(ctx context.Context, req *pb.ReadClockRequest) (*pb.ReadClockResponse, error) {
	return s.capabilities.ReadClock(ctx, req)
}

// FollowLogs streams the output of instances of this node.
func (s *service) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	return s.agent.logs.follow(stream.Context(), req, func(e *pb.LogEntry) error {
		return stream.Send(&pb.FollowLogsResponse{Entry: e})
	})
}

// StartInstance starts a workload in standalone mode.
func (s *service) StartInstance(ctx context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	if s.agent.standalone == nil {
		return nil, s.clusterOnly("StartInstance")
	}
	ctx, _ = correlation.Ensure(ctx)
	return s.agent.standalone.start(ctx, req)
}

// StopInstance stops instances in standalone mode.
func (s *service) StopInstance(_ context.Context, req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	if s.agent.standalone == nil {
		return nil, s.clusterOnly("StopInstance")
	}
	return s.agent.standalone.stop(req)
}

// UploadModule stores a module on this node in standalone mode.
func (s *service) UploadModule(stream grpc.ClientStreamingServer[pb.UploadModuleRequest, pb.UploadModuleResponse]) error {
	if s.agent.standalone == nil {
		return s.clusterOnly("UploadModule")
	}
	resp, err := s.agent.standalone.upload(stream.Recv)
	if err != nil {
		return err
	}
	return stream.SendAndClose(resp)
}

// clusterOnly refuses what belongs to the control plane when there is one.
func (s *service) clusterOnly(method string) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "node %s belongs to a cluster: %s goes to the control plane", s.agent.nodeID(), method).
		With("node", s.agent.nodeID()).
		Next("call ControlPlaneService/%s on any peer", method)
}
