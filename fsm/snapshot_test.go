package fsm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"slices"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func restoreInto(t testing.TB, s *fsm.State, snapshot []byte) {
	t.Helper()
	if err := s.Restore(bytes.NewReader(snapshot)); err != nil {
		t.Fatal(err)
	}
}

// compose writes a snapshot of records with the trailer they call for.
func compose(t testing.TB, recs ...*pb.SnapshotRecord) []byte {
	t.Helper()
	var out []byte
	add := func(rec *pb.SnapshotRecord) {
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.AppendUvarint(out, uint64(len(body))), body...)
	}
	for _, rec := range recs {
		add(rec)
	}
	add(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Trailer{Trailer: &pb.SnapshotTrailer{
		Records: uint64(len(recs)), Crc32C: crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli)),
	}}})
	return out
}

// furnished is a state with a record in every table.
func furnished(t testing.TB) *bed {
	b := newBed(t)
	b.module()
	b.do(&pb.PutPeerCommand{Peer: &pb.Peer{Id: "p1", RaftAddress: "a:1", ApiAddress: "a:2"}})
	b.node("n1", kv("kv"))
	b.node("n2")
	b.running("w", "", "n1", grant("kv", "kv:read"))
	b.running("v", "always", "n2", grant("kv", "kv:write"))
	b.run("waits", "")
	b.do(&pb.RegisterProviderCommand{Spec: bus("bus", 2)})
	b.placeReplica("bus", 1, "n1")
	b.do(&pb.AssignCapabilityCommand{InstanceIds: []string{"w-1"}, Grant: grant("bus", "msg:subscribe")})
	b.do(b.subscription("w-1", "bus", "orders.*", true))
	b.do(b.denials("n1", &pb.DenialReport{InstanceId: "w-1", ProviderId: "kv", Need: "kv:write:a", Count: 2}))
	b.send(request("r1", "d", create("u")))
	b.send(request("r2", "d", create("u")))
	b.expire("n2", 1)
	b.do(&pb.InitClusterCommand{ClusterId: "c-1"})
	b.session("s1")
	b.send(numbered("s1", 1, 1, create("s")))
	b.told, _ = b.s.View().EventBounds()
	return b
}

func TestARestoredStateIsTheSameState(t *testing.T) {
	b := furnished(t)
	other := &bed{t: t, s: fsm.New(), index: b.index}
	other.node("gone") // what was there before is replaced
	data := dump(t, b.s)
	restoreInto(t, other.s, data)
	if !bytes.Equal(data, dump(t, other.s)) {
		t.Error("the restored state differs")
	}
	other.index = b.index
	for _, bed := range []*bed{b, other} {
		bed.send(request("r1", "d", create("u")))
		bed.send(numbered("s1", 1, 1, create("s")))
		bed.send(numbered("s1", 2, 2, create("r")))
		bed.place("v-1", "n1")
		bed.node("n2")
		bed.report("w-1", state("COMPLETED"), 1)
	}
	v, w := b.s.View(), other.s.View()
	if v.Hash() != w.Hash() || v.Index() != w.Index() || !v.Time().Equal(w.Time()) {
		t.Errorf("after the same commands: %d %s and %d %s", v.Index(), v.Hash(), w.Index(), w.Hash())
	}
	if !bytes.Equal(dump(t, b.s), dump(t, other.s)) {
		t.Error("after the same commands the states differ")
	}
	if v.InstanceCount("n1") != 1 || w.InstanceCount("n1") != 1 {
		t.Errorf("n1 counts %d and %d", v.InstanceCount("n1"), w.InstanceCount("n1"))
	}
}

func TestAnEmptyStateHasASnapshot(t *testing.T) {
	b := furnished(t)
	restoreInto(t, b.s, dump(t, fsm.New()))
	if v := b.s.View(); v.Index() != 0 || len(v.Instances(nil)) != 0 || v.InstanceCount("n1") != 0 {
		t.Errorf("index %d, instances %v", v.Index(), v.Instances(nil))
	}
}

func TestReplicasShareTheirSpecAfterARestore(t *testing.T) {
	b := newBed(t)
	b.module()
	spec := workload("w", "")
	spec.Replicas = 3
	b.do(&pb.CreateInstancesCommand{Spec: spec, InstanceIds: []string{"w-1", "w-2", "w-3"}})
	b.run("v", "")
	restoreInto(t, b.s, dump(t, b.s))
	ins := b.s.View().Instances(nil)
	if ins[1].GetSpec() != ins[2].GetSpec() || ins[2].GetSpec() != ins[3].GetSpec() || ins[0].GetSpec() == ins[1].GetSpec() {
		t.Error("replicas hold copies of their spec, or another workload's")
	}
}

func TestASnapshotIsOfItsView(t *testing.T) {
	b := furnished(t)
	v := b.s.View()
	before := dump(t, b.s)
	b.do(&pb.RemoveInstancesCommand{InstanceIds: []string{"w-1"}, Force: true})
	if !bytes.Equal(before, dumpView(t, b.s, v)) {
		t.Error("a later command shows in the snapshot")
	}
}

func TestInspectingASnapshot(t *testing.T) {
	b := furnished(t)
	data := dump(t, b.s)
	header, err := fsm.InspectSnapshot(bytes.NewReader(data))
	if err != nil || header.GetIndex() != b.index || header.GetFormat() != 3 {
		t.Errorf("got %v, %v", header, err)
	}
	if _, err := fsm.InspectSnapshot(bytes.NewReader(data[:len(data)-1])); !errors.Is(err, fsm.ErrBadSnapshot) {
		t.Errorf("got %v", err)
	}
}

