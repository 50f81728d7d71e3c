package fsm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func entry(t testing.TB, index uint64, cmd *pb.Command) *raft.Log {
	t.Helper()
	data, err := fsm.EncodeCommand(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Type: raft.LogCommand, Data: data}
}

// sealed puts bytes into the envelope of a command.
func sealed(message []byte) []byte {
	sum := crc32.Checksum(message, crc32.MakeTable(crc32.Castagnoli))
	return append(binary.BigEndian.AppendUint32([]byte{1}, sum), message...)
}

// TestNoBitOfACommandFlipsSilently: damage anywhere between the proposer and
// Apply is noticed, whichever bit it is.
func TestNoBitOfACommandFlipsSilently(t *testing.T) {
	data := register(t, 1, "n1").Data
	if err := fsm.VerifyCommand(data); err != nil {
		t.Fatal(err)
	}
	for i := range len(data) * 8 {
		damaged := slices.Clone(data)
		damaged[i/8] ^= 1 << (i % 8)
		if err := fsm.VerifyCommand(damaged); !errors.Is(err, fsm.ErrDamagedCommand) {
			t.Fatalf("bit %d: got %v", i, err)
		}
	}
	for i := range data {
		if err := fsm.VerifyCommand(data[:i]); !errors.Is(err, fsm.ErrDamagedCommand) {
			t.Fatalf("cut off at %d: got %v", i, err)
		}
	}
}

func register(t testing.TB, index uint64, node string) *raft.Log {
	t.Helper()
	return entry(t, index, command(&pb.RegisterNodeCommand{Info: nodeInfo(node)}))
}

func failOn(t testing.TB) func(error) {
	return func(err error) { t.Errorf("the state machine stopped: %v", err) }
}

func TestRaftAppliesBatches(t *testing.T) {
	s := fsm.New()
	m := fsm.NewRaftFSM(s, failOn(t))
	before := s.View().Hash()
	out := m.ApplyBatch([]*raft.Log{
		{Index: 1, Type: raft.LogConfiguration},
	})
	if len(out) != 1 || out[0] != nil || s.View().Index() != 1 || s.View().Hash() != before {
		t.Errorf("a configuration entry: %v, index %d", out, s.View().Index())
	}
	out = m.ApplyBatch([]*raft.Log{
		register(t, 3, "n1"),
		{Index: 4, Type: raft.LogConfiguration},
		entry(t, 6, command(&pb.DrainNodeCommand{NodeId: "n9"})),
		register(t, 7, "n1"),
	})
	first, _ := out[0].(*pb.CommandResult)
	refused, _ := out[2].(*pb.CommandResult)
	second, _ := out[3].(*pb.CommandResult)
	if first.GetIndex() != 3 || first.GetEpoch() != 1 || out[1] != nil || refused.GetError().GetCode() != noNode || second.GetEpoch() != 2 {
		t.Errorf("got %v", out)
	}
	if res, _ := m.Apply(register(t, 9, "n2")).(*pb.CommandResult); res.GetIndex() != 9 || s.View().Index() != 9 {
		t.Errorf("got %v at %d", res, s.View().Index())
	}
}

func TestABatchIsSeenAsAWhole(t *testing.T) {
	s := fsm.New()
	m := fsm.NewRaftFSM(s, failOn(t))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan []uint64, 1)
	go func() {
		var seen []uint64
		for after := uint64(0); after < 400; {
			select {
			case <-s.Changed(after):
			case <-ctx.Done():
				t.Errorf("no change after index %d was told within a minute", after)
				done <- seen
				return
			}
			v := s.View()
			after = v.Index()
			seen = append(seen, after)
			if len(v.Nodes(nil)) != int(after) || len(v.Events(0, 0)) != int(after) {
				t.Errorf("at index %d there are %d nodes", after, len(v.Nodes(nil)))
			}
		}
		done <- seen
	}()
	for first := uint64(1); first <= 400; first += 8 {
		var batch []*raft.Log
		for i := first; i < first+8; i++ {
			batch = append(batch, register(t, i, "n"+strings.Repeat("x", int(i)%50)+string(rune('a'+i%26))+string(rune('a'+i/26))))
		}
		m.ApplyBatch(batch)
	}
	for _, index := range <-done {
		if index%8 != 0 {
			t.Errorf("index %d was seen, in the middle of a batch", index)
		}
	}
}

