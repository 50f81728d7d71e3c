package fsm_test

import (
	"fmt"
	"io"
	"testing"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// workloadLog is a log of n commands as a busy cluster writes them: each instance
// is created with a request id, placed, and reported three times.
func workloadLog(b *testing.B, bed *bed, n int) []*raft.Log {
	b.Helper()
	logs := make([]*raft.Log, 0, n)
	add := func(payload proto.Message, request string) {
		cmd := command(payload)
		cmd.RequestId = request
		cmd.Time = timestamppb.New(bed.now())
		data, err := fsm.EncodeCommand(cmd)
		if err != nil {
			b.Fatal(err)
		}
		bed.index++
		logs = append(logs, &raft.Log{Index: bed.index, Type: raft.LogCommand, Data: data})
	}
	for i := 0; len(logs) < n; i++ {
		name := fmt.Sprintf("w%07d", i)
		id := name + "-1"
		node := fmt.Sprintf("n%02d", i%50)
		add(&pb.CreateInstancesCommand{
			Spec: workload(name, "on-failure", grant("kv", "kv:read", "kv:write")), InstanceIds: []string{id},
		}, "request-"+name)
		add(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{InstanceId: id, NodeId: node, NodeEpoch: 1}}}, "")
		for attempt, s := range []pb.InstanceState{state("PREPARING"), state("RUNNING"), state("COMPLETED")} {
			add(&pb.ReportStatusRequest{NodeId: node, Epoch: 1, Instances: []*pb.InstanceReport{{
				InstanceId: id,
				Status: &pb.InstanceStatus{
					State: s, Generation: 1, Attempt: uint32(attempt + 1),
					StartedAt: timestamppb.New(bed.now()), Message: "all is well",
				},
			}}}, "")
		}
	}
	return logs[:n]
}

func benchBed(b *testing.B) *bed {
	b.Helper()
	bed := newBed(b)
	bed.module()
	for i := range 50 {
		bed.node(fmt.Sprintf("n%02d", i))
	}
	bed.do(&pb.RegisterProviderCommand{Spec: kv("kv")})
	return bed
}

// BenchmarkApply includes decoding; one operation is one command.
func BenchmarkApply(b *testing.B) {
	for _, size := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			bed := benchBed(b)
			machine := fsm.NewRaftFSM(bed.s, func(err error) { b.Fatal(err) })
			logs := workloadLog(b, bed, b.N)
			b.ReportAllocs()
			b.ResetTimer()
			for at := 0; at < len(logs); at += size {
				for _, answer := range machine.ApplyBatch(logs[at:min(at+size, len(logs))]) {
					if res, ok := answer.(*pb.CommandResult); !ok || res.GetError() != nil {
						b.Fatal(answer)
					}
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
		})
	}
}

// BenchmarkReportBatch is one report of a thousand instances per operation.
func BenchmarkReportBatch(b *testing.B) {
	bed := benchBed(b)
	const n = 1000
	var reports []*pb.InstanceReport
	for i := range n {
		id := bed.run(fmt.Sprintf("w%04d", i), "always")
		bed.place(id, "n01")
		reports = append(reports, &pb.InstanceReport{InstanceId: id})
	}
	b.ReportAllocs()
	attempt := uint32(0)
	for b.Loop() {
		attempt++
		batch := &pb.ReportStatusRequest{NodeId: "n01", Epoch: 1}
		for _, r := range reports {
			batch.Instances = append(batch.Instances, &pb.InstanceReport{
				InstanceId: r.GetInstanceId(),
				Status:     &pb.InstanceStatus{State: state("RUNNING"), Generation: 1, Attempt: attempt},
			})
		}
		if res := bed.do(batch); len(res.GetIds()) != n {
			b.Fatalf("%d of %d reports had an effect", len(res.GetIds()), n)
		}
	}
}

// BenchmarkSnapshot writes and restores a state of 10,000 instances.
func BenchmarkSnapshot(b *testing.B) {
	bed := benchBed(b)
	machine := fsm.NewRaftFSM(bed.s, func(err error) { b.Fatal(err) })
	machine.ApplyBatch(workloadLog(b, bed, 50_000))
	data := dump(b, bed.s)
	b.Run("write", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if err := bed.s.WriteSnapshot(bed.s.View(), io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("restore", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			restoreInto(b, fsm.New(), data)
		}
	})
}