func TestADamagedSnapshotIsNeverSilent(t *testing.T) {
	data := dump(t, furnished(t).s)
	target := furnished(t)
	target.node("mine")
	mine := dump(t, target.s)
	check := func(what string, at int, damaged []byte) {
		t.Helper()
		if _, err := fsm.InspectSnapshot(bytes.NewReader(damaged)); !isBad(err) {
			t.Fatalf("%s at %d of %d: got %v", what, at, len(data), err)
		}
		if at%37 != 0 {
			return
		}
		if err := target.s.Restore(bytes.NewReader(damaged)); !isBad(err) {
			t.Fatalf("%s at %d of %d: got %v", what, at, len(data), err)
		}
		if !bytes.Equal(mine, dump(t, target.s)) {
			t.Fatalf("%s at %d of %d changed the state", what, at, len(data))
		}
	}
	for at := range data {
		check("cut off", at, data[:at])
		check("a byte doubled", at, slices.Insert(slices.Clone(data), at, data[at]))
		check("a byte lost", at, slices.Delete(slices.Clone(data), at, at+1))
		for _, bit := range []int{0, 7, at % 8} {
			damaged := slices.Clone(data)
			damaged[at] ^= 1 << bit
			check("a bit flipped", at, damaged)
		}
	}
	check("more data", 0, append(slices.Clone(data), 0))
	check("twice", 0, append(slices.Clone(data), data...))
	// The failed restores left a state that goes on.
	target.do(&pb.DrainNodeCommand{NodeId: "mine", Draining: true})
}

func isBad(err error) bool {
	return errors.Is(err, fsm.ErrBadSnapshot) || errors.Is(err, fsm.ErrSnapshotFormat)
}

func TestASnapshotThatNoPeerWroteIsRefused(t *testing.T) {
	good := parse(t, dump(t, furnished(t).s))
	good = good[:len(good)-1]
	find := slices.IndexFunc[[]*pb.SnapshotRecord]
	event := func(r *pb.SnapshotRecord) bool { return r.GetEvent() != nil }
	node := func(r *pb.SnapshotRecord) bool { return r.GetNode() != nil }
	for name, c := range map[string]struct {
		want error
		edit func([]*pb.SnapshotRecord) []*pb.SnapshotRecord
	}{
		"none": {nil, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord { return r }},
		"another format": {fsm.ErrSnapshotFormat, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[0].GetHeader().Format = 4
			return r
		}},
		"no header": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord { return r[1:] }},
		"two headers": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			return slices.Insert(r, 1, r[0])
		}},
		"a short hash": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[0].GetHeader().StateHash = []byte("short")
			return r
		}},
		"an impossible time": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[0].GetHeader().Time.Nanos = -1
			return r
		}},
		"a record twice": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			at := find(r, node)
			return slices.Insert(r, at, r[at])
		}},
		"records swapped": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			at := find(r, node)
			r[at], r[at+1] = r[at+1], r[at]
			return r
		}},
		"tables swapped": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			return append(r, r[find(r, node)])
		}},
		"a missing event": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			at := find(r, event) + 1
			return slices.Delete(r, at, at+1)
		}},
		"another last event": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[0].GetHeader().EventSequence++
			return r
		}},
		"no events": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			return slices.DeleteFunc(r, event)
		}},
		"a record without a key": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[find(r, node)].GetNode().Id = ""
			return r
		}},
		"an assignment without a provider": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[find(r, func(r *pb.SnapshotRecord) bool { return r.GetAssignment() != nil })].GetAssignment().ProviderId = ""
			return r
		}},
		"an answer without a result": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[len(r)-1].GetDedup().Result = nil
			return r
		}},
		"an answer of no session": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			return slices.DeleteFunc(r, func(r *pb.SnapshotRecord) bool { return r.GetSession() != nil })
		}},
		"the first format": {nil, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			r[0].GetHeader().Format, r[0].GetHeader().ClusterId = 1, ""
			return slices.DeleteFunc(r, func(r *pb.SnapshotRecord) bool {
				return r.GetSession() != nil || r.GetDedup().GetSessionId() != ""
			})
		}},
		"a replica twice": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			at := find(r, func(r *pb.SnapshotRecord) bool { return r.GetProvider().GetReplica() == 1 })
			r[at].GetProvider().Replica = 0
			return r
		}},
		"an empty record": {fsm.ErrBadSnapshot, func(r []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			return append(r, &pb.SnapshotRecord{})
		}},
	} {
		var recs []*pb.SnapshotRecord
		for _, r := range good {
			recs = append(recs, proto.CloneOf(r))
		}
		if err := fsm.New().Restore(bytes.NewReader(compose(t, c.edit(recs)...))); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestErrorsOfReadersAndWritersComeBack(t *testing.T) {
	b := furnished(t)
	data := dump(t, b.s)
	broken := errors.New("disk gone")
	for _, r := range []io.Reader{
		iotest.ErrReader(broken),
		io.MultiReader(bytes.NewReader(data[:len(data)/2]), iotest.ErrReader(broken)),
		io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken)),
	} {
		if err := b.s.Restore(r); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	}
	if !bytes.Equal(data, dump(t, b.s)) {
		t.Error("a failed restore changed the state")
	}
	if err := b.s.Restore(iotest.OneByteReader(bytes.NewReader(data))); err != nil {
		t.Errorf("byte by byte: %v", err)
	}
	for _, n := range []int{0, 10, len(data) - 1} {
		if err := b.s.WriteSnapshot(b.s.View(), &fullDisk{left: n, err: broken}); !errors.Is(err, broken) {
			t.Errorf("a disk with room for %d bytes: got %v", n, err)
		}
	}
}

type fullDisk struct {
	left int
	err  error
}

func (d *fullDisk) Write(p []byte) (int, error) {
	n := min(len(p), d.left)
	d.left -= n
	if n < len(p) {
		return n, d.err
	}
	return n, nil
}
