package control

import (
	"context"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// ListNodes implements pb.ControlPlaneServiceServer.
func (h *handlers) ListNodes(ctx context.Context, req *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	nodes := view.Nodes(nil)
	counts := make(map[string]uint32, len(nodes))
	for _, n := range nodes {
		counts[n.GetId()] = uint32(view.InstanceCount(n.GetId()))
	}
	return &pb.ListNodesResponse{Nodes: nodes, Index: view.Index(), InstanceCounts: counts}, nil
}

// DrainNode implements pb.ControlPlaneServiceServer.
func (h *handlers) DrainNode(ctx context.Context, req *pb.DrainNodeRequest) (*pb.DrainNodeResponse, error) {
	n, index, err := h.setDraining(ctx, req, req.GetNodeId(), true)
	if err != nil {
		return nil, err
	}
	return &pb.DrainNodeResponse{Node: n, Index: index}, nil
}

// UndrainNode implements pb.ControlPlaneServiceServer.
func (h *handlers) UndrainNode(ctx context.Context, req *pb.UndrainNodeRequest) (*pb.UndrainNodeResponse, error) {
	n, index, err := h.setDraining(ctx, req, req.GetNodeId(), false)
	if err != nil {
		return nil, err
	}
	return &pb.UndrainNodeResponse{Node: n, Index: index}, nil
}

func (h *handlers) setDraining(ctx context.Context, req write, id string, draining bool) (*pb.Node, uint64, error) {
	res, view, err := h.propose(ctx, req, &pb.Command{Payload: &pb.Command_DrainNode{
		DrainNode: &pb.DrainNodeCommand{NodeId: id, Draining: draining},
	}}, &pb.Precondition{Record: &pb.Precondition_NodeId{NodeId: id}})
	if err != nil {
		return nil, 0, err
	}
	n, ok := view.Node(id)
	if !ok {
		return nil, 0, apierror.New(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "no node has the id %q", id).
			With("node", id).
			Next("wasmatrix node list")
	}
	return n, res.GetIndex(), nil
}

// agentOf returns the agent of a node and its address.
func (h *handlers) agentOf(view fsm.View, nodeID string) (agent pb.NodeAgentServiceClient, address string, err error) {
	n, ok := view.Node(nodeID)
	address = n.GetInfo().GetAgentAddress()
	if !ok || address == "" {
		return nil, "", apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "the address of node %q is not known", nodeID).
			With("node", nodeID).
			Next("wasmatrix node list")
	}
	conn, err := h.AgentConn(address)
	if err != nil {
		return nil, "", apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "the agent of node %q is not reached: %s", nodeID, err).
			With("node", nodeID).With("address", address).
			Next("wasmatrix node list")
	}
	return pb.NewNodeAgentServiceClient(conn), address, nil
}
