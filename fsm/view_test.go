package fsm_test

import (
	"bytes"
	"fmt"
	"sync"
	"testing"

	"github.com/hashicorp/go-memdb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestModulesAreRecordedOnce(t *testing.T) {
	b := newBed(t)
	b.refuse(invalid, &pb.PutModuleCommand{})
	b.module()
	b.tells("MODULE_UPLOADED " + digest + ": hello.wasm")
	m, ok := b.s.View().Module(digest)
	if !ok || m.GetCreatedIndex() != b.index || !m.GetCreatedAt().AsTime().Equal(b.now()) {
		t.Errorf("got %v", m)
	}
	same(t, "ids", b.do(&pb.PutModuleCommand{Module: &pb.Module{Digest: digest, Name: "other"}}).GetIds(), digest)
	b.tells()
	if again, _ := b.s.View().Module(digest); again != m || len(b.s.View().Modules(nil)) != 1 {
		t.Errorf("got %v", again)
	}
}

func TestPeersComeAndGo(t *testing.T) {
	b := newBed(t)
	b.refuse(invalid, &pb.PutPeerCommand{})
	b.refuse(noNode, &pb.RemovePeerCommand{PeerId: "p1"})
	b.do(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p2", RaftAddress: "a:1", ApiAddress: "a:2", ModifiedIndex: 77}})
	b.do(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p1", RaftAddress: "b:1", ApiAddress: "b:2"}})
	peers := b.s.View().Peers(nil)
	if len(peers) != 2 || peers[0].GetId() != "p1" || peers[1].GetModifiedIndex() != 2+1 {
		t.Errorf("got %v", peers)
	}
	at := peers[0].GetModifiedIndex()
	b.do(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p1", RaftAddress: "b:1", ApiAddress: "b:2"}})
	if p, _ := b.s.View().Peer("p1"); p.GetModifiedIndex() != at {
		t.Error("the same addresses changed the record")
	}
	b.do(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p1", RaftAddress: "c:1", ApiAddress: "b:2"}})
	if p, _ := b.s.View().Peer("p1"); p.GetRaftAddress() != "c:1" {
		t.Errorf("got %v", p)
	}
	b.do(&pb.RemovePeerCommand{PeerId: "p1"})
	if _, ok := b.s.View().Peer("p1"); ok {
		t.Error("the peer is still there")
	}
}

func TestACommandWithoutPayloadIsRefused(t *testing.T) {
	b := newBed(t)
	if got := b.send(&pb.Command{}).GetError(); got.GetCode() != invalid {
		t.Errorf("got %v", got)
	}
}

func TestResolving(t *testing.T) {
	b := newBed(t)
	b.module()
	spec := workload("hello", "")
	spec.Replicas = 2
	b.do(&pb.CreateInstancesCommand{Spec: spec, InstanceIds: []string{"hello-k3f9x", "hello-7p2mq"}})
	b.do(&pb.CreateInstancesCommand{Spec: workload("hell", ""), InstanceIds: []string{"hell-aaaaa"}})
	b.do(&pb.CreateInstancesCommand{Spec: workload("hello-k3f9x", ""), InstanceIds: []string{"hello-k3f9x-bbbbb"}})
	v := b.s.View()
	for _, c := range []struct {
		target string
		want   []string
		code   pb.ErrorCode
	}{
		{"hello-k3f9x", []string{"hello-k3f9x"}, 0}, // an id comes before a name
		{"hello", []string{"hello-7p2mq", "hello-k3f9x"}, 0},
		{"hell", []string{"hell-aaaaa"}, 0},
		{"hello-7", []string{"hello-7p2mq"}, 0},
		{"hello-", nil, invalid},
		{"hel", nil, invalid},
		{"nobody", nil, noInstance},
		{"hello\x00", nil, noInstance},
		{"", nil, invalid},
	} {
		got, e := v.Resolve(c.target)
		if e.GetCode() != c.code {
			t.Errorf("%q: got %v", c.target, e)
		}
		same(t, c.target, ids(got), c.want...)
	}
	if _, e := v.Resolve("hello-"); e.GetDetails()["matches"] != "hello-7p2mq, hello-k3f9x, hello-k3f9x-bbbbb" {
		t.Errorf("got %v", e)
	}
}

func TestPagesOfInstances(t *testing.T) {
	b := newBed(t)
	b.module()
	for i := range 5 {
		b.run(fmt.Sprintf("w%d", i), "")
	}
	b.run("w1-1x", "") // its id begins with another's
	v := b.s.View()
	same(t, "from the start", ids(v.InstancesAfter("", 2)), "w0-1", "w1-1")
	same(t, "the next page", ids(v.InstancesAfter("w1-1", 2)), "w1-1x-1", "w2-1")
	same(t, "after one that is gone", ids(v.InstancesAfter("w3", 0)), "w3-1", "w4-1")
	same(t, "past the end", ids(v.InstancesAfter("w4-1", 10)))
	same(t, "by prefix", ids(v.InstancesByPrefix("w1-1", 1)), "w1-1")
	same(t, "all", ids(v.Instances(nil)), "w0-1", "w1-1", "w1-1x-1", "w2-1", "w3-1", "w4-1")
}

func TestEventsAreBoundedAndWithoutGaps(t *testing.T) {
	b := newBed(t)
	if oldest, newest := b.s.View().EventBounds(); oldest != 0 || newest != 0 {
		t.Errorf("a new state has events %d to %d", oldest, newest)
	}
	b.node("n1")
	early := b.s.View()
	const extra = 50
	for i := 1; i < fsm.EventsKept+extra; i++ {
		b.index++
		b.s.Apply(b.index, command(&pb.DrainNodeCommand{NodeId: "n1", Draining: i%2 == 1}))
	}
	v := b.s.View()
	oldest, newest := v.EventBounds()
	if oldest != extra+1 || newest != fsm.EventsKept+extra {
		t.Fatalf("events %d to %d are kept", oldest, newest)
	}
	events := v.Events(0, 0)
	if len(events) != fsm.EventsKept {
		t.Fatalf("%d events are kept", len(events))
	}
	for i, e := range events {
		if e.GetSequence() != oldest+uint64(i) || e.GetIndex() != e.GetSequence() {
			t.Fatalf("event %d is %v", i, e)
		}
	}
	if got := v.Events(newest-3, 2); len(got) != 2 || got[0].GetSequence() != newest-2 {
		t.Errorf("got %v", got)
	}
	if got := v.Events(newest, 0); got != nil {
		t.Errorf("got %v", got)
	}
	if got := v.Events(1<<64-1, 0); got != nil {
		t.Errorf("got %v", got)
	}
	if got := early.Events(0, 0); len(got) != 1 {
		t.Errorf("an early view shows %d events", len(got))
	}
}

func TestFactsCarryTheCallThatCausedThem(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.run("w", "")
	duty := command(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{InstanceId: "w-1", NodeId: "n1", NodeEpoch: 1}}})
	duty.CorrelationId = "duty"
	b.send(duty)
	user := command(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}})
	user.CorrelationId = "user"
	b.send(user)
	restart := command(&pb.RestartInstancesCommand{InstanceIds: []string{"w-1"}})
	restart.CorrelationId = "user"
	b.send(restart)
	var got []string
	for _, e := range b.s.View().Events(0, 0) {
		got = append(got, e.GetCorrelationId())
	}
	same(t, "correlation ids", got, "call-1", "call-1", "call-1", "call-1", "user")
}

