package fsm_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestRefusedCallsBecomeFacts(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.running("w", "", "n1")
	b.running("v", "", "n2")
	b.news()
	b.do(b.denials(
		"n1",
		&pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: "kv:write:a", Count: 2, CorrelationId: "first"},
		&pb.DenialReport{InstanceId: "w-1", Need: "msg:publish:x", Count: 1},
		&pb.DenialReport{InstanceId: "v-1", ProviderId: "kv", Need: "kv:read:a", Count: 1}, // not its own
		&pb.DenialReport{InstanceId: "nobody", ProviderId: "kv", Need: "kv:read:a", Count: 1},
		&pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: "kv:read:a"}, // none
		&pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: "kv:write:a", Count: 3, CorrelationId: "last"},
	))
	b.tells(
		"CAPABILITY_DENIED w-1/kv: kv:write:a was refused 5 times by provider kv",
		"CAPABILITY_DENIED w-1: msg:publish:x was refused once, no provider was granted",
	)
	var call string
	for _, e := range b.s.View().Events(0, 0) {
		if e.GetKind() == pb.EventKind_EVENT_KIND_CAPABILITY_DENIED && e.GetProviderId() == "kv" {
			call = e.GetCorrelationId()
		}
	}
	if call != "last" {
		t.Errorf("the fact is told under call %q", call)
	}
	stale := b.denials("n1", &pb.DenialReport{InstanceId: "w-1", Count: 1})
	b.expire("n1", 1)
	b.refuse(conflict, stale)
}

func TestRefusedCallsCannotPushOtherFactsOut(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.running("w", "", "n1")
	b.news()
	at := epochStart().Add(time.Hour)
	deny := func(first, n int, at time.Time) int {
		t.Helper()
		c := b.denials("n1")
		for i := range n {
			c.Denials = append(c.Denials, &pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: fmt.Sprintf("kv:read:%d", first+i), Count: 1})
		}
		cmd := command(c)
		cmd.Time = timestamppb.New(at)
		if res := b.send(cmd); res.GetError() != nil {
			t.Fatal(res.GetError())
		}
		return len(b.news())
	}
	if n := deny(0, 100, at); n != 100 {
		t.Errorf("%d facts", n)
	}
	// A peer that was restored meanwhile counts on.
	restoreInto(t, b.s, dump(t, b.s))
	if n := deny(100, 900, at.Add(30*time.Second)); n != fsm.DenialsPerMinute-100 {
		t.Errorf("%d facts", n)
	}
	events := b.s.View().Events(0, 0)
	if last := events[len(events)-1].GetMessage(); !strings.Contains(last, "not recorded") {
		t.Errorf("the last fact says %q", last)
	}
	if n := deny(0, 10, at.Add(59*time.Second)); n != 0 {
		t.Errorf("%d facts", n)
	}
	if n := deny(0, 10, at.Add(time.Minute)); n != 10 {
		t.Errorf("%d facts in the next minute", n)
	}
}

// The agent of a provider's node refuses calls that other nodes should not have
// let through: those are the ones that somebody must hear of.
func TestAProvidersNodeTellsOfCallsFromElsewhere(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", &pb.ProviderSpec{Id: "store", Type: "kv"})
	b.node("n2")
	b.running("v", "", "n2")
	b.news()
	b.do(b.denials("n1", &pb.DenialReport{InstanceId: "v-1", ProviderId: "store", Need: "kv:read:a", Count: 1}))
	b.tells("CAPABILITY_DENIED v-1/store: kv:read:a was refused once by provider store")
}