func TestAnEntryThatCannotBeAppliedStopsThePeer(t *testing.T) {
	unknown := sealed(protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), []byte("from the future")))
	flipped := register(t, 3, "n3").Data
	flipped[len(flipped)-1] ^= 1
	bare, err := proto.Marshal(command(&pb.RegisterNodeCommand{Info: nodeInfo("n3")}))
	if err != nil {
		t.Fatal(err)
	}
	expects, err := fsm.EncodeCommand(&pb.Command{
		Preconditions: []*pb.Precondition{{ModifiedIndex: 1}}, Payload: command(&pb.RegisterNodeCommand{Info: nodeInfo("n3")}).Payload,
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		entry *raft.Log
		want  error
	}{
		"damaged":             {&raft.Log{Index: 3, Type: raft.LogCommand, Data: []byte{0xff, 0xff}}, fsm.ErrDamagedCommand},
		"no envelope":         {&raft.Log{Index: 3, Type: raft.LogCommand, Data: bare}, fsm.ErrDamagedCommand},
		"a flipped bit":       {&raft.Log{Index: 3, Type: raft.LogCommand, Data: flipped}, fsm.ErrDamagedCommand},
		"sealed nonsense":     {&raft.Log{Index: 3, Type: raft.LogCommand, Data: sealed([]byte{0xff, 0xff})}, fsm.ErrDamagedCommand},
		"a new precondition":  {&raft.Log{Index: 3, Type: raft.LogCommand, Data: expects}, fsm.ErrUnknownCommand},
		"empty":               {&raft.Log{Index: 3, Type: raft.LogCommand}, fsm.ErrDamagedCommand},
		"without payload":     {&raft.Log{Index: 3, Type: raft.LogCommand, Data: sealed(nil)}, fsm.ErrUnknownCommand},
		"of a newer version":  {&raft.Log{Index: 3, Type: raft.LogCommand, Data: unknown}, fsm.ErrUnknownCommand},
		"applied before":      {register(t, 2, "n3"), fsm.ErrStopped},
		"long applied before": {register(t, 1, "n3"), fsm.ErrStopped},
	} {
		t.Run(name, func(t *testing.T) {
			s := fsm.New()
			var fatal []error
			m := fsm.NewRaftFSM(s, func(err error) { fatal = append(fatal, err) })
			out := m.ApplyBatch([]*raft.Log{
				register(t, 1, "n1"), register(t, 2, "n2"), c.entry, register(t, 4, "n4"),
			})
			if _, ok := out[1].(*pb.CommandResult); !ok || s.View().Index() != 2 || len(s.View().Nodes(nil)) != 2 {
				t.Errorf("the entries before it: %v, index %d", out[1], s.View().Index())
			}
			for i := 2; i < 4; i++ {
				if err, _ := out[i].(error); !errors.Is(err, fsm.ErrStopped) || !errors.Is(err, c.want) {
					t.Errorf("entry %d: %v", i, out[i])
				}
			}
			if err, _ := m.Apply(register(t, 5, "n5")).(error); !errors.Is(err, fsm.ErrStopped) {
				t.Errorf("afterwards: %v", err)
			}
			if len(fatal) != 1 || !errors.Is(fatal[0], c.want) || s.View().Index() != 2 {
				t.Errorf("told %v, index %d", fatal, s.View().Index())
			}
			if _, err := m.Snapshot(); !errors.Is(err, fsm.ErrStopped) {
				t.Errorf("a snapshot of a stopped state: %v", err)
			}
		})
	}
}

type sink struct {
	bytes.Buffer
	closed, cancelled bool
	fail              error
}

func (s *sink) ID() string { return "1" }

func (s *sink) Close() error {
	s.closed = true
	return nil
}

func (s *sink) Cancel() error {
	s.cancelled = true
	return nil
}

func (s *sink) Write(p []byte) (int, error) {
	if s.fail != nil {
		return 0, s.fail
	}
	return s.Buffer.Write(p)
}

type source struct {
	io.Reader
	closed bool
}

func (s *source) Close() error {
	s.closed = true
	return nil
}

func TestRaftSnapshotsAndRestores(t *testing.T) {
	b := furnished(t)
	m := fsm.NewRaftFSM(b.s, failOn(t))
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	data := dump(t, b.s)
	b.node("later")
	var good sink
	if err := snap.Persist(&good); err != nil || !good.closed || good.cancelled || !bytes.Equal(data, good.Bytes()) {
		t.Errorf("persist: %v, closed %v, cancelled %v", err, good.closed, good.cancelled)
	}
	full := sink{fail: errors.New("disk full")}
	if err := snap.Persist(&full); !errors.Is(err, full.fail) || full.closed || !full.cancelled {
		t.Errorf("persist to a full disk: %v, closed %v, cancelled %v", err, full.closed, full.cancelled)
	}
	snap.Release()

	src := &source{Reader: bytes.NewReader(data)}
	if err := m.Restore(src); err != nil || !src.closed || !bytes.Equal(data, dump(t, b.s)) {
		t.Errorf("restore: %v, closed %v", err, src.closed)
	}
	src = &source{Reader: bytes.NewReader(data[:100])}
	if err := m.Restore(src); !errors.Is(err, fsm.ErrBadSnapshot) || !src.closed {
		t.Errorf("restore of a bad one: %v, closed %v", err, src.closed)
	}
}

func TestCommandsAreEncodedAlike(t *testing.T) {
	cmd := command(&pb.CreateInstancesCommand{Spec: workload("w", ""), InstanceIds: []string{"w-1"}})
	first, err := fsm.EncodeCommand(cmd)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		decoded, err := fsm.DecodeCommand(first)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := fsm.EncodeCommand(decoded); err != nil || !bytes.Equal(first, again) {
			t.Fatalf("encoded otherwise: %v", err)
		}
	}
	if _, err := fsm.EncodeCommand(&pb.Command{RequestId: "r"}); !errors.Is(err, fsm.ErrUnknownCommand) {
		t.Errorf("got %v", err)
	}
	huge := workload("w", "")
	huge.Stdin = make([]byte, fsm.MaxCommandBytes)
	if _, err := fsm.EncodeCommand(command(&pb.CreateInstancesCommand{Spec: huge})); !errors.Is(err, fsm.ErrCommandTooLarge) {
		t.Errorf("got %v", err)
	}
}
