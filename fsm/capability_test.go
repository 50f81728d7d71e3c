package fsm_test

import (
	"fmt"
	"testing"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (b *bed) permissions(instance, provider string, want ...string) {
	b.t.Helper()
	a, ok := b.s.View().Assignment(instance, provider)
	if ok != (len(want) > 0) {
		b.t.Errorf("assignment of %s to %s: %v", instance, provider, a)
	}
	same(b.t, "permissions of "+instance, a.GetPermissions(), want...)
}

func capabilityBed(t *testing.T) *bed {
	b := newBed(t)
	b.module()
	b.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	b.run("a", "")
	b.run("b", "")
	b.news()
	return b
}

func TestAssigningAddsPermissions(t *testing.T) {
	b := capabilityBed(t)
	both := []string{"a-1", "b-1"}
	same(t, "changed", b.do(&pb.AssignCapabilityCommand{InstanceIds: both, Grant: grant("kv", "kv:write", "kv:read")}).GetIds(), both...)
	b.tells("CAPABILITY_ASSIGNED a-1/kv: kv:read kv:write", "CAPABILITY_ASSIGNED b-1/kv: kv:read kv:write")
	old, _ := b.s.View().Assignment("a-1", "kv")
	if old.GetBucket() != "a" || old.GetCorrelationId() != "call-1" {
		t.Errorf("got %v", old)
	}
	b.do(&pb.AssignCapabilityCommand{InstanceIds: []string{"a-1"}, Grant: grant("kv", "kv:delete")})
	b.permissions("a-1", "kv", "kv:delete", "kv:read", "kv:write")
	b.permissions("b-1", "kv", "kv:read", "kv:write")
	same(t, "the record before", old.GetPermissions(), "kv:read", "kv:write")
	b.news()

	b.do(&pb.AssignCapabilityCommand{InstanceIds: both, Grant: grant("kv", "kv:read")})
	b.tells()
	b.do(&pb.AssignCapabilityCommand{InstanceIds: both, Grant: &pb.CapabilityGrant{Provider: "kv", Bucket: "shared"}})
	if a, _ := b.s.View().Assignment("a-1", "kv"); a.GetBucket() != "shared" {
		t.Errorf("bucket %q", a.GetBucket())
	}
	b.do(&pb.AssignCapabilityCommand{InstanceIds: both, Grant: grant("kv", "kv:cas")})
	if a, _ := b.s.View().Assignment("a-1", "kv"); a.GetBucket() != "shared" {
		t.Errorf("a grant without bucket changed it to %q", a.GetBucket())
	}
	if n := len(b.s.View().AssignmentsByProvider(nil, "kv")); n != 2 {
		t.Errorf("%d assignments use the provider", n)
	}
}

func TestRevokingTakesPermissions(t *testing.T) {
	b := capabilityBed(t)
	both := []string{"a-1", "b-1"}
	b.do(&pb.AssignCapabilityCommand{InstanceIds: both, Grant: grant("kv", "kv:read", "kv:write")})
	b.news()
	revoke := func(permissions ...string) *pb.RevokeCapabilityCommand {
		return &pb.RevokeCapabilityCommand{InstanceIds: both, ProviderId: "kv", Permissions: permissions}
	}
	old, _ := b.s.View().Assignment("a-1", "kv")
	b.do(revoke("kv:write", "kv:nothing"))
	b.permissions("a-1", "kv", "kv:read")
	same(t, "the record before", old.GetPermissions(), "kv:read", "kv:write")
	b.tells("CAPABILITY_REVOKED a-1/kv: kv:nothing kv:write", "CAPABILITY_REVOKED b-1/kv: kv:nothing kv:write")

	if e := b.refuse(invalid, revoke("kv:wirte")); e.GetDetails()["granted"] != "kv:read" {
		t.Errorf("got %v", e)
	}
	b.do(&pb.RevokeCapabilityCommand{InstanceIds: []string{"a-1"}, ProviderId: "kv"})
	b.permissions("a-1", "kv")
	same(t, "who lost something", b.do(revoke("kv:read")).GetIds(), "b-1")
	b.permissions("b-1", "kv")
	b.refuse(invalid, revoke())
}

func TestCapabilityCommandsAreRefused(t *testing.T) {
	b := capabilityBed(t)
	one := []string{"a-1"}
	b.refuse(noProvider, &pb.AssignCapabilityCommand{InstanceIds: one, Grant: grant("nothing", "kv:read")})
	b.refuse(noProvider, &pb.AssignCapabilityCommand{InstanceIds: one})
	b.refuse(noProvider, &pb.RevokeCapabilityCommand{InstanceIds: one, ProviderId: "nothing"})
	b.refuse(invalid, &pb.AssignCapabilityCommand{Grant: grant("kv", "kv:read")})
	b.refuse(invalid, &pb.AssignCapabilityCommand{InstanceIds: one, Grant: grant("kv", "")})
	var many []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("kv:read:%d", i))
	}
	b.do(&pb.AssignCapabilityCommand{InstanceIds: one, Grant: grant("kv", many...)})
	for i := range many {
		many[i] += "/more"
	}
	b.refuse(exhausted, &pb.AssignCapabilityCommand{InstanceIds: []string{"b-1", "a-1"}, Grant: grant("kv", many...)})
}
