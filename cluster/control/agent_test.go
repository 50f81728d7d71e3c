package control

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// fakeAgent is one node's agent: it answers as told and keeps logs as the real
// one does.
type fakeAgent struct {
	pb.UnimplementedNodeAgentServiceServer
	node string

	mu       sync.Mutex
	invoke   func(context.Context, *pb.InvokeInstanceRequest) (*pb.InvokeInstanceResponse, error)
	invoked  []string
	call     func(context.Context, *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error)
	messages func(*pb.SubscribeMessagesRequest, grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error
	usage    *pb.ResourceUsage
	hang     bool
	logs     map[string][]*pb.LogEntry
	grown    chan struct{}
	breaks   int
	requests []*pb.FollowLogsRequest
}

// InvokeInstance implements pb.NodeAgentServiceServer.
func (a *fakeAgent) InvokeInstance(ctx context.Context, req *pb.InvokeInstanceRequest) (*pb.InvokeInstanceResponse, error) {
	a.mu.Lock()
	a.invoked = append(a.invoked, req.GetInstanceId())
	invoke := a.invoke
	a.mu.Unlock()
	if invoke != nil {
		return invoke(ctx, req)
	}
	return &pb.InvokeInstanceResponse{Response: &pb.InvokeResponse{
		Payload: append([]byte(req.GetInstanceId()+" got "), req.GetRequest().GetPayload()...),
	}}, nil
}

func (a *fakeAgent) calls() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.invoked)
}

// InvokeCapability implements pb.NodeAgentServiceServer.
func (a *fakeAgent) InvokeCapability(ctx context.Context, req *pb.InvokeCapabilityRequest) (*pb.InvokeCapabilityResponse, error) {
	return a.call(ctx, req)
}

// SubscribeMessages implements pb.NodeAgentServiceServer.
func (a *fakeAgent) SubscribeMessages(req *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
	return a.messages(req, stream)
}

// QueryInstance implements pb.NodeAgentServiceServer.
func (a *fakeAgent) QueryInstance(ctx context.Context, req *pb.QueryInstanceRequest) (*pb.QueryInstanceResponse, error) {
	a.mu.Lock()
	usage, hang := a.usage, a.hang
	a.mu.Unlock()
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &pb.QueryInstanceResponse{Instance: &pb.Instance{
		Id: req.GetTarget(), Status: &pb.InstanceStatus{Usage: usage},
	}}, nil
}

// write adds a line to an instance's log.
func (a *fakeAgent) write(instance string, at int, message string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.logs == nil {
		a.logs = map[string][]*pb.LogEntry{}
	}
	a.logs[instance] = append(a.logs[instance], &pb.LogEntry{
		Time: timestamppb.New(time.Unix(1000, int64(at))), InstanceId: instance, NodeId: a.node,
		Stream: pb.LogStream_LOG_STREAM_STDOUT, Message: message,
	})
	a.wakeLocked()
}

// breakStreams ends all log streams as a broken connection would.
func (a *fakeAgent) breakStreams() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.breaks++
	a.wakeLocked()
}

// drop forgets an instance's log, which ends its streams.
func (a *fakeAgent) drop(instance string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.logs, instance)
	a.wakeLocked()
}

func (a *fakeAgent) wakeLocked() {
	if a.grown != nil {
		close(a.grown)
		a.grown = nil
	}
}

func (a *fakeAgent) followers() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.requests)
}

// FollowLogs implements pb.NodeAgentServiceServer.
func (a *fakeAgent) FollowLogs(req *pb.FollowLogsRequest, stream grpc.ServerStreamingServer[pb.FollowLogsResponse]) error {
	id := req.GetTargets()[0]
	sent, breaks := 0, -1
	for {
		a.mu.Lock()
		if breaks < 0 {
			a.requests = append(a.requests, req)
			breaks = a.breaks
			if n := len(a.logs[id]); req.GetTail() < 0 {
				sent = n
			} else if req.GetTail() > 0 {
				sent = max(0, n-int(req.GetTail()))
			}
		}
		lines, kept := a.logs[id]
		lines = slices.Clone(lines[min(sent, len(lines)):])
		broken := a.breaks != breaks
		if a.grown == nil {
			a.grown = make(chan struct{})
		}
		grown := a.grown
		a.mu.Unlock()
		for _, line := range lines {
			if err := stream.Send(&pb.FollowLogsResponse{Entry: line}); err != nil {
				return err
			}
			sent++
		}
		switch {
		case broken:
			return apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "connection broke")
		case !kept && sent == 0:
			return apierror.New(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, "no instance %q on node %s", id, a.node)
		case !kept, !req.GetFollow():
			return nil
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-grown:
		}
	}
}

// refuseInvoke makes the guest itself refuse each call.
func (a *fakeAgent) refuseInvoke(code pb.ErrorCode) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.invoke = func(_ context.Context, req *pb.InvokeInstanceRequest) (*pb.InvokeInstanceResponse, error) {
		return nil, apierror.New(code, "no").With(refusedBy, req.GetInstanceId())
	}
}

// failInvoke makes all calls of the agent's instances fail.
func (a *fakeAgent) failInvoke(code pb.ErrorCode) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.invoke = func(context.Context, *pb.InvokeInstanceRequest) (*pb.InvokeInstanceResponse, error) {
		return nil, apierror.New(code, "failed on purpose on %s", a.node).With("why", fmt.Sprint(code))
	}
}
