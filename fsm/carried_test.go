package fsm

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// full is a state in which every field of the summary says something.
func full(t *testing.T) *State {
	s := New()
	at := timestamppb.New(time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC))
	for i, cmd := range []*pb.Command{
		{Payload: &pb.Command_InitCluster{InitCluster: &pb.InitClusterCommand{ClusterId: "c"}}},
		{Payload: &pb.Command_OpenSession{OpenSession: &pb.OpenSessionCommand{SessionId: "s", IdleTimeout: durationpb.New(time.Hour)}}},
		{RequestId: "r1", Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{Spec: &pb.ProviderSpec{Id: "kv", Type: "kv"}}}},
		{
			RequestId: "r2", Session: &pb.CommandSession{Id: "s", Sequence: 1},
			Payload: &pb.Command_RegisterProvider{RegisterProvider: &pb.RegisterProviderCommand{Spec: &pb.ProviderSpec{Id: "kv2", Type: "kv"}}},
		},
		{Payload: &pb.Command_PutModule{PutModule: &pb.PutModuleCommand{Module: &pb.Module{Digest: "d"}}}},
		{Payload: &pb.Command_RegisterNode{RegisterNode: &pb.RegisterNodeCommand{Info: &pb.NodeInfo{Id: "n"}}}},
		{Payload: &pb.Command_CreateInstances{CreateInstances: &pb.CreateInstancesCommand{
			Spec: &pb.WorkloadSpec{Name: "w", Module: "d"}, InstanceIds: []string{"w-1"},
		}}},
		{Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{InstanceId: "w-1", NodeId: "n", NodeEpoch: 1}}}}},
		{Payload: &pb.Command_ReportStatus{ReportStatus: &pb.ReportStatusRequest{
			NodeId: "n", Epoch: 1, Denials: []*pb.DenialReport{{InstanceId: "w-1", Count: 1}},
		}}},
	} {
		cmd.Time = at
		if res := s.Apply(uint64(i+1), cmd); res.GetError() != nil {
			t.Fatal(res)
		}
	}
	return s
}

// TestASnapshotCarriesEveryFieldOfTheSummary fails when somebody adds a field
// and forgets the snapshot.
func TestASnapshotCarriesEveryFieldOfTheSummary(t *testing.T) {
	s := full(t)
	var data bytes.Buffer
	if err := s.WriteSnapshot(s.View(), &data); err != nil {
		t.Fatal(err)
	}
	other := New()
	if err := other.Restore(&data); err != nil {
		t.Fatal(err)
	}
	was, is := reflect.ValueOf(s.sum), reflect.ValueOf(other.sum)
	for i := range was.NumField() {
		name := was.Type().Field(i).Name
		if was.Field(i).IsZero() {
			t.Errorf("summary.%s: this test does not set it", name)
		}
		if name == "time" {
			if !proto.Equal(s.sum.time, other.sum.time) {
				t.Errorf("summary.time is %v after a restore, it was %v", other.sum.time, s.sum.time)
			}
			continue
		}
		if !was.Field(i).Equal(is.Field(i)) {
			t.Errorf("summary.%s is %v after a restore, it was %v", name, is.Field(i), was.Field(i))
		}
	}
}

// TestASnapshotCarriesEveryFieldOfEveryRecord fills every field of every kind of
// record, whatever it is called, and finds it in the snapshot of a restored state.
func TestASnapshotCarriesEveryFieldOfEveryRecord(t *testing.T) {
	kinds := (&pb.SnapshotRecord{}).ProtoReflect().Descriptor().Oneofs().ByName("record").Fields()
	for i := range kinds.Len() {
		kind := kinds.Get(i)
		if kind.Name() == "header" || kind.Name() == "trailer" {
			continue
		}
		rec := &pb.SnapshotRecord{}
		fill(rec.ProtoReflect().Mutable(kind).Message(), 0)
		s := New()
		b := s.begin()
		in := restorer{txn: b.txn}
		in.put(rec)
		b.sum = in.sum
		b.commit()
		table := ""
		for _, part := range snapshotParts() {
			it, err := s.View().txn.Get(part.table, part.order)
			must(err)
			for raw := it.Next(); raw != nil; raw = it.Next() {
				table = part.table
				if got := wrap(raw); !proto.Equal(got, rec) {
					t.Errorf("%s: got %v, want %v", kind.Name(), got, rec)
				}
			}
		}
		if table == "" {
			t.Errorf("%s: no part of a snapshot holds it", kind.Name())
		}
	}
}

// fill gives every field of a message a value, messages within it too.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if depth > 4 || fd.IsMap() || fd.ContainingOneof() != nil {
			continue
		}
		switch {
		case fd.IsList() && fd.Message() == nil:
			m.Mutable(fd).List().Append(scalar(fd))
		case fd.IsList():
			fill(m.Mutable(fd).List().AppendMutable().Message(), depth+1)
		case fd.Message() != nil:
			fill(m.Mutable(fd).Message(), depth+1)
		default:
			m.Set(fd, scalar(fd))
		}
	}
}

func scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("x")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("x"))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(1)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(1)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(1)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(1)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(1)
	default:
		return fd.Default()
	}
}
