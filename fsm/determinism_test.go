package fsm_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// history is one log and what a first state made of it, entry by entry.
type history struct {
	log     []*raft.Log
	hashes  map[uint64]string
	answers map[uint64]*pb.CommandResult
	final   []byte
}

// TestEveryPeerComesToTheSameState applies a random log in three ways: entry by
// entry, in batches between other entries, and through a snapshot in the middle.
func TestEveryPeerComesToTheSameState(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		roll := dice(func(n int) int { return rapid.IntRange(0, n-1).Draw(rt, "roll") })
		h := record(t, rt, roll)
		inBatches(t, rt, roll, h)
		throughSnapshot(t, rt, roll, h)
	})
}

// record lets a first state guide the generator and checks the invariants after
// each command.
func record(t *testing.T, rt *rapid.T, roll dice) *history {
	h := &history{hashes: map[uint64]string{}, answers: map[uint64]*pb.CommandResult{}}
	s, gen, check := fsm.New(), &generator{roll: roll}, newInvariants()
	held, heldDump := s.View(), []byte(nil)
	index := uint64(0)
	for range rapid.IntRange(10, 80).Draw(rt, "commands") {
		index++
		for roll.chance(5) {
			h.log = append(h.log, &raft.Log{Index: index, Type: raft.LogConfiguration})
			index += uint64(roll(3)) + 1
		}
		cmd := gen.next(s.View())
		e := entry(t, index, cmd)
		h.log = append(h.log, e)
		decoded, err := fsm.DecodeCommand(e.Data)
		if err != nil {
			rt.Fatal(err)
		}
		before := s.View()
		res := s.Apply(index, decoded)
		h.answers[index], h.hashes[index] = res, s.View().Hash()
		if res.GetError() != nil {
			refusalChangesNothing(rt, before, s.View(), cmd)
		}
		check.hold(rt, s.View())
		if roll.chance(3) || heldDump == nil {
			held, heldDump = s.View(), dump(t, s)
		}
	}
	if !bytes.Equal(heldDump, dumpView(t, s, held)) {
		rt.Fatalf("the view at index %d changed", held.Index())
	}
	h.final = dump(t, s)
	return h
}

// refusalChangesNothing: every record is the very same as before.
func refusalChangesNothing(rt *rapid.T, before, after fsm.View, cmd *pb.Command) {
	_, was := before.EventBounds()
	_, is := after.EventBounds()
	same := was == is && slices.Equal(before.Nodes(nil), after.Nodes(nil)) &&
		slices.Equal(before.Peers(nil), after.Peers(nil)) &&
		slices.Equal(before.Modules(nil), after.Modules(nil)) &&
		slices.Equal(before.Instances(nil), after.Instances(nil)) &&
		slices.Equal(before.Providers(nil), after.Providers(nil))
	for _, p := range before.Providers(nil) {
		same = same && slices.Equal(before.AssignmentsByProvider(nil, p.GetId()), after.AssignmentsByProvider(nil, p.GetId()))
	}
	if !same {
		rt.Fatalf("%v was refused and changed the state", cmd)
	}
}

func inBatches(t *testing.T, rt *rapid.T, roll dice, h *history) {
	s := fsm.New()
	m := fsm.NewRaftFSM(s, func(err error) { rt.Fatal(err) })
	for at := 0; at < len(h.log); {
		end := min(len(h.log), at+1+roll(20))
		h.same(rt, "in batches", s, h.log[at:end], m.ApplyBatch(h.log[at:end]))
		at = end
	}
	if !bytes.Equal(h.final, dump(t, s)) {
		rt.Fatal("in batches the state differs")
	}
}

