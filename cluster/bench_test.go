package cluster

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// BenchmarkPropose measures committed commands a second: three peers, mutual
// TLS over loopback, logs on bbolt with fsync, or on a disk that takes 5 ms for a
// write, as many in the cloud do.
func BenchmarkPropose(b *testing.B) {
	for _, disk := range []string{"file", "5ms"} {
		for _, writers := range []int{1, 64} {
			b.Run(fmt.Sprintf("disk=%s/writers=%d", disk, writers), func(b *testing.B) { benchmarkPropose(b, disk, writers) })
		}
	}
}

func benchmarkPropose(b *testing.B, disk string, writers int) {
	l := newLab(b)
	leader := l.three(func(c *Config) {
		c.Timers.Heartbeat = time.Second
		if disk != "file" {
			slowDisk(c)
		}
	})
	var left atomic.Int64
	left.Store(int64(b.N))
	var group sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for range writers {
		group.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := leader.Propose(context.Background(), refused()); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "commands/s")
}

// BenchmarkView measures linearizable reads a second.
func BenchmarkView(b *testing.B) {
	for _, readers := range []int{1, 64} {
		b.Run(fmt.Sprintf("readers=%d", readers), func(b *testing.B) {
			l := newLab(b)
			leader := l.three(func(c *Config) { c.Timers.Heartbeat = time.Second })
			var left atomic.Int64
			left.Store(int64(b.N))
			var group sync.WaitGroup
			b.ResetTimer()
			start := time.Now()
			for range readers {
				group.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := leader.View(context.Background(), nil); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "reads/s")
		})
	}
}

// refused is a command that goes through the log and changes nothing, so that
// what is measured is the log.
func refused() *pb.Command {
	return &pb.Command{Payload: &pb.Command_SetProviderRunning{
		SetProviderRunning: &pb.SetProviderRunningCommand{ProviderId: "none", Running: true},
	}}
}

// delayedLogs is a log in memory whose writes take 5 ms.
type delayedLogs struct{ *raft.InmemStore }

// StoreLogs stores entries, slowly.
func (d delayedLogs) StoreLogs(entries []*raft.Log) error {
	<-time.After(5 * time.Millisecond)
	return d.InmemStore.StoreLogs(entries)
}

func slowDisk(c *Config) {
	c.Seams.Logs = delayedLogs{raft.NewInmemStore()}
	c.Seams.Stable, c.Seams.SnapshotStore = raft.NewInmemStore(), raft.NewInmemSnapshotStore()
}