func TestAViewNeverChanges(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1", kv("kv"))
	b.running("w", "", "n1", grant("kv", "kv:read"))
	v := b.s.View()
	before := dumpView(t, b.s, v)
	b.report("w-1", state("CRASHED"), 1)
	b.do(&pb.AssignCapabilityCommand{InstanceIds: []string{"w-1"}, Grant: grant("kv", "kv:write")})
	b.do(&pb.UpdateProviderCommand{Spec: kv("kv")})
	b.expire("n1", 1)
	if !bytes.Equal(before, dumpView(t, b.s, v)) {
		t.Error("the view changed")
	}
	if v.InstanceCount("n1") != 1 || b.s.View().InstanceCount("n1") != 0 {
		t.Error("the count is not that of the view")
	}
}

func TestAViewIsSharedByReadersWhileTheStateGoesOn(t *testing.T) {
	b := furnished(t)
	v := b.s.View()
	want := dumpView(t, b.s, v)
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 20 {
				v.UnplacedInstances(memdb.NewWatchSet())
				v.Resolve("w")
				v.Events(0, 0)
				v.InstancesAfter("", 2)
				if !bytes.Equal(want, dumpView(t, b.s, v)) {
					t.Error("the view changed")
				}
			}
		})
	}
	for i := range 200 {
		b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: i%2 == 0})
	}
	readers.Wait()
}