func throughSnapshot(t *testing.T, rt *rapid.T, roll dice, h *history) {
	s := fsm.New()
	m := fsm.NewRaftFSM(s, func(err error) { rt.Fatal(err) })
	at := roll(len(h.log)) + 1
	m.ApplyBatch(h.log[:at])
	data := dump(t, s)
	s = fsm.New()
	m = fsm.NewRaftFSM(s, func(err error) { rt.Fatal(err) })
	restoreInto(t, s, data)
	newInvariants().hold(rt, s.View())
	for _, e := range h.log[at:] {
		h.same(rt, "through a snapshot", s, []*raft.Log{e}, []any{m.Apply(e)})
	}
	if !bytes.Equal(h.final, dump(t, s)) {
		rt.Fatal("through a snapshot the state differs")
	}
}

// same compares answers and the hash with those of the first state.
func (h *history) same(rt *rapid.T, how string, s *fsm.State, log []*raft.Log, answers []any) {
	for i, e := range log {
		want, isCommand := h.answers[e.Index]
		got, _ := answers[i].(*pb.CommandResult)
		if isCommand && got.String() != want.String() {
			rt.Fatalf("%s the answer at %d is %v, not %v", how, e.Index, got, want)
		}
	}
	v := s.View()
	if want, ok := h.hashes[v.Index()]; ok && v.Hash() != want {
		rt.Fatalf("%s the hash at %d is %s, not %s", how, v.Index(), v.Hash(), want)
	}
}

// invariants holds what must be true of every state, and between two of them.
type invariants struct {
	placements map[string]*pb.Placement
}

func newInvariants() *invariants { return &invariants{placements: map[string]*pb.Placement{}} }

func (c *invariants) hold(rt *rapid.T, v fsm.View) {
	counts := map[string]int{}
	for _, in := range v.Instances(nil) {
		if fsm.Occupies(in) {
			counts[in.GetPlacement().GetNodeId()]++
			c.onLiveEpoch(rt, v, in)
		}
		if in.GetLeaving() && !fsm.Occupies(in) {
			rt.Fatalf("what is nowhere leaves: %v", in)
		}
		if in.GetStatus().GetUsage() != nil {
			rt.Fatalf("usage is stored: %v", in)
		}
		if fsm.Placed(in) && in.GetStatus().GetGeneration() != in.GetPlacement().GetGeneration() {
			rt.Fatalf("the status is of another generation than the placement: %v", in)
		}
		c.generations(rt, in.GetId(), in.GetPlacement())
	}
	hosted := map[string]bool{}
	for _, p := range v.Providers(nil) {
		c.generations(rt, fsm.ReplicaName(p.GetId(), p.GetReplica()), p.GetPlacement())
		place := p.GetId() + " on " + p.GetPlacement().GetNodeId()
		if fsm.ProviderPlaced(p) && hosted[place] {
			rt.Fatalf("two replicas of %s", place)
		}
		hosted[place] = true
		if n := len(v.ProviderReplicas(p.GetId())); n != int(fsm.Replicas(p.GetSpec())) || int(p.GetReplica()) >= n {
			rt.Fatalf("%d replicas, one is %v", n, p)
		}
		n, _ := v.Node(p.GetPlacement().GetNodeId())
		lost := p.GetStatus().GetState() == pb.ProviderState_PROVIDER_STATE_LOST
		if fsm.ProviderPlaced(p) && p.GetDesiredRunning() && lost == fsm.Ready(n) {
			rt.Fatalf("provider %v on node %v", p, n)
		}
		for _, a := range v.AssignmentsByProvider(nil, p.GetId()) {
			if _, ok := v.Instance(a.GetInstanceId()); !ok || a.GetBucket() == "" || !slices.IsSorted(a.GetSubscriptions()) {
				rt.Fatalf("assignment %v", a)
			}
		}
	}
	for _, in := range v.Instances(nil) {
		for _, a := range v.AssignmentsByInstance(nil, in.GetId()) {
			if _, ok := v.Provider(a.GetProviderId()); !ok {
				rt.Fatalf("assignment %v of a provider that does not exist", a)
			}
		}
	}
	for _, n := range v.Nodes(nil) {
		if got := v.InstanceCount(n.GetId()); got != counts[n.GetId()] {
			rt.Fatalf("node %s counts %d instances, %d take room there", n.GetId(), got, counts[n.GetId()])
		}
	}
	oldest, newest := v.EventBounds()
	for i, e := range v.Events(0, 0) {
		if e.GetSequence() != oldest+uint64(i) || e.GetSequence() > newest {
			rt.Fatalf("event %d of %d to %d is %v", i, oldest, newest, e)
		}
	}
}

