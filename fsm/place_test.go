package fsm_test

import (
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestPlacing(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "")
	b.news()
	same(t, "placed", b.place("w-1", "n1").GetIds(), "w-1")
	b.is("w-1", "ASSIGNED n1 1")
	in := b.instance("w-1")
	if in.GetPlacement().GetNodeEpoch() != 1 || in.GetStatus().GetGeneration() != 1 {
		t.Errorf("got %v", in)
	}
	b.tells("INSTANCE_PLACED w-1")
	if n := b.s.View().InstanceCount("n1"); n != 1 {
		t.Errorf("the node counts %d", n)
	}
	same(t, "unplaced", ids(b.s.View().UnplacedInstances(nil)))
}

func TestALostInstanceMovesOrReturns(t *testing.T) {
	for node, event := range map[string]string{"n2": "INSTANCE_MOVED w-1: from n1", "n1": "INSTANCE_PLACED w-1"} {
		b := newBed(t)
		b.module()
		b.node("n1")
		b.node("n2")
		b.running("w", "", "n1")
		b.expire("n1", 1)
		b.node("n1")
		b.news()
		b.place("w-1", node)
		b.is("w-1", "ASSIGNED "+node+" 2")
		b.tells(event)
	}
}

func TestAVoidDecisionIsSkippedAndTheOthersStand(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n1") // epoch 2
	b.node("lost")
	b.expire("lost", 1)
	b.node("drains")
	b.do(&pb.DrainNodeCommand{NodeId: "drains", Draining: true})
	b.run("waits", "")
	b.running("runs", "", "n1")
	b.running("done", "", "n1")
	b.report("done-1", state("COMPLETED"), 1)
	b.run("off", "")
	b.do(&pb.StopInstancesCommand{InstanceIds: []string{"off-1"}})
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})

	seen := b.provider("kv").GetPlacement().GetGeneration()
	for name, d := range map[string]*pb.PlaceDecision{
		"another generation":        {InstanceId: "waits-1", SeenGeneration: 1, NodeId: "n1", NodeEpoch: 2},
		"another epoch":             {InstanceId: "waits-1", NodeId: "n1", NodeEpoch: 1},
		"a lost node":               {InstanceId: "waits-1", NodeId: "lost", NodeEpoch: 1},
		"a draining node":           {InstanceId: "waits-1", NodeId: "drains", NodeEpoch: 1},
		"an unknown node":           {InstanceId: "waits-1", NodeId: "n9", NodeEpoch: 1},
		"an unknown instance":       {InstanceId: "nobody", NodeId: "n1", NodeEpoch: 2},
		"an instance that runs":     {InstanceId: "runs-1", SeenGeneration: 1, NodeId: "n1", NodeEpoch: 2},
		"an instance that ended":    {InstanceId: "done-1", SeenGeneration: 1, NodeId: "n1", NodeEpoch: 2},
		"an instance to stop":       {InstanceId: "off-1", NodeId: "n1", NodeEpoch: 2},
		"no reason for one running": {InstanceId: "runs-1", SeenGeneration: 1, Message: "no room"},
		"both":                      {InstanceId: "waits-1", ProviderId: "kv", NodeId: "n1", NodeEpoch: 2},
		"neither":                   {NodeId: "n1", NodeEpoch: 2},
		"an unknown provider":       {ProviderId: "nobody", NodeId: "n1", NodeEpoch: 2},
		"a provider, late":          {ProviderId: "kv", SeenGeneration: seen - 1, NodeId: "n1", NodeEpoch: 2},
		"a provider, other epoch":   {ProviderId: "kv", SeenGeneration: seen, NodeId: "n1", NodeEpoch: 1},
	} {
		b.news()
		if res := b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{d}}); len(res.GetIds()) != 0 {
			t.Errorf("%s: had an effect", name)
		}
		b.tells()
	}
	res := b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{
		{InstanceId: "nobody", NodeId: "n1", NodeEpoch: 2},
		{InstanceId: "waits-1", NodeId: "n1", NodeEpoch: 2},
		{ProviderId: "kv", SeenGeneration: seen, NodeId: "n1", NodeEpoch: 2},
		{InstanceId: "waits-1", NodeId: "n1", NodeEpoch: 2},
	}})
	same(t, "done", res.GetIds(), "waits-1", "kv")
	b.is("waits-1", "ASSIGNED n1 1")
	b.providerIs("kv", "ASSIGNED n1 1")
}

func TestWhyAnInstanceIsNotPlacedIsToldOnce(t *testing.T) {
	b := newBed(t)
	b.module()
	b.run("w", "")
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.news()
	seen := b.provider("kv").GetPlacement().GetGeneration()
	tell := func(message string) {
		b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{
			{InstanceId: "w-1", Message: message}, {ProviderId: "kv", SeenGeneration: seen, Message: message},
		}})
	}
	tell("no node is ready")
	b.tells("INSTANCE_UNPLACEABLE w-1: no node is ready")
	before := b.instance("w-1").GetModifiedIndex()
	tell("no node is ready")
	b.tells()
	if b.instance("w-1").GetModifiedIndex() != before {
		t.Error("the same reason again changed the record")
	}
	tell("n1 has no room")
	b.tells("INSTANCE_UNPLACEABLE w-1: n1 has no room")
	b.is("w-1", "PENDING  0")
	if got := b.instance("w-1").GetStatus().GetMessage(); got != "n1 has no room" {
		t.Errorf("message %q", got)
	}
	if p := b.provider("kv"); p.GetStatus().GetMessage() != "n1 has no room" || p.GetStatus().GetState() != pb.ProviderState_PROVIDER_STATE_PENDING {
		t.Errorf("got %v", p)
	}
	b.node("n1")
	b.place("w-1", "n1")
	if got := b.instance("w-1").GetStatus().GetMessage(); got != "" {
		t.Errorf("once placed, the message is %q", got)
	}
}
