package fsm

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// How long the answer to a request id is remembered: DedupAge of command time,
// unless DedupKept newer answers push it out. Two peers must never run with
// different values.
const (
	DedupKept = 65_536
	DedupAge  = time.Hour
)

// forgetAtOnce bounds how many aged answers one command forgets, so that the
// first command after a quiet hour is not slow. One command remembers at most
// one answer, so the bound on their number holds all the same.
const forgetAtOnce = 16

// forget drops answers that are too old.
func (t *tx) forget() {
	if t.now == nil || t.sum.dedupCount == 0 {
		return
	}
	limit := timestamppb.New(t.now.AsTime().Add(-DedupAge))
	for range forgetAtOnce {
		oldest, ok := first[*pb.DedupRecord](t.txn, tableDedup, indexOrder)
		if !ok || !before(oldest.GetTime(), limit) {
			return
		}
		t.dropAnswer(oldest)
	}
}

// remember keeps the answer to a request id.
func (t *tx) remember(id string, res *pb.CommandResult) {
	rec := &pb.DedupRecord{
		RequestId:     id,
		RequestDigest: t.cmd.GetRequestDigest(),
		Result:        res,
		Time:          t.now,
	}
	t.chain.put(hashDedup, rec)
	t.insert(tableDedup, rec)
	for t.sum.dedupCount++; t.sum.dedupCount > DedupKept; {
		oldest, ok := first[*pb.DedupRecord](t.txn, tableDedup, indexOrder)
		if !ok {
			return
		}
		t.dropAnswer(oldest)
	}
}

func (t *tx) dropAnswer(rec *pb.DedupRecord) {
	t.chain.remove(hashDedup, rec.GetRequestId())
	t.delete(tableDedup, rec)
	t.sum.dedupCount--
}