// onLiveEpoch: what takes room on a node was placed in the node's live epoch.
func (c *invariants) onLiveEpoch(rt *rapid.T, v fsm.View, in *pb.Instance) {
	n, ok := v.Node(in.GetPlacement().GetNodeId())
	if !ok || !fsm.Ready(n) || n.GetEpoch() != in.GetPlacement().GetNodeEpoch() {
		rt.Fatalf("%v is placed on %v", in, n)
	}
}

// generations: the number never goes down, and one number never means two places.
func (c *invariants) generations(rt *rapid.T, id string, now *pb.Placement) {
	before := c.placements[id]
	switch {
	case now.GetGeneration() < before.GetGeneration() && now != nil:
		rt.Fatalf("%s went from %v to %v", id, before, now)
	case now.GetGeneration() == before.GetGeneration() && now.GetNodeId() != "" && before.GetNodeId() != "" &&
		(now.GetNodeId() != before.GetNodeId() || now.GetNodeEpoch() != before.GetNodeEpoch()):
		rt.Fatalf("%s is in two places in one generation: %v and %v", id, before, now)
	}
	if now.GetNodeId() != "" || now.GetGeneration() > before.GetGeneration() {
		c.placements[id] = now
	}
}

// TestTheHashShowsWhatDiffers: two states that differ in one record of any table
// have different hashes, so a peer that went astray is noticed.
func TestTheHashShowsWhatDiffers(t *testing.T) {
	other := workload("x", "")
	other.Stdin = []byte("other")
	sample := furnished(t)
	for name, pair := range map[string][2]*pb.Command{
		"node":         {command(&pb.RegisterNodeCommand{Info: nodeInfo("n8")}), command(&pb.RegisterNodeCommand{Info: nodeInfo("n9")})},
		"peer":         {command(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p8"}}), command(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p9"}})},
		"no peer":      {command(&pb.RemovePeerCommand{PeerId: "p1"}), command(&pb.RemovePeerCommand{PeerId: "p9"})},
		"module":       {command(&pb.PutModuleCommand{Module: &pb.Module{Digest: "d", SizeBytes: 1}}), command(&pb.PutModuleCommand{Module: &pb.Module{Digest: "d", SizeBytes: 2}})},
		"spec":         {command(create("x")), command(&pb.CreateInstancesCommand{Spec: other, InstanceIds: []string{"x-1"}})},
		"instance":     {command(&pb.StopInstancesCommand{InstanceIds: []string{"w-1"}}), command(&pb.StopInstancesCommand{InstanceIds: []string{"nobody"}})},
		"provider":     {command(&pb.SetProviderRunningCommand{ProviderId: "kv"}), command(&pb.SetProviderRunningCommand{ProviderId: "kv", Running: true})},
		"assignment":   {command(&pb.AssignCapabilityCommand{InstanceIds: []string{"w-1"}, Grant: &pb.CapabilityGrant{Provider: "kv", Bucket: "a"}}), command(&pb.AssignCapabilityCommand{InstanceIds: []string{"w-1"}, Grant: &pb.CapabilityGrant{Provider: "kv", Bucket: "b"}})},
		"event":        {{CorrelationId: "a", Payload: command(&pb.DrainNodeCommand{NodeId: "n1", Draining: true}).Payload}, {CorrelationId: "b", Payload: command(&pb.DrainNodeCommand{NodeId: "n1", Draining: true}).Payload}},
		"answer":       {request("a", "d", &pb.RemovePeerCommand{}), request("b", "d", &pb.RemovePeerCommand{})},
		"session":      {sessionOf("s8"), sessionOf("s9")},
		"sequence":     {numbered("s1", 8, 1, &pb.RemovePeerCommand{}), numbered("s1", 9, 1, &pb.RemovePeerCommand{})},
		"outstanding":  {numbered("s1", 200, 180, &pb.RemovePeerCommand{}), numbered("s1", 200, 190, &pb.RemovePeerCommand{})},
		"replica":      {command(&pb.UpdateProviderCommand{Spec: bus("bus", 3)}), command(&pb.UpdateProviderCommand{Spec: bus("bus", 4)})},
		"grace":        {command(&pb.SetProviderRunningCommand{ProviderId: "bus", Grace: durationpb.New(1)}), command(&pb.SetProviderRunningCommand{ProviderId: "bus", Grace: durationpb.New(2)})},
		"calls":        {command(sample.inFlight(1)), command(sample.inFlight(2))},
		"subscription": {command(sample.subscription("w-1", "bus", "a", true)), command(sample.subscription("w-1", "bus", "b", true))},
		"ended":        {command(sample.subscription("w-1", "bus", "orders.*", false)), command(sample.subscription("w-1", "bus", "other", false))},
		"denial":       {command(sample.refused("kv:write:a")), command(sample.refused("kv:write:b"))},
		"nothing":      {command(&pb.RemovePeerCommand{}), nil},
	} {
		var hashes [2]string
		for i, cmd := range pair {
			b := furnished(t)
			if cmd != nil {
				b.send(cmd)
			}
			hashes[i] = b.s.View().Hash()
		}
		if hashes[0] == hashes[1] {
			t.Errorf("%s: the hash does not show it", name)
		}
	}
}

