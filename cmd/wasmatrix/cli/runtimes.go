package cli

import (
	"fmt"
	"slices"
	"strings"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// sandbox is the isolation that every WebAssembly runtime has; it is not told apart.
const sandbox = "sandbox"

// inRuntime is what tells of a runtime and what keeps its instances apart.
type inRuntime interface {
	GetRuntime() string
	GetIsolation() string
}

// runtimeText names a runtime with its isolation where there is a choice of it,
// as in "microvm (emulated)".
func runtimeText(in inRuntime) string { return runtimeWords(in.GetRuntime(), in.GetIsolation()) }

func runtimeWords(name, isolation string) string {
	if name == "" || isolation == "" || isolation == sandbox {
		return orDash(name)
	}
	return fmt.Sprintf("%s (%s)", name, isolation)
}

// runtimesOf lists the runtimes of a node, its default first.
func runtimesOf(node *pb.NodeInfo) string {
	if len(node.GetRuntimeInfo()) == 0 {
		return orDash(strings.Join(node.GetRuntimes(), ", "))
	}
	var out []string
	for _, r := range node.GetRuntimeInfo() {
		text := runtimeWords(r.GetName(), r.GetIsolation())
		if r.GetIsDefault() {
			out = slices.Insert(out, 0, text)
		} else {
			out = append(out, text)
		}
	}
	return strings.Join(out, ", ")
}

// offersText says how many nodes offer which runtime.
func offersText(offers []*pb.RuntimeOffer) string {
	out := make([]string, len(offers))
	for i, o := range offers {
		out[i] = fmt.Sprintf("%s on %s", runtimeWords(o.GetName(), o.GetIsolation()), plural(int(o.GetNodes()), "node"))
	}
	return strings.Join(out, ", ")
}
