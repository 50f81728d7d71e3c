package control

import (
	"context"
	"encoding/base64"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	defaultPage = 500
	// pageVersion opens every page token, so that a later form can be told apart.
	pageVersion = "1:"
	// usageTimeout bounds what a query waits for the agent's figures, which are
	// left out when they do not come in time.
	usageTimeout = 300 * time.Millisecond
)

// QueryInstance implements pb.ControlPlaneServiceServer.
func (h *handlers) QueryInstance(ctx context.Context, req *pb.QueryInstanceRequest) (*pb.QueryInstanceResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	inst, err := resolveOne(view, req.GetTarget())
	if err != nil {
		return nil, err
	}
	return &pb.QueryInstanceResponse{
		Instance:    h.withUsage(ctx, view, inst),
		Assignments: view.AssignmentsByInstance(nil, inst.GetId()),
		Index:       view.Index(),
	}, nil
}

// withUsage adds what the agent measures of a running instance. The record
// itself stays what the registry says.
func (h *handlers) withUsage(ctx context.Context, view fsm.View, inst *pb.Instance) *pb.Instance {
	if inst.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING {
		return inst
	}
	agent, _, err := h.agentOf(view, inst.GetPlacement().GetNodeId())
	if err != nil {
		return inst
	}
	ctx, cancel := context.WithTimeout(ctx, usageTimeout)
	defer cancel()
	there, err := agent.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: inst.GetId()})
	usage := there.GetInstance().GetStatus().GetUsage()
	if err != nil || usage == nil || there.GetInstance().GetId() != inst.GetId() {
		return inst
	}
	// The spec may be large; all but the status is shared with the registry.
	out := &pb.Instance{}
	inst.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		out.ProtoReflect().Set(field, value)
		return true
	})
	out.Status = proto.CloneOf(inst.GetStatus())
	out.Status.Usage = usage
	return out
}

// ListInstances implements pb.ControlPlaneServiceServer.
func (h *handlers) ListInstances(ctx context.Context, req *pb.ListInstancesRequest) (*pb.ListInstancesResponse, error) {
	after, err := parsePageToken(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	size := int(req.GetPageSize())
	if size == 0 {
		size = defaultPage
	}
	page := make([]*pb.Instance, 0, min(size, defaultPage))
	resp := &pb.ListInstancesResponse{Index: view.Index()}
	for inst := range candidates(view, req, after) {
		if !listed(req, inst) {
			continue
		}
		if len(page) == size {
			resp.NextPageToken = pageToken(page[size-1].GetId())
			break
		}
		page = append(page, inst)
	}
	resp.Instances = page
	return resp, nil
}

// candidates yields the instances after an id in the order of their ids, from
// the narrowest index that the request allows.
func candidates(view fsm.View, req *pb.ListInstancesRequest, after string) func(yield func(*pb.Instance) bool) {
	return func(yield func(*pb.Instance) bool) {
		var all []*pb.Instance
		switch {
		case req.GetName() != "":
			all = view.InstancesByName(nil, req.GetName())
		case req.GetNodeId() != "":
			all = view.InstancesByNode(nil, req.GetNodeId())
		default:
			eachAfter(view, after, yield)
			return
		}
		first, found := slices.BinarySearchFunc(all, after, func(inst *pb.Instance, id string) int {
			return strings.Compare(inst.GetId(), id)
		})
		if found {
			first++
		}
		for _, inst := range all[first:] {
			if !yield(inst) {
				return
			}
		}
	}
}

// eachAfter reads the table in pieces, so that a page costs what it shows.
func eachAfter(view fsm.View, after string, yield func(*pb.Instance) bool) {
	for {
		piece := view.InstancesAfter(after, defaultPage)
		for _, inst := range piece {
			if !yield(inst) {
				return
			}
			after = inst.GetId()
		}
		if len(piece) < defaultPage {
			return
		}
	}
}

func listed(req *pb.ListInstancesRequest, inst *pb.Instance) bool {
	return (req.GetName() == "" || req.GetName() == inst.GetName()) &&
		(req.GetNodeId() == "" || req.GetNodeId() == inst.GetPlacement().GetNodeId() && fsm.Placed(inst)) &&
		(len(req.GetStates()) == 0 || slices.Contains(req.GetStates(), inst.GetStatus().GetState()))
}

func pageToken(lastID string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(pageVersion + lastID))
}

// parsePageToken returns the id after which a page begins.
func parsePageToken(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	id, ok := strings.CutPrefix(string(b), pageVersion)
	if err != nil || !ok {
		return "", invalid("the page token is not one that ListInstances gave").
			Next("start over without a page token")
	}
	return id, nil
}

// Explain implements pb.ControlPlaneServiceServer.
func (h *handlers) Explain(ctx context.Context, req *pb.ExplainRequest) (*pb.ExplainResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	inst, err := resolveOne(view, req.GetTarget())
	if err != nil {
		return nil, err
	}
	return &pb.ExplainResponse{Instance: inst, Nodes: h.Config.Explain(view, inst), Index: view.Index()}, nil
}

// resolveOne returns the one instance that target names.
func resolveOne(view fsm.View, target string) (*pb.Instance, error) {
	found, refusal := view.Resolve(target)
	if refusal != nil {
		return nil, apierror.FromProto(refusal)
	}
	if len(found) == 1 {
		return found[0], nil
	}
	ids := make([]string, 0, maxNamed+1)
	for _, inst := range found[:min(len(found), maxNamed)] {
		ids = append(ids, inst.GetId())
	}
	if len(found) > maxNamed {
		ids = append(ids, "…")
	}
	return nil, invalid("%q names %d instances, and one is asked for", target, len(found)).
		With("matches", strings.Join(ids, ", ")).
		Next("give the id of one of them: %s; wasmatrix instance list shows all", strings.Join(ids, ", "))
}

// maxNamed bounds how many records an error names.
const maxNamed = 10

// ListModules implements pb.ControlPlaneServiceServer.
func (h *handlers) ListModules(ctx context.Context, req *pb.ListModulesRequest) (*pb.ListModulesResponse, error) {
	view, err := h.Viewer.View(ctx, req.GetRead())
	if err != nil {
		return nil, err
	}
	return &pb.ListModulesResponse{Modules: view.Modules(nil), Index: view.Index()}, nil
}
