package fsm_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// busBed has a running messaging provider on n1 and an instance w-1 on n2 that may
// subscribe.
func busBed(t *testing.T) *bed {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus", 2)})
	b.placeReplica("bus", 1, "n1")
	b.running("w", "", "n2", grant("bus", "msg:subscribe"))
	b.news()
	return b
}

func (b *bed) subscriptions(instance, provider string, want ...string) {
	b.t.Helper()
	a, _ := b.s.View().Assignment(instance, provider)
	same(b.t, "subscriptions of "+instance, a.GetSubscriptions(), want...)
}

func TestASubscriptionIsRecordedOnce(t *testing.T) {
	b := busBed(t)
	same(t, "added", b.do(b.subscription("w-1", "bus", "orders.*", true)).GetIds(), "orders.*")
	same(t, "added", b.do(b.subscription("w-1", "bus", "a", true)).GetIds(), "a")
	old, _ := b.s.View().Assignment("w-1", "bus")
	same(t, "repeated", b.do(b.subscription("w-1", "bus", "a", true)).GetIds())
	b.tells("SUBSCRIPTION_ADDED w-1/bus: orders.*", "SUBSCRIPTION_ADDED w-1/bus: a")
	b.subscriptions("w-1", "bus", "a", "orders.*")

	same(t, "removed", b.do(b.subscription("w-1", "bus", "a", false)).GetIds(), "a")
	same(t, "removed again", b.do(b.subscription("w-1", "bus", "a", false)).GetIds())
	b.tells("SUBSCRIPTION_REMOVED w-1/bus: a")
	b.subscriptions("w-1", "bus", "orders.*")
	same(t, "the record before", old.GetSubscriptions(), "a", "orders.*")
}

func TestWhoMayRecordASubscription(t *testing.T) {
	b := busBed(t)
	b.do(&pb.RegisterProviderCommand{Spec: bus("other", 1)})
	b.placeProvider("other", "n1")
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.placeProvider("kv", "n1")
	b.do(&pb.AssignCapabilityCommand{InstanceIds: []string{"w-1"}, Grant: grant("kv", "kv:read")})
	good := b.subscription("w-1", "bus", "orders", true)
	change := func(edit func(*pb.RecordSubscriptionRequest)) *pb.RecordSubscriptionRequest {
		c := proto.CloneOf(good)
		edit(c)
		return c
	}
	for name, c := range map[string]struct {
		code pb.ErrorCode
		req  *pb.RecordSubscriptionRequest
	}{
		"an unknown node":              {noNode, change(func(c *pb.RecordSubscriptionRequest) { c.NodeId = "n9" })},
		"another epoch":                {conflict, change(func(c *pb.RecordSubscriptionRequest) { c.Epoch++ })},
		"a node without the provider":  {conflict, change(func(c *pb.RecordSubscriptionRequest) { c.NodeId = "n2" })},
		"no such provider":             {noProvider, change(func(c *pb.RecordSubscriptionRequest) { c.ProviderId = "nothing" })},
		"a provider without subjects":  {invalid, change(func(c *pb.RecordSubscriptionRequest) { c.ProviderId = "kv" })},
		"a provider that is not its":   {denied, change(func(c *pb.RecordSubscriptionRequest) { c.ProviderId = "other" })},
		"no such instance":             {noInstance, change(func(c *pb.RecordSubscriptionRequest) { c.InstanceId = "nobody" })},
		"an older generation":          {conflict, change(func(c *pb.RecordSubscriptionRequest) { c.Generation-- })},
		"a generation that is to come": {conflict, change(func(c *pb.RecordSubscriptionRequest) { c.Generation++ })},
		"no subject":                   {invalid, change(func(c *pb.RecordSubscriptionRequest) { c.Subject = "" })},
		"a space":                      {invalid, change(func(c *pb.RecordSubscriptionRequest) { c.Subject = "a b" })},
		"a long subject":               {invalid, change(func(c *pb.RecordSubscriptionRequest) { c.Subject = strings.Repeat("a", 256) })},
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			b.refuse(c.code, c.req)
		})
	}
	b.t = t
	b.do(good)

	b.node("n1") // another agent process: the replica is of a new epoch
	b.refuse(conflict, good)
	b.do(b.subscription("w-1", "bus", "again", true))
	b.expire("n1", 2)
	b.refuse(conflict, good)
	b.report("w-1", state("FAILED"), 1)
	b.node("n1")
	b.placeReplica("bus", 1, "n1")
	b.refuse(conflict, b.subscription("w-1", "bus", "late", true))
}