// woken reports whether ch is closed. Apply and Restore wake before they return.
func woken(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestChangedWaitsForAnIndex(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	if !woken(b.s.Changed(0)) {
		t.Error("index 1 is there already")
	}
	next, far := b.s.Changed(1), b.s.Changed(2)
	if woken(next) || woken(far) {
		t.Error("woken too early")
	}
	b.node("n1")
	if !woken(next) {
		t.Error("index 2 is there")
	}
	if woken(far) {
		t.Error("index 3 is not there yet")
	}
	b.node("n1")
	if !woken(far) {
		t.Error("index 3 is there")
	}
}

func TestManyFutureWaitersShareAWake(t *testing.T) {
	b := newBed(t)
	b.node("n1")
	chans := make([]<-chan struct{}, 0, 5000)
	distinct := map[<-chan struct{}]bool{}
	for i := range uint64(5000) {
		ch := b.s.Changed(100 + i)
		chans = append(chans, ch)
		distinct[ch] = true
	}
	if len(distinct) > 1100 {
		t.Errorf("%d channels are held for waiters that may be gone", len(distinct))
	}
	next := b.s.Changed(1)
	b.node("n1")
	if !woken(next) || !woken(chans[4999]) {
		t.Error("a change did not wake those who share its wake")
	}
	if woken(chans[0]) {
		t.Error("an exact waiter was woken too early")
	}
}

func TestWatchesFireOnWhatTheyWatch(t *testing.T) {
	b := newBed(t)
	b.module()
	b.node("n1")
	b.node("n2")
	b.running("a", "", "n1")
	b.running("b", "", "n2")
	fires := func(ws memdb.WatchSet, change func()) bool {
		change()
		for ch := range ws {
			if woken(ch) {
				return true
			}
		}
		return false
	}
	ws := memdb.NewWatchSet()
	b.s.View().InstancesByNode(ws, "n1")
	if fires(ws, func() { b.report("b-1", state("CRASHED"), 1) }) {
		t.Error("a change on n2 woke who watches n1")
	}
	if !fires(ws, func() { b.report("a-1", state("CRASHED"), 1) }) {
		t.Error("a change on n1 woke nobody")
	}
	ws = memdb.NewWatchSet()
	b.s.View().UnplacedInstances(ws)
	if !fires(ws, func() { b.do(&pb.DrainNodeCommand{NodeId: "n1", Draining: true}) }) {
		t.Error("a drain woke no scheduler")
	}
	ws = memdb.NewWatchSet()
	b.s.View().UnplacedInstances(ws)
	if !fires(ws, func() { b.run("c", "") }) {
		t.Error("a new instance woke no scheduler")
	}
	ws = memdb.NewWatchSet()
	b.s.View().Instances(ws)
	data := dump(t, b.s)
	next := b.s.Changed(b.index)
	if !fires(ws, func() { restoreInto(t, b.s, data) }) {
		t.Error("a restore woke nobody")
	}
	if !woken(next) {
		t.Error("a restore woke nobody who waits for an index")
	}
}
