package cli

import (
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestExplainOfAnAmbiguousNameSaysWhichToChooseFrom(t *testing.T) {
	b := newBench(t)
	b.fake.fail["Explain"] = apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, `"web" names 2 instances`).
		With("matches", "web-aaaaa, web-bbbbb").Next("something else")
	code, _, stderr := b.run("explain", "web")
	if code != 3 || !strings.Contains(stderr, "try:  wasmatrix explain web-aaaaa, or one of web-bbbbb\n") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestDrainSaysWhatItWaitsForAndWhy(t *testing.T) {
	b := newBench(t)
	for id, rules := range map[string]*pb.PlacementRules{
		"free-1": nil, "pinned-1": {Node: "n1"}, "zoned-1": {Labels: map[string]string{"zone": "a"}},
	} {
		i := b.fake.add(id, pb.InstanceState_INSTANCE_STATE_RUNNING)
		i.Placement = &pb.Placement{NodeId: "n1"}
		i.Spec = &pb.WorkloadSpec{Placement: rules}
	}
	b.fake.add("elsewhere-1", pb.InstanceState_INSTANCE_STATE_RUNNING).Placement = &pb.Placement{NodeId: "n2"}
	code, _, stderr := b.run("node", "drain", "n1", "--wait-timeout", "500ms")
	for _, want := range []string{
		"gave up waiting for n1 to be drained after 500ms\n",
		"free-1 RUNNING, pinned-1 RUNNING (pinned by placement.node), zoned-1 RUNNING (wants a node with zone=a)\n",
		"try:  what is pinned leaves only when it is stopped: wasmatrix instance stop pinned-1; or wasmatrix node undrain n1\n",
	} {
		if code != 7 || !strings.Contains(stderr, want) {
			t.Errorf("exit %d, no %q in\n%s", code, want, stderr)
		}
	}
	if strings.Contains(stderr, "elsewhere") {
		t.Errorf("it waits for what is on another node\n%s", stderr)
	}
}
