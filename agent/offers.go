package agent

import (
	"slices"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// offers returns what the control plane is told of each runtime of a node. What
// the caller says of one stays; which is the default is decided here.
func offers(node *pb.NodeInfo, defaultRuntime string) []*pb.RuntimeInfo {
	out := make([]*pb.RuntimeInfo, 0, len(node.GetRuntimes()))
	for _, name := range node.GetRuntimes() {
		info := &pb.RuntimeInfo{Name: name, IsDefault: name == defaultRuntime}
		given := node.GetRuntimeInfo()
		if at := slices.IndexFunc(given, func(r *pb.RuntimeInfo) bool { return r.GetName() == name }); at >= 0 {
			info.Isolation, info.Accelerator = given[at].GetIsolation(), given[at].GetAccelerator()
		}
		out = append(out, info)
	}
	return out
}

// chosenRuntime returns the runtime of that name, or the default for "". A runtime
// that is not offered is known by its name only.
func chosenRuntime(offered []*pb.RuntimeInfo, name string) *pb.RuntimeInfo {
	for _, r := range offered {
		if r.GetName() == name || name == "" && r.GetIsDefault() {
			return r
		}
	}
	return &pb.RuntimeInfo{Name: name}
}