func TestSubscriptionsAreBounded(t *testing.T) {
	b := busBed(t)
	for i := range fsm.MaxSubscriptions {
		b.do(b.subscription("w-1", "bus", fmt.Sprintf("s.%d", i), true))
	}
	if e := b.refuse(exhausted, b.subscription("w-1", "bus", "one.more", true)); e.GetDetails()["limit"] != "64" {
		t.Errorf("got %v", e)
	}
	b.do(b.subscription("w-1", "bus", "s.7", true))
	b.do(b.subscription("w-1", "bus", "s.7", false))
	b.do(b.subscription("w-1", "bus", "one.more", true))
}

func TestSubscriptionsLiveAsLongAsTheirAssignment(t *testing.T) {
	b := busBed(t)
	one := []string{"w-1"}
	b.do(b.subscription("w-1", "bus", "orders", true))
	b.do(&pb.AssignCapabilityCommand{InstanceIds: one, Grant: grant("bus", "msg:publish")})
	b.do(&pb.RevokeCapabilityCommand{InstanceIds: one, ProviderId: "bus", Permissions: []string{"msg:subscribe"}})
	b.subscriptions("w-1", "bus", "orders")
	b.do(&pb.RestartInstancesCommand{InstanceIds: one})
	b.expire("n2", 1)
	b.place("w-1", "n1")
	b.do(&pb.UpdateProviderCommand{Spec: bus("bus", 1)})
	b.subscriptions("w-1", "bus", "orders")

	b.do(&pb.RevokeCapabilityCommand{InstanceIds: one, ProviderId: "bus"})
	b.do(&pb.AssignCapabilityCommand{InstanceIds: one, Grant: grant("bus", "msg:subscribe")})
	b.subscriptions("w-1", "bus")
}

func TestTriggersAreSubscribedFromTheBeginning(t *testing.T) {
	b := busBed(t)
	b.do(&pb.RegisterProviderCommand{Spec: bus("other", 1)})
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	spec := workload("t", "", grant("bus", "msg:subscribe"), grant("kv", "kv:read"), grant("other", "msg:subscribe"))
	for _, subject := range []string{"b", "a.>", "b", "c"} {
		spec.Triggers = append(spec.Triggers, &pb.Trigger{Trigger: &pb.Trigger_Subscribe{Subscribe: subject}})
	}
	target := func(subject, provider string) *pb.TriggerTarget {
		return &pb.TriggerTarget{Subject: subject, ProviderId: provider}
	}
	c := &pb.CreateInstancesCommand{Spec: spec, InstanceIds: []string{"t-1"}}
	for name, targets := range map[string][]*pb.TriggerTarget{
		"none":          nil,
		"not all":       {target("b", "bus"), target("a.>", "bus")},
		"of a kv":       {target("b", "bus"), target("a.>", "bus"), target("c", "kv")},
		"not granted":   {target("b", "bus"), target("a.>", "bus"), target("c", "ungranted")},
		"of another id": {target("b", "bus"), target("a.>", "bus"), target("c", "")},
	} {
		c := proto.CloneOf(c)
		c.Triggers = targets
		if e := b.refuse(invalid, c); e.GetDetails()["subject"] == "" || e.GetNextStep() == "" {
			t.Errorf("%s: %v", name, e)
		}
	}
	c.Triggers = []*pb.TriggerTarget{target("b", "bus"), target("a.>", "bus"), target("c", "other")}
	b.do(c)
	b.subscriptions("t-1", "bus", "a.>", "b")
	b.subscriptions("t-1", "other", "c")
	b.subscriptions("t-1", "kv")
}
