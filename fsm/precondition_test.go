package fsm_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestPreconditions(t *testing.T) {
	assignment := func(instance string) *pb.Precondition_Assignment {
		return &pb.Precondition_Assignment{Assignment: &pb.AssignmentKey{InstanceId: instance, ProviderId: "kv"}}
	}
	v := furnished(t).s.View()
	in, _ := v.Instance("w-1")
	p, _ := v.Provider("kv")
	n, _ := v.Node("n1")
	a, _ := v.Assignment("w-1", "kv")
	for name, c := range map[string]struct {
		expect *pb.Precondition
		holds  bool
	}{
		"instance":            {&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: "w-1"}, ModifiedIndex: in.GetModifiedIndex()}, true},
		"instance changed":    {&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: "w-1"}, ModifiedIndex: in.GetModifiedIndex() - 1}, false},
		"instance gone":       {&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: "nobody"}, ModifiedIndex: 1}, false},
		"instance absent":     {&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: "nobody"}}, true},
		"instance not absent": {&pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: "w-1"}}, false},
		"workload absent":     {&pb.Precondition{Record: &pb.Precondition_Workload{Workload: "nobody"}}, true},
		"workload not absent": {&pb.Precondition{Record: &pb.Precondition_Workload{Workload: "w"}}, false},
		"workload of index":   {&pb.Precondition{Record: &pb.Precondition_Workload{Workload: "w"}, ModifiedIndex: in.GetModifiedIndex()}, false},
		"provider":            {&pb.Precondition{Record: &pb.Precondition_ProviderId{ProviderId: "kv"}, ModifiedIndex: p.GetModifiedIndex()}, true},
		"provider changed":    {&pb.Precondition{Record: &pb.Precondition_ProviderId{ProviderId: "kv"}, ModifiedIndex: 1}, false},
		"node":                {&pb.Precondition{Record: &pb.Precondition_NodeId{NodeId: "n1"}, ModifiedIndex: n.GetModifiedIndex()}, true},
		"node changed":        {&pb.Precondition{Record: &pb.Precondition_NodeId{NodeId: "n1"}, ModifiedIndex: 1}, false},
		"assignment":          {&pb.Precondition{Record: assignment("w-1"), ModifiedIndex: a.GetModifiedIndex()}, true},
		"assignment changed":  {&pb.Precondition{Record: assignment("w-1"), ModifiedIndex: 1}, false},
		"assignment absent":   {&pb.Precondition{Record: assignment("u-1")}, true},
		"nothing":             {&pb.Precondition{}, false},
	} {
		b := furnished(t)
		cmd := request("pre", "d", &pb.DrainNodeCommand{NodeId: "n1", Draining: true})
		cmd.Preconditions = []*pb.Precondition{c.expect}
		first := b.send(cmd)
		node, _ := b.s.View().Node("n1")
		if node.GetDraining() != c.holds || (first.GetError() == nil) != c.holds {
			t.Errorf("%s: got %v", name, first)
			continue
		}
		if e := first.GetError(); e != nil && e.GetCode() != conflict && e.GetCode() != invalid {
			t.Errorf("%s: got %v", name, e)
		}
		if e := first.GetError(); e.GetCode() == conflict && (e.GetDetails()["found_index"] == "" || e.GetNextStep() == "") {
			t.Errorf("%s: the refusal does not say what was found: %v", name, e)
		}
		// It is judged once: the answer stays although the world moves on.
		b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true})
		b.do(&pb.DrainNodeCommand{NodeId: "n1"})
		if again := b.send(cmd); !proto.Equal(first, again) {
			t.Errorf("%s: repeated it gives %v", name, again)
		}
	}
}