// inFlight is a report on the messaging provider of a furnished state.
func (b *bed) inFlight(calls uint32) *pb.ReportStatusRequest {
	p := b.replica("bus", 1)
	return &pb.ReportStatusRequest{NodeId: "n1", Epoch: 1, Providers: []*pb.ProviderReport{{
		ProviderId: "bus", Replica: 1, Status: &pb.ProviderStatus{
			State: pb.ProviderState_PROVIDER_STATE_DRAINING, Generation: p.GetPlacement().GetGeneration(), CallsInFlight: calls,
		},
	}}}
}

// refused is a report that an instance was refused something.
func (b *bed) refused(need string) *pb.ReportStatusRequest {
	return b.denials("n1", &pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: need, Count: 1})
}

// TestTheGeneratorReachesEverything keeps the test above honest: random logs
// must meet every command, most states and most refusals.
func TestTheGeneratorReachesEverything(t *testing.T) {
	done, refused, kinds, states := map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	for seed := range uint64(20) {
		s, gen := fsm.New(), &generator{roll: func(n int) int {
			seed = seed*6364136223846793005 + 1442695040888963407
			return int((seed >> 33) % uint64(n))
		}}
		for index := uint64(1); index <= 300; index++ {
			cmd := gen.next(s.View())
			name := fmt.Sprintf("%T", cmd.GetPayload())
			if res := s.Apply(index, cmd); res.GetError() == nil {
				done[name]++
			} else {
				refused[res.GetError().GetCode().String()]++
			}
			for _, in := range s.View().Instances(nil) {
				states[in.GetStatus().GetState().String()]++
			}
		}
		for _, e := range s.View().Events(0, 0) {
			kinds[e.GetKind().String()]++
		}
	}
	for what, c := range map[string]struct {
		got  map[string]int
		want int
	}{
		"commands": {done, 21}, "refusals": {refused, 7}, "events": {kinds, 29}, "states": {states, 11},
	} {
		if len(c.got) < c.want {
			t.Errorf("%d kinds of %s, want %d: %v", len(c.got), what, c.want, c.got)
		}
	}
}
